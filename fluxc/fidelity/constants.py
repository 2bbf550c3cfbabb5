"""Refuses what is one value everywhere and should not be: the result of a GEMM, or of a stage. No gate needs to be set for it.

A kernel that takes its operands wrongly may leave zeros without a word. A layer of zeros among hundreds changes an image less
than four bits do, so that no figure shows it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fluxc.base.errors import BuildError
from fluxc.base.threads import chosen_threads
from fluxc.targets.probe import Probe
from fluxc.targets.registry import kind_of
from fluxrt.bundle import Bundle
from fluxrt.evidence import Recorded
from fluxrt.memory import DECODE, DENOISE, ENCODE
from fluxrt.pipeline import Pipeline

NAMED = 4
"""So many GEMMs are named."""


def check_gemms(bundle: Bundle, target: str, recorded: Recorded, size: tuple[int, int], guidance: float) -> None:
    """Run every graph of a target once, where its kind can look inside, on the first recorded input of each stage.

    One component is in memory at a time. Raises BuildError naming the GEMMs that are constant and should not be.
    """
    entry = bundle.target(target)
    for probe in kind_of(entry.kind).probes(bundle, entry, chosen_threads()):
        _check_gemms(bundle, target, probe, recorded, size, guidance)


def _check_gemms(
    bundle: Bundle, target: str, probe: Probe, recorded: Recorded, size: tuple[int, int], guidance: float
) -> None:
    with Pipeline(bundle, target=target, backend=probe) as pipeline:
        grid, sigma = pipeline.grid(size), recorded.sigmas[0]
        probe.keep(ENCODE)
        pipeline.begin(recorded.latents[:1], grid, guidance, (recorded.input_ids, recorded.attention_mask))
        probe.keep(DENOISE)
        for body in pipeline.target.bodies:
            pipeline.begin(recorded.latents[:1], grid, guidance, recorded.text)
            pipeline.step(sigma, sigma + 1.0, body)
        probe.keep(DECODE)
        pipeline.decode(recorded.final, grid)
    found = probe.constants()
    if not found:
        return
    named = "; ".join(map(str, found[:NAMED])) + (f"; and {len(found) - NAMED} more" if len(found) > NAMED else "")
    raise BuildError(
        f"target {target}: {named}, everywhere, while neither its input nor its stored "
        "weight is one value: the engine takes this form of the layer wrongly and says nothing. No bundle was written; use "
        "another format for the layer, other options of the target, or the versions of constraints.txt"
    )


def check_result(
    target: str, what: str, prompt: str, values: Sequence[np.ndarray], expected: Sequence[np.ndarray]
) -> None:
    """Raise BuildError where an array of `values` is one value everywhere and diffusers' own, in `expected`, is not."""
    for ours, theirs in zip(values, expected, strict=True):
        if ours.size > 1 and _is_constant(ours) and not _is_constant(theirs):
            raise BuildError(
                f"target {target}: the {what} for {prompt!r} are {float(ours.flat[0]):g} everywhere, which diffusers' are "
                "not; the engine computes a layer wrongly and says nothing, no bundle was written"
            )


def _is_constant(array: np.ndarray) -> bool:
    return bool(array.min() == array.max())
