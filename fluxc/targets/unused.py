"""No tensor is stored for nothing: what no graph of a target computes with means that the graphs are wrong."""

from __future__ import annotations

from fluxc.base.errors import BuildError


def check_unused(component: str, unused: list[str], ignored: tuple[str, ...]) -> None:
    """Raise BuildError naming tensors of `unused` whose names do not start with one of `ignored`."""
    left = [tensor for tensor in unused if not tensor.startswith(ignored or ("\0",))]
    if left:
        raise BuildError(
            f"{component}: no graph uses {', '.join(left[:4])}{' and more' if len(left) > 4 else ''}; "
            "weights that are stored but never computed with mean the graphs are wrong"
        )
