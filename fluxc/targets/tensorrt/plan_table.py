"""The table of an engine's plans that `fluxc inspect` prints."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from fluxc.base.console import new_table
from fluxrt.manifest import TensorRTTarget


def plan_table(target: TensorRTTarget) -> Table:
    """The plans of the target's engine: how often each runs in an image's stages, and what the audit found in it."""
    engine = target.engine
    built = f"{engine.library} {engine.version}" if engine.version else f"to be built by {engine.library} on the GPU"
    title = f"{target.name}: {built}, compute capability {', '.join(engine.compute_capabilities)}"
    title += f", finished on {engine.gpu} (driver {engine.driver})" if engine.gpu else ""
    title += "".join(f"; {found['weights']}" for found in engine.audit.values() if "weights" in found)
    table = new_table(
        "plan",
        "runs",
        "GEMMs",
        "fused attentions",
        "all-to-alls",
        "kernels",
        "weights copied a run",
        "working memory",
        "read from",
        "allowed faults",
        title=title,
    )
    runs = Counter(call.plan for program in engine.programs.values() for call in program.calls)
    for plan in engine.plans:
        found = engine.audit.get(plan)
        if found is None:
            table.add_row(plan, str(runs[plan]), "not built yet")
            continue
        gemms = ", ".join(f"{count} {format}" for format, count in found["gemms"].items())
        figures = (
            found["attentions"],
            found["collectives"],
            found["kernels"],
            f"{found['copied_bytes']:,} bytes",
            f"{found.get('working_bytes', 0):,} bytes",
            found.get("read", "program"),
            "; ".join(f"{', '.join(fault['layers'])}: {fault['text']}" for fault in found["faults"]),
        )
        table.add_row(plan, str(runs[plan]), gemms, *map(str, figures))
    return table
