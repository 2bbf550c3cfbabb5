"""Lets diffusers' transformer skip steps as the runtime does: the last computed residual in place of the blocks' own.

The blocks are run all the same and what they give is put aside, so that it works whatever is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fluxc.running.lockstep import CALL
from fluxrt.stepcache import Decisions


def modulated_input(transformer: Any, hidden: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
    """The first block's modulated input of the image tokens fp32 [1, S, D], whose change a step cache goes by."""
    width = hidden.shape[-1]
    modulation = modulation.float().reshape(1, 1, -1)
    plain = torch.nn.functional.layer_norm(hidden.float(), (width,), eps=transformer.config.eps)
    return plain * (1 + modulation[..., width : 2 * width]) + modulation[..., :width]


def relative_change(new: torch.Tensor, old: torch.Tensor) -> float:
    """mean |new - old| / mean |old|."""
    return float((new - old).abs().mean() / old.abs().mean())


@contextmanager
def reusing(transformer: Any, sources: Sequence[int]) -> Iterator[None]:
    """While the body runs, call number i of one PlacedModel.run takes what the blocks added in call `sources[i]`: in itself, or
    in an earlier one of which the tokens are as many."""
    last = {source: call for call, source in enumerate(sources) if source != call}
    hidden: dict[int, torch.Tensor] = {}
    residuals: dict[int, torch.Tensor] = {}

    def enter(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        call = CALL.get()
        if call in last or sources[call] != call:
            hidden[call] = kwargs["hidden_states"]

    def leave(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        call = CALL.get()
        entered, source = hidden.pop(call, None), sources[call]
        if entered is None:
            return args
        if call in last:
            residuals[call] = args[0] - entered
        if source == call:
            return args
        return (entered + (residuals.pop(source) if last[source] == call else residuals[source]), *args[1:])

    handles = [
        transformer.transformer_blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
        transformer.norm_out.register_forward_pre_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Image:
    """What is kept of an image on its way: passes that entered and left the blocks, and the last residual of each branch."""

    decisions: Decisions
    entered: int = 0
    left: int = 0
    hidden: torch.Tensor | None = None
    signal: torch.Tensor | None = None
    skips: bool = False
    residuals: dict[int, torch.Tensor] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)


@contextmanager
def skipping(transformer: Any, branches: int, decide: Callable[[], Decisions]) -> Iterator[dict[int, list[int]]]:
    """While the body runs, `transformer` skips steps as `decide()` says for each image, with `branches` passes a step; gives
    the steps that were skipped by number of the call of PlacedModel.run."""
    images: dict[int, _Image] = {}
    skipped: dict[int, list[int]] = {}

    def image() -> _Image:
        number = CALL.get()
        if number not in images:
            images[number] = _Image(decide())
            skipped[number] = images[number].skipped
        return images[number]

    def enter(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        one = image()
        step, branch = divmod(one.entered, branches)
        one.entered += 1
        one.hidden = kwargs["hidden_states"]
        if branch:
            return
        signal = modulated_input(transformer, one.hidden, kwargs["temb_mod_img"])
        change = None if one.signal is None else relative_change(signal, one.signal)
        one.signal, one.skips = signal, one.decisions.skip(step, change)
        if one.skips:
            one.skipped.append(step)

    def leave(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        one = image()
        branch = one.left % branches
        one.left += 1
        assert one.hidden is not None
        if not one.skips:
            one.residuals[branch] = args[0] - one.hidden
        return (one.hidden + one.residuals[branch], *args[1:])

    handles = [
        transformer.transformer_blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
        transformer.norm_out.register_forward_pre_hook(leave),
    ]
    try:
        yield skipped
    finally:
        for handle in handles:
            handle.remove()
