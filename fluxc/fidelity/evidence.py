"""Writes a bundle's evidence: what diffusers made of one or two prompts, and what that is held to on every target.

1. At most MOST_PROMPTS prompts, or one where it takes more than LARGE bytes; at most MOST_SIGMAS velocities, spread evenly.
2. A tensor is stored in the smallest of bf16, fp16, fp32 that holds it exactly. Of a large prompt, embeddings, prologue and
   image are rounded to fp16 where that changes them by less than MOST_ROUNDING.
3. Where a bundle decodes this size in tiles, the image is the one that diffusers' decoder gives of them.
4. The build compares its targets with what is stored, so recorded errors hold what storing cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fluxc.base.errors import BuildError
from fluxc.base.numbers import as_json
from fluxc.fidelity.compare import Reference
from fluxc.fidelity.gates import evidence_bounds
from fluxc.quantize.plan import LayerPlan
from fluxc.recipe.targets import Target
from fluxrt.bundle import Bundle
from fluxrt.evidence import (
    PROLOGUE,
    STAGE_OF,
    Recorded,
    digest_of,
    relative_error,
    schedule_fault,
    stage_of,
    tokens_fault,
)
from fluxrt.manifest import Evidence, EvidencePrompt, EvidenceTarget, StageErrors
from fluxrt.prompt import load_encoder
from fluxrt.resolve import branches

FOLDER = "evidence"
INDEX = "evidence.json"
"""What the comparison leaves beside the files: all of the manifest's `evidence` but its targets, and the recorded steps."""
MOST_PROMPTS, MOST_SIGMAS = 2, 4
LARGE = 8 << 20
"""Bytes of a prompt's tensors in fp32."""
MOST_ROUNDING = 4e-4
"""Relative error: fp16 costs 1.2e-4 to 2e-4 of values in its range, and what rounding explains starts at 1e-3."""


def recorded_of(bundle: Bundle, references: Iterable[Reference], guidance: float, steps: int) -> list[Recorded]:
    """References as evidence has them, with every step; BuildError where the runtime's tokens or schedule are others."""
    encoder, sampling = load_encoder(bundle), bundle.manifest.sampling
    found = []
    for reference in references:
        trace = reference.trace
        prompts = branches(sampling, trace.prompt, guidance)
        mask = encoder.encode(prompts)[1]
        recorded = Recorded(
            prompt=trace.prompt,
            seed=reference.seed,
            input_ids=np.concatenate(trace.input_ids[: len(prompts)]).astype(np.int64),
            attention_mask=mask,
            text=np.concatenate(trace.text),
            prologue=trace.prologue,
            sigmas=tuple(trace.sigmas),
            latents=np.concatenate(trace.latents),
            velocities=np.concatenate(trace.velocities),
            final=reference.final,
            image=trace.image if reference.tiled is None else reference.tiled,
            steps=steps,
        )
        tokens = recorded.latents.shape[1]
        fault = tokens_fault(encoder, prompts, recorded)
        fault = fault or schedule_fault(sampling.schedule, tokens, steps, recorded.sigmas)
        if fault or len(recorded.sigmas) != steps:
            told = fault or f"diffusers took {len(recorded.sigmas)} steps, the runtime would take {steps}"
            raise BuildError(f"{told}; the recorded ones are diffusers', so no target can be compared")
        found.append(recorded)
    return found


def write_evidence(
    folder: Path, recorded: list[Recorded], size: tuple[int, int], steps: int, guidance: float
) -> list[Recorded]:
    """Write evidence files and the index into `folder`; `recorded` with what is stored in place of what was."""
    if not recorded:
        (folder / INDEX).write_text("null")
        return recorded
    at = spread(len(recorded[0].sigmas), MOST_SIGMAS)
    is_large = sum(array.nbytes for array in tensors_of(_at(recorded[0], at)).values()) > LARGE
    number = 1 if is_large else MOST_PROMPTS
    stored = [as_stored(one, is_large) for one in recorded[:number]]
    (folder / FOLDER).mkdir()
    prompts = []
    for index, one in enumerate(stored):
        name = f"{FOLDER}/{index}.safetensors"
        stages = _write(folder / name, tensors_of(_at(one, at)))
        prompts.append(EvidencePrompt(name, one.prompt, one.seed, stages))
    sigmas = tuple(recorded[0].sigmas[step] for step in at)
    evidence = Evidence(size, steps, guidance, sigmas, tuple(prompts), {})
    (folder / INDEX).write_text(as_json({"steps": at, "evidence": msgspec.to_builtins(evidence)}, "evidence"))
    return [*stored, *recorded[number:]]


def read_index(folder: Path) -> tuple[Evidence, list[int]] | None:
    """What `write_evidence` left in `folder`: evidence without targets, and the steps whose velocities it has."""
    index = msgspec.json.decode((folder / INDEX).read_bytes())
    return (msgspec.convert(index["evidence"], Evidence), index["steps"]) if index else None


def evidence_entry(
    compared: Path,
    figures: Mapping[str, Mapping[str, Any]],
    targets: Sequence[Target],
    reference: str,
    plans: Mapping[str, list[LayerPlan]],
) -> Evidence | None:
    """The manifest's `evidence`: what was measured and what every target is held to; None where nothing is recorded.

    `compared` is the comparison's folder, `figures` what it measured by target.
    """
    index = read_index(compared)
    if index is None:
        return None
    evidence, steps = index
    measured = {
        name: tuple(_errors(row, steps) for row in found["prompts"][: len(evidence.prompts)])
        for name, found in figures.items()
    }
    worst = {
        name: max(max(e for e in row.step_error if e is not None) for row in rows) for name, rows in measured.items()
    }
    bounds = evidence_bounds(targets, reference, plans, worst)
    entries = {name: EvidenceTarget(found, measured.get(name, ())) for name, found in bounds.items()}
    return msgspec.structs.replace(evidence, targets=entries)


def tensors_of(recorded: Recorded) -> dict[str, np.ndarray]:
    """The tensors of an evidence file."""
    found: dict[str, np.ndarray] = {name: np.asarray(getattr(recorded, name)) for name in STAGE_OF}
    found["sigmas"] = np.array(recorded.sigmas, np.float64)
    return found | {f"{PROLOGUE}.{name}": array for name, array in recorded.prologue.items()}


def as_stored(recorded: Recorded, is_large: bool) -> Recorded:
    """`recorded` as it is read again."""
    if not is_large:
        return recorded
    return replace(
        recorded,
        text=_rounded(recorded.text),
        image=_rounded(recorded.image),
        prologue={name: _rounded(array) for name, array in recorded.prologue.items()},
    )


def spread(number: int, most: int) -> list[int]:
    """At most `most` of `number` steps, the first and the last among them."""
    if number <= most:
        return list(range(number))
    return [round(at * (number - 1) / (most - 1)) for at in range(most)]


def _at(recorded: Recorded, steps: list[int]) -> Recorded:
    """`recorded` with the velocities of these steps alone."""
    return replace(
        recorded,
        sigmas=tuple(recorded.sigmas[step] for step in steps),
        latents=recorded.latents[steps],
        velocities=recorded.velocities[steps],
    )


def _rounded(array: np.ndarray) -> np.ndarray:
    """`array` rounded to fp16, as fp32; itself where that would change it by more than MOST_ROUNDING."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16).astype(np.float32)
    return half if np.isfinite(half).all() and relative_error(half, array) <= MOST_ROUNDING else array


def _errors(row: Mapping[str, Any], steps: list[int]) -> StageErrors:
    """A prompt's figures at the recorded steps."""
    return StageErrors(
        row["text_error"],
        row["prologue_error"],
        tuple(row["step_error"][step] for step in steps),
        tuple(row["step_cosine"][step] for step in steps),
        row["decode_error"],
    )


def _write(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, str]]:
    """Write a safetensors file, in the order of names, and by stage the digest of every tensor."""
    header, data, position = {}, [], 0
    stages: dict[str, dict[str, str]] = {}
    for name in sorted(tensors):
        dtype, raw = _encoded(tensors[name])
        stage = stage_of(name)
        assert stage is not None, name
        stages.setdefault(stage, {})[name] = digest_of(dtype, tensors[name].shape, raw)
        header[name] = {
            "dtype": dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [position, position + len(raw)],
        }
        data.append(raw)
        position += len(raw)
    encoded = msgspec.json.encode(header)
    # Data begins on a multiple of 64 bytes, as in weights files.
    encoded += b" " * (-(8 + len(encoded)) % 64)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.writelines(data)
    return stages


def _encoded(array: np.ndarray) -> tuple[str, bytes]:
    """(dtype as safetensors names it, bytes) in the smallest dtype that holds every value exactly."""
    array = np.ascontiguousarray(array)
    if array.dtype == np.int64:
        return "I64", array.tobytes()
    if array.dtype == np.float64:
        return "F64", array.tobytes()
    assert array.dtype == np.float32, array.dtype
    bits = array.view(np.uint32)
    if not (bits & 0xFFFF).any():
        return "BF16", (bits >> 16).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        half = array.astype("<f2")
    if np.array_equal(half.astype(np.float32), array):
        return "F16", half.tobytes()
    return "F32", array.tobytes()
