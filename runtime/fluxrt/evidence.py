"""Evidence: inputs of every stage as a reference had them, and its results; read from a bundle and replayed on a target.

1. What is read is what the manifest has SHA-256 of, tensor by tensor; the first that is not is named, with its stage.
2. One component is used at a time, for all prompts, in a pipeline of its own: text encoder, transformer, decoder.
3. Every stage gets recorded input, never what an earlier stage of the target made of it.
4. An error beyond its bound is a fault, which names stage, prompt, target and figures.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fluxrt.bundle import Bundle
from fluxrt.errors import BackendError, BundleError
from fluxrt.manifest import Evidence, EvidencePrompt, EvidenceTarget, StageErrors
from fluxrt.pipeline import Pipeline
from fluxrt.prompt import PromptEncoder
from fluxrt.resolve import branches
from fluxrt.safetensors import HeaderEntry, HeaderError, header_entries
from fluxrt.schedule import SCHEDULES

TOKENS, TEXT, PROLOGUE, VELOCITY, DECODER = "tokens", "text encoder", "prologue", "velocity", "decoder"
STAGE_OF = {
    "input_ids": TOKENS,
    "attention_mask": TOKENS,
    "text": TEXT,
    "sigmas": VELOCITY,
    "latents": VELOCITY,
    "velocities": VELOCITY,
    "final": DECODER,
    "image": DECODER,
}
"""The stage that a tensor belongs to; that of `prologue.NAME` is the prologue. A later stage may read it too."""
FIGURES = {"text_error": TEXT, "prologue_error": PROLOGUE, "step_error": VELOCITY, "decode_error": DECODER}
"""The stages whose errors StageErrors has, by figure."""
DTYPES = {"I64": "<i8", "F64": "<f8", "F32": "<f4", "F16": "<f2"}
"""The dtypes in which tensors are stored, beside BF16, which numpy has not."""

VELOCITIES = "velocities"
"""What `replay` calls a step's result."""

Open = Callable[[], AbstractContextManager[Pipeline]]
Check = Callable[[str, str, Sequence[np.ndarray], Sequence[np.ndarray]], None]


@dataclass(frozen=True)
class Recorded:
    """One prompt with what the reference made of it; floats are fp32, tokens int64.

    `steps` are those of the generation, some or all of whose `sigmas` these are.
    `input_ids` and `attention_mask` [branches, length], `text` [branches, length, features], `prologue` by name as the first
    step's conditional pass has it, `latents` and `velocities` (guided) [sigmas, tokens, channels], `final` [1, tokens,
    channels], the latents after the last step, and `image` [height, width, 3] in 0..1, which is decoded from them.
    """

    prompt: str
    seed: int
    input_ids: np.ndarray
    attention_mask: np.ndarray
    text: np.ndarray
    prologue: Mapping[str, np.ndarray]
    sigmas: tuple[float, ...]
    latents: np.ndarray
    velocities: np.ndarray
    final: np.ndarray
    image: np.ndarray
    steps: int


@dataclass(frozen=True)
class AtOnce:
    """The velocities of `images` images made at once, at the last recorded sigma: the largest relative error of one that was
    recorded, and the largest relative difference of any from what the target makes of the same image alone."""

    images: int
    error: float
    difference: float


@dataclass(frozen=True)
class Replayed:
    """The errors of every prompt, those of several images at once where the bundle was compiled for that, and in `notes` what
    a backend could not give to be compared."""

    errors: list[StageErrors]
    notes: list[str] = field(default_factory=list)
    at_once: list[AtOnce] = field(default_factory=list)


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """|ours - reference| / |reference|, Euclidean norms over all elements, in float64."""
    difference = np.linalg.norm(ours.astype(np.float64).ravel() - reference.astype(np.float64).ravel())
    return float(difference) / max(float(np.linalg.norm(reference.astype(np.float64).ravel())), 1e-30)


def cosine(ours: np.ndarray, reference: np.ndarray) -> float:
    """Cosine of the angle between two arrays seen as vectors, in float64."""
    a, b = ours.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    return float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30)


def stage_of(tensor: str) -> str | None:
    """The stage that a tensor of an evidence file belongs to; None for a name that none has."""
    return PROLOGUE if tensor.startswith("prologue.") else STAGE_OF.get(tensor)


def digest_of(dtype: str, shape: Sequence[int], data: bytes | memoryview) -> str:
    """SHA-256 of a tensor: of its dtype as safetensors names it, its shape, and its bytes."""
    head = f"{dtype} {'x'.join(map(str, shape))}\n"
    return hashlib.sha256(head.encode() + bytes(data)).hexdigest()


def read_evidence(bundle: Bundle, evidence: Evidence) -> list[Recorded]:
    """Every recorded prompt; BundleError naming file, stage and tensor where one is not what was recorded."""
    return [_read_prompt(bundle, evidence, entry) for entry in evidence.prompts]


def tokens_fault(encoder: PromptEncoder, sampling_branches: list[str], recorded: Recorded) -> str | None:
    """How the runtime's tokens of a prompt's branches differ from the recorded ones; None if they do not."""
    ids, mask = encoder.encode(sampling_branches)
    if ids.shape != recorded.input_ids.shape or not np.array_equal(ids, recorded.input_ids):
        return f"the runtime tokenizes {recorded.prompt!r} as {ids.tolist()}, recorded is {recorded.input_ids.tolist()}"
    if not np.array_equal(mask, recorded.attention_mask):
        return f"the runtime's attention mask of {recorded.prompt!r} is not the recorded one"
    return None


def schedule_fault(schedule: str, tokens: int, steps: int, sigmas: Sequence[float]) -> str | None:
    """How recorded sigmas differ from those of the runtime's schedule; None where each is one of them."""
    ours = SCHEDULES[schedule](tokens, steps)[:-1]
    wrong = [sigma for sigma in sigmas if not any(math.isclose(sigma, one, rel_tol=1e-5) for one in ours)]
    if wrong:
        return f"the recorded sigma {wrong[0]:g} is none of the runtime's schedule {[round(one, 6) for one in ours]}"
    return None


def replay(
    open_pipeline: Open,
    recorded: Sequence[Recorded],
    size: tuple[int, int],
    guidance: float,
    on_done: Callable[[], None] = lambda: None,
    check: Check = lambda *_: None,
) -> Replayed:
    """The errors of each stage on recorded inputs of images of `size` (height, width).

    `open_pipeline` is entered once for each component and left when all prompts went through it. `on_done` is called after
    each of `parts_of` every prompt, `check` with every stage's results: (what, prompt, arrays, recorded ones).
    """
    notes: dict[str, None] = {}
    done = _Counted(on_done, check, notes)
    with open_pipeline() as pipeline:
        grid = pipeline.grid(size)
        text = [_text_error(pipeline, grid, guidance, one, done) for one in recorded]
    with open_pipeline() as pipeline:
        steps = [_transformer_errors(pipeline, grid, guidance, one, done) for one in recorded]
        batches = pipeline.bundle.manifest.sampling.compiled_batches
        at_once = [_at_once(pipeline, grid, guidance, recorded, images, done) for images in batches if images > 1]
    with open_pipeline() as pipeline:
        decoded = [_decode_error(pipeline, grid, one, done) for one in recorded]
    errors = [
        StageErrors(text_error, prologue, step_error, step_cosine, decode_error)
        for text_error, (prologue, step_error, step_cosine), decode_error in zip(text, steps, decoded, strict=True)
    ]
    return Replayed(errors, list(notes), at_once)


def parts_of(recorded: Recorded) -> int:
    """How often `replay` calls `on_done` for a prompt: for its text, its prologue, every velocity, its image."""
    return 3 + len(recorded.sigmas)


def faults_of(target: str, bounds: EvidenceTarget, prompts: Sequence[Recorded], found: Replayed) -> list[str]:
    """A sentence for every stage that is further from the recorded one than its bound."""
    faults = [
        f"target {target}: of {one.images} images made at once one has a {VELOCITY} with relative error {one.error:.4g}, at "
        f"most {bounds.bounds['step_error'].error:.4g} is expected; made alone it differs by {one.difference:.4g}"
        for one in found.at_once
        if not one.error <= bounds.bounds["step_error"].error
    ]
    for number, (recorded, errors) in enumerate(zip(prompts, found.errors, strict=True)):
        built = bounds.measured[number] if number < len(bounds.measured) else None
        for figure, stage in FIGURES.items():
            bound = bounds.bounds[figure]
            # Written as "not at most", so that a NaN is a fault.
            beyond = [
                (where, value, before)
                for where, value, before in _values(figure, recorded, errors, built)
                if value is not None and not value <= bound.error
            ]
            if not beyond:
                continue
            where, value, before = max(beyond, key=lambda one: math.inf if math.isnan(one[1]) else one[1])
            told = "" if before is None else f"; the build measured {before:.4g}"
            told += f"; {len(beyond)} of {len(recorded.sigmas)} sigmas are beyond it" if len(beyond) > 1 else ""
            faults.append(
                f"target {target}: the {stage}{where} of {recorded.prompt!r} has relative error {value:.4g}, at most "
                f"{bound.error:.4g} is expected ({bound.of}){told}"
            )
    return faults


def _values(
    figure: str, recorded: Recorded, errors: StageErrors, built: StageErrors | None
) -> list[tuple[str, float | None, float | None]]:
    """Where, the error, and what the build measured: one, or of velocities one for each sigma."""
    if figure != "step_error":
        return [("", getattr(errors, figure), getattr(built, figure) if built else None)]
    before = built.step_error if built else (None,) * len(recorded.sigmas)
    return [
        (f" at sigma {sigma:.4g}", value, old)
        for sigma, value, old in zip(recorded.sigmas, errors.step_error, before, strict=True)
    ]


@dataclass(frozen=True)
class _Counted:
    """What a replay calls as it goes on."""

    on_done: Callable[[], None]
    check: Check
    notes: dict[str, None]

    def read(self, pipeline: Pipeline, name: str, expected: np.ndarray) -> np.ndarray | None:
        """A buffer as `expected` is laid out; None, and a note, where the backend cannot give it, or not in that shape."""
        try:
            value: np.ndarray = pipeline.backend.get(name)
        except BackendError as error:
            self.notes[f"{name} is not compared: {error}"] = None
            return None
        if value.ndim == 3:
            # The runtime stacks the guidance branches, the conditional one first; a prologue is recorded of that one alone.
            value = value[: expected.shape[0]]
        if value.shape != expected.shape:
            self.notes[f"{name} is not compared: {list(value.shape)} here, {list(expected.shape)} recorded"] = None
            return None
        return value


def _text_error(
    pipeline: Pipeline, grid: tuple[int, int], guidance: float, recorded: Recorded, done: _Counted
) -> float | None:
    pipeline.begin(recorded.latents[:1], grid, guidance, (recorded.input_ids, recorded.attention_mask))
    text = done.read(pipeline, pipeline.encoded, recorded.text)
    pipeline.backend.synchronize()
    if text is not None:
        done.check("text embeddings", recorded.prompt, [text], [recorded.text])
    done.on_done()
    return None if text is None else relative_error(text, recorded.text)


def _transformer_errors(
    pipeline: Pipeline, grid: tuple[int, int], guidance: float, recorded: Recorded, done: _Counted
) -> tuple[float | None, tuple[float, ...], tuple[float, ...]]:
    """(the prologue's error, errors of the velocities, their cosines)"""
    pipeline.begin(recorded.latents[:1], grid, guidance, recorded.text)
    pipeline.backend.put("sigma", np.array(recorded.sigmas[0], dtype=np.float32))
    pipeline.backend.run(("prologue",))
    prologue = []
    for name, expected in recorded.prologue.items():
        value = done.read(pipeline, name, expected)
        if value is not None:
            done.check(f"prologue's {name}", recorded.prompt, [value], [expected])
            prologue.append(relative_error(value, expected))
    done.on_done()
    errors, cosines = [], []
    for sigma, latents, expected in zip(recorded.sigmas, recorded.latents, recorded.velocities, strict=True):
        body = pipeline.body_at(sigma, recorded.steps, grid)
        velocity = _velocity(pipeline, latents[None], recorded.text, grid, guidance, (sigma, body))
        done.check(VELOCITIES, recorded.prompt, [velocity], [expected])
        errors.append(relative_error(velocity, expected))
        cosines.append(cosine(velocity, expected))
        done.on_done()
    return max(prologue) if prologue else None, tuple(errors), tuple(cosines)


def _velocity(
    pipeline: Pipeline,
    latents: np.ndarray,
    text: np.ndarray,
    grid: tuple[int, int],
    guidance: float,
    step: tuple[float, str],
) -> np.ndarray:
    """The guided velocity at `latents`: what an Euler step of length one adds, at a sigma and through a body."""
    sigma, body = step
    pipeline.begin(latents, grid, guidance, text)
    pipeline.step(sigma, sigma + 1.0, body)
    moved: np.ndarray = pipeline.backend.get("latents") - latents
    return moved


def _at_once(
    pipeline: Pipeline,
    grid: tuple[int, int],
    guidance: float,
    recorded: Sequence[Recorded],
    images: int,
    done: _Counted,
) -> AtOnce:
    """Velocities of `images` different images: of every prompt the last recorded latents, then the ones before, and so on."""
    last = len(recorded[0].sigmas) - 1
    sigma = recorded[0].sigmas[last]
    step = sigma, pipeline.body_at(sigma, recorded[0].steps, grid)
    taken = [(recorded[n % len(recorded)], (last - n // len(recorded)) % (last + 1)) for n in range(images)]
    alone = [_velocity(pipeline, one.latents[at][None], one.text, grid, guidance, step)[0] for one, at in taken]
    latents = np.stack([one.latents[at] for one, at in taken])
    together = _velocity(pipeline, latents, np.concatenate([one.text for one, _ in taken]), grid, guidance, step)
    recorded_ones = np.stack([one.velocities[at] for one, at in taken])
    done.check(f"velocities of {images} images at once", taken[0][0].prompt, [together], [recorded_ones])
    return AtOnce(
        images,
        max(
            relative_error(ours, one.velocities[at])
            for ours, (one, at) in zip(together, taken, strict=True)
            if at == last
        ),
        max(relative_error(ours, theirs) for ours, theirs in zip(together, alone, strict=True)),
    )


def _decode_error(pipeline: Pipeline, grid: tuple[int, int], recorded: Recorded, done: _Counted) -> float:
    # A backend may need to be told the sizes, which only an image that begins does.
    pipeline.begin(recorded.final, grid, 1.0, recorded.text)
    decoded = pipeline.decode(recorded.final, grid)[0]
    done.check("decoded latents", recorded.prompt, [decoded], [recorded.image])
    done.on_done()
    return relative_error(decoded, recorded.image)


def _read_prompt(bundle: Bundle, evidence: Evidence, entry: EvidencePrompt) -> Recorded:
    path = bundle.path(entry.file)
    tensors = _read_tensors(path, entry)
    prologue = {name.removeprefix("prologue."): value for name, value in tensors.items() if stage_of(name) == PROLOGUE}
    recorded = Recorded(
        prompt=entry.prompt,
        seed=entry.seed,
        prologue=prologue,
        sigmas=tuple(float(sigma) for sigma in tensors["sigmas"].ravel()),
        steps=evidence.steps,
        **{name: tensors[name] for name in STAGE_OF if name != "sigmas"},
    )
    _check_shapes(bundle, evidence, path, recorded)
    return recorded


def _read_tensors(path: Path, entry: EvidencePrompt) -> dict[str, np.ndarray]:
    """The tensors of an evidence file, floats as fp32 (sigmas as fp64), each after its digest matched."""
    advice = "copy the bundle again from where it was built, or rebuild it"
    try:
        entries, _ = header_entries(path)
        data = path.read_bytes()
    except HeaderError as error:
        raise BundleError(f"{path}: {error}; {advice}") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}; {advice}") from error
    recorded = {name: digest for tensors in entry.stages.values() for name, digest in tensors.items()}
    for name in sorted({*entries, *recorded, *STAGE_OF}):
        stage = stage_of(name) or "no"
        if name not in entries or name not in recorded:
            where = "the file" if name not in entries else "the manifest"
            raise BundleError(f"{path}: stage {stage}: {where} lacks the tensor {name!r}; {advice}")
        found = entries[name]
        if digest_of(found.dtype, found.shape, data[found.start : found.stop]) != recorded[name]:
            raise BundleError(
                f"{path}: stage {stage}: the tensor {name!r} of {entry.prompt!r} is not the one that was recorded (its SHA-256 "
                f"is another); {advice}"
            )
    try:
        return {name: _array(found, data[found.start : found.stop]) for name, found in entries.items()}
    except (ValueError, KeyError) as error:
        raise BundleError(f"{path}: not evidence: {error}; {advice}") from error


def _array(entry: HeaderEntry, data: bytes) -> np.ndarray:
    if entry.dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(entry.shape)
    array: np.ndarray = np.frombuffer(data, np.dtype(DTYPES[entry.dtype])).reshape(entry.shape)
    return array.astype(np.float32) if entry.dtype == "F16" else array


def _check_shapes(bundle: Bundle, evidence: Evidence, path: Path, recorded: Recorded) -> None:
    """Refuse tensors that do not fit one another, or the size that the manifest says; nothing is run with such."""
    sampling = bundle.manifest.sampling
    pixels = sampling.pixels_per_token
    tokens = evidence.size[0] // pixels * (evidence.size[1] // pixels)
    rows = len(branches(sampling, recorded.prompt, evidence.guidance))
    step = (tokens, sampling.latent_channels)
    wanted = {
        "input_ids": (rows, bundle.manifest.prompting.length),
        "attention_mask": (rows, bundle.manifest.prompting.length),
        "text": (rows, bundle.manifest.prompting.length, recorded.text.shape[-1]),
        "latents": (len(evidence.sigmas), *step),
        "velocities": (len(evidence.sigmas), *step),
        "final": (1, *step),
        "image": (*evidence.size, 3),
    }
    for name, shape in wanted.items():
        if getattr(recorded, name).shape != shape:
            raise BundleError(
                f"{path}: stage {STAGE_OF[name]}: the tensor {name!r} has shape {list(getattr(recorded, name).shape)}, the "
                f"manifest asks for {list(shape)}; rebuild the bundle"
            )
    if not np.allclose(recorded.sigmas, evidence.sigmas, rtol=1e-9, atol=0):
        raise BundleError(
            f"{path}: stage {VELOCITY}: its sigmas {list(recorded.sigmas)} are not the manifest's {list(evidence.sigmas)}; "
            "rebuild the bundle"
        )
