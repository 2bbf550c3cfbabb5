"""Replays a bundle's evidence on this machine's GPU, and puts what it came to into the bundle, as an entry of its own.

`fluxc finish` does so with the targets that it built plans for. What was recorded is diffusers' own work, so no target for the
CPU has to be at hand.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.progress import StageProgress
from fluxc.fidelity.on_target import digest_without_entries
from fluxc.gpu_check.evidence import REPLAYED, add_record
from fluxc.gpu_check.machine import library_versions
from fluxc.gpu_check.place import Place
from fluxc.gpu_check.record import Outcome, Ran, new_record, write_record
from fluxc.gpu_check.subject import file_hashes
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.evidence import Recorded, read_evidence
from fluxrt.manifest import Evidence, Target
from fluxrt.pipeline import Pipeline
from fluxrt.verify import NO_EVIDENCE, TargetChecked, check_passed, check_target, why_not_replayed, worst_of


def replay_on_gpu(path: Path, targets: list[str], place: Place, progress: StageProgress | None = None) -> Iterator[str]:
    """Replay the evidence of the bundle at `path` on `targets` at `place`; yields a line for each, and what was added.

    The figures become an entry of the manifest and a page of the report, also where they are beyond their bounds: VerifyError
    then names stage, prompt and target. A target that does not run there is told with its reason, and leaves no entry.
    """
    progress = progress or StageProgress()
    bundle = open_bundle(path)
    evidence = bundle.manifest.recorded
    if evidence is None:
        yield f"{path}: {NO_EVIDENCE}"
        return
    recorded, machine = read_evidence(bundle, evidence), place.machine(bundle)
    found: list[TargetChecked] = []
    checks: dict[str, Outcome] = {}
    for name in targets:
        target = bundle.target(name)
        why = why_not_replayed(bundle, target, machine)
        if why:
            yield f"target {name}: evidence not replayed: {why}"
            continue
        with progress.stage(f"replay the evidence on {name}") as report:
            began = time.perf_counter()

            def on_part(which: str, done: int, total: int, report: Any = report) -> None:
                report(done, total, f"{done}/{total} parts")

            checked = _check(bundle, evidence, target, recorded, place, on_part)
            seconds = round(time.perf_counter() - began, 2)
        found.append(checked)
        figures = {"stages": worst_of(checked.prompts), "prompts": [asdict(row) for row in checked.prompts]}
        figures["not_compared"] = list(checked.notes)
        why = checked.why if checked.status == "failed" else ""
        status = "failed" if checked.status == "failed" else "passed"
        checks[f"{REPLAYED}{name}"] = msgspec.convert(
            {"status": status, "seconds": seconds, "why": why, "figures": figures}, Outcome
        )
        yield f"target {name}: {checked.line}"
    if found:
        ran = Ran(
            bundle.manifest.name,
            digest_without_entries(bundle.manifest),
            file_hashes(bundle),
            place.describe(),
            library_versions(),
        )
        record = msgspec.structs.replace(new_record(ran, place.is_rehearsal), checks=checks)
        with tempfile.TemporaryDirectory(prefix="fluxc-replay-") as folder:
            file = Path(folder) / "replay.json"
            write_record(file, record)
            yield add_record(path, file)
        check_passed(bundle, found, None)


def _check(
    bundle: Bundle, evidence: Evidence, target: Target, recorded: list[Recorded], place: Place, on_part: Any
) -> TargetChecked:
    def open_pipeline() -> Pipeline:
        return Pipeline(bundle, target=target.name, backend=place.backend(bundle, target, place.driver(), True))

    return check_target(bundle, evidence, target, recorded, open_pipeline, on_part)
