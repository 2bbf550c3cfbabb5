"""What a target holds on the GPU, against what the audit of its plans said and against what the GPU itself has lost."""

from __future__ import annotations

from typing import Any

from fluxc.fidelity.verify import request_of
from fluxc.gpu_check.child import Found
from fluxc.gpu_check.subject import Subject, recorded_images
from fluxrt.manifest import TensorRTTarget

SLACK = 1.05
"""Of working memory over the audit's figure, which counts a plan's tensors and not their alignment."""
UNACCOUNTED = 2 << 30
"""Bytes that code, streams and the library itself may take; a plan with a region of its own at run time takes more."""


def check_memory(subject: Subject) -> Found:
    """Bytes after one image: held by the backend by what they are for, lost by the GPU, and the audit's working memory."""
    bundle, target = subject.open()
    recorded = recorded_images(bundle, target)
    if not recorded:
        return Found(skipped="the bundle has no recorded request; build it with a CPU target beside")
    with subject.load() as loaded:
        loaded.pipeline.generate(request_of(recorded[0]))
        loaded.wait()
        free, total = loaded.driver.memory()
        backend: Any = loaded.pipeline.backend
        held: dict[str, int] = backend.held() if hasattr(backend, "held") else {}
        notes = list(loaded.pipeline.notes)
    figures: dict[str, Any] = {
        "held_bytes": held,
        "lost_bytes": loaded.free - free,
        "total_bytes": total,
        "notes": notes,
    }
    faults = []
    if held:
        figures["elsewhere_bytes"] = figures["lost_bytes"] - sum(held.values())
        if figures["elsewhere_bytes"] > UNACCOUNTED:
            faults.append(
                f"the GPU has {figures['lost_bytes'] / 2**30:.2f} GiB less than before and the backend holds "
                f"{sum(held.values()) / 2**30:.2f} GiB: the rest is more than libraries take, a plan allocates while it runs"
            )
    if isinstance(target, TensorRTTarget) and target.engine.audit:
        audited = max(found["working_bytes"] for found in target.engine.audit.values())
        figures["audited_working_bytes"] = audited
        if held.get("working memory", 0) > SLACK * audited + (1 << 20):
            faults.append(
                f"plans want {held['working memory']:,} bytes of working memory, the audit read {audited:,} from them: the "
                "prediction of memory is wrong by that"
            )
    return Found(figures, faults)
