"""No tensor is stored for nothing: what no graph of a target computes with means that the graphs are wrong."""

from __future__ import annotations

from collections.abc import Container

from fluxc.base.errors import BuildError
from fluxc.quantize.plan import LayerPlan


def unused_of_groups(plan: list[LayerPlan], part: str, taken: Container[str]) -> set[str]:
    """The tensors `part` that members of a fusion group have for nothing, because a graph takes another member's, equal, for
    the group."""
    groups = {f"{entry.layer.name}.{part}": entry.layer.group for entry in plan}
    used = {group for name, group in groups.items() if group and name in taken}
    return {name for name, group in groups.items() if group in used}


def check_unused(component: str, unused: list[str], ignored: tuple[str, ...]) -> None:
    """Raise BuildError naming tensors of `unused` whose names do not start with one of `ignored`."""
    left = [tensor for tensor in unused if not tensor.startswith(ignored or ("\0",))]
    if left:
        raise BuildError(
            f"{component}: no graph uses {', '.join(left[:4])}{' and more' if len(left) > 4 else ''}; "
            "weights that are stored but never computed with mean the graphs are wrong"
        )
