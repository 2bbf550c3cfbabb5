"""The table of a target's graphs that `fluxc inspect` prints."""

from __future__ import annotations

from rich.table import Table

from fluxc.base.console import new_table
from fluxrt.backends.openvino_target import OpenVinoTarget


def graph_table(target: OpenVinoTarget) -> Table:
    """The graphs of the target: what the audit found in each."""
    title = f"{target.name}: audited with OpenVINO {target.version} on the CPU"
    table = new_table("graph", "weights of its Linears in memory", "computed in", "fused attentions", title=title)
    for name in target.graphs:
        found = target.audit.get(name)
        if found is None:
            table.add_row(name, "not audited")
            continue
        products = ", ".join(f"{count} {held}" for held, count in found["products"].items())
        table.add_row(name, products, found["computed_in"], str(found["attentions"]))
    return table
