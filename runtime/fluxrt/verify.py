"""Verifies a bundle: every file's SHA-256, then its evidence, replayed on each target that runs here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import msgspec

from fluxrt.backends.registry import find_kind
from fluxrt.bundle import Bundle
from fluxrt.choose import obstacle
from fluxrt.errors import BackendError, BundleError, VerifyError
from fluxrt.evidence import (
    DECODER,
    FIGURES,
    PROLOGUE,
    TEXT,
    TOKENS,
    VELOCITY,
    AtOnce,
    Open,
    Recorded,
    Replayed,
    faults_of,
    parts_of,
    read_evidence,
    replay,
    schedule_fault,
    tokens_fault,
)
from fluxrt.machine import Machine, this_machine
from fluxrt.manifest import Evidence, StageErrors, Target
from fluxrt.pipeline import Pipeline
from fluxrt.prompt import load_encoder
from fluxrt.resolve import branches

NO_EVIDENCE = (
    "this bundle has no evidence (it was built with `fidelity: {level: none}`, or by an older fluxc), so nothing that it "
    "computes was compared"
)


@dataclass(frozen=True)
class StageChecked:
    """One stage of one prompt: relative error and, of velocities, cosine, here and where the bundle was built, and the bound.

    `sigma` is that of a velocity. `error` is None where the backend does not give the stage's results, or they are not finite;
    `at_build` where the target did not run there.
    """

    stage: str
    sigma: float | None
    error: float | None
    cosine: float | None
    at_build: float | None
    cosine_at_build: float | None
    bound: float
    of: str


@dataclass(frozen=True)
class PromptChecked:
    """Every stage of one recorded prompt."""

    prompt: str
    seed: int
    stages: tuple[StageChecked, ...]


@dataclass(frozen=True)
class TargetChecked:
    """Evidence replayed on a target, or `why` it was not, or what is wrong; `notes` say what could not be compared."""

    target: str
    status: Literal["passed", "failed", "not run"]
    why: str = ""
    prompts: tuple[PromptChecked, ...] = ()
    notes: tuple[str, ...] = ()
    at_once: tuple[AtOnce, ...] = ()

    @property
    def line(self) -> str:
        """The result in a line: of each stage the largest error of any prompt."""
        return self.why or f"evidence replayed: {', '.join(worst_of(self.prompts))}"

    def as_json(self) -> dict[str, Any]:
        """The fields of `fluxrt verify --json`."""
        plain = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def verify_evidence(
    bundle: Bundle,
    target: str | None = None,
    threads: int | None = None,
    *,
    machine: Machine | None = None,
    on_part: Callable[[str, int, int], None] = lambda *_: None,
) -> Iterator[TargetChecked]:
    """Replay the evidence of `bundle` on `target`, or on every target; those that do not run on `machine` say why.

    `on_part(target, done, total)` is called as a replay goes on. Raises BundleError for evidence that is not as recorded, and
    where there is none yields nothing.
    """
    evidence = bundle.manifest.recorded
    if evidence is None:
        return
    recorded = read_evidence(bundle, evidence)
    entries = [entry for entry in bundle.manifest.targets if target in (None, entry.name)]
    found = machine or (Machine(None) if all(entry.device == "cpu" for entry in entries) else this_machine())
    for entry in entries:
        why = why_not_replayed(bundle, entry, found)
        if why:
            yield TargetChecked(entry.name, "not run", why)
            continue

        def open_pipeline(entry: Target = entry) -> AbstractContextManager[Pipeline]:
            return Pipeline(bundle, target=entry.name, threads=threads)

        yield check_target(bundle, evidence, entry, recorded, open_pipeline, on_part)


def why_not_replayed(bundle: Bundle, target: Target, machine: Machine) -> str | None:
    """Why evidence is not replayed on `target`, in a sentence; None where it is."""
    reason = obstacle(bundle, target, machine)
    if reason:
        return f"does not run here: {reason}"
    kind = find_kind(target)
    if kind is None or kind.backend is None:
        return f"kind {target.kind} runs whole images only, so no stage of it is compared"
    if target.gpus > 1:
        return f"its {target.gpus} processes hold each image in shards, so no stage of it is compared; generate with it"
    return None


def check_target(
    bundle: Bundle,
    evidence: Evidence,
    target: Target,
    recorded: list[Recorded],
    open_pipeline: Open,
    on_part: Callable[[str, int, int], None] = lambda *_: None,
) -> TargetChecked:
    """The evidence `recorded` held against `target`, in the pipelines that `open_pipeline` opens."""
    limits = evidence.targets.get(target.name)
    if limits is None or not set(FIGURES) <= set(limits.bounds):
        raise BundleError(f"{bundle.root}: the evidence has no bounds for target {target.name!r}; rebuild the bundle")
    faults = [f"target {target.name}: {TOKENS}: {fault}" for fault in _input_faults(bundle, evidence, recorded)]
    if faults:
        return TargetChecked(target.name, "failed", "; ".join(faults))
    done, total = 0, sum(parts_of(one) for one in recorded)

    def on_done() -> None:
        nonlocal done
        done += 1
        on_part(target.name, done, total)

    on_part(target.name, 0, total)
    try:
        found = replay(open_pipeline, recorded, evidence.size, evidence.guidance, on_done)
    except BackendError as error:
        return TargetChecked(target.name, "failed", f"target {target.name}: {error}")
    faults = faults_of(target.name, limits, recorded, found)
    prompts = tuple(_checked(evidence, target.name, recorded, number, found) for number in range(len(recorded)))
    status: Literal["passed", "failed"] = "failed" if faults else "passed"
    return TargetChecked(target.name, status, "; ".join(faults), prompts, tuple(found.notes), tuple(found.at_once))


def check_passed(bundle: Bundle, found: list[TargetChecked], asked: str | None) -> None:
    """Raise VerifyError where a target failed, or the one that was asked for, or every one, was not run."""
    failed = [one.why for one in found if one.status == "failed"]
    if failed:
        raise VerifyError(
            f"{bundle.root}: {'; '.join(failed)}; do not serve with it: check the runtime's version against "
            "provenance.tools, copy the bundle again, or rebuild it"
        )
    if found and all(one.status == "not run" for one in found):
        which = "it was asked for" if asked else "no target of this bundle was replayed"
        raise VerifyError(f"{bundle.root}: {which}: {'; '.join(f'target {one.target} {one.why}' for one in found)}")


def lines_of(found: TargetChecked) -> Iterator[str]:
    """A replay in words: a table for each prompt, then what could not be compared."""
    yield f"target {found.target}: {found.status}{f': {found.why}' if found.status == 'not run' else ''}"
    for prompt in found.prompts:
        yield f"  {prompt.prompt!r}, seed {prompt.seed}: relative errors against the recorded results"
        yield f"    {'stage':28}{'here':>11}{'at build':>11}{'at most':>11}   cosine here, at build"
        for one in prompt.stages:
            stage = one.stage if one.sigma is None else f"{one.stage} at sigma {one.sigma:.4g}"
            figures = "".join(f"{_shown(value):>11}" for value in (one.error, one.at_build, one.bound))
            cosines = "" if one.sigma is None else f"   {_shown(one.cosine, 6)}, {_shown(one.cosine_at_build, 6)}"
            yield f"    {stage:28}{figures}{cosines}"
    for batch in found.at_once:
        yield f"  {batch.images} images at once: velocity error {_shown(batch.error)}, {_shown(batch.difference)} from alone"
    for note in found.notes:
        yield f"  {note}"


def _shown(value: float | None, digits: int = 3) -> str:
    return "none" if value is None else f"{value:.{digits}g}"


def worst_of(prompts: tuple[PromptChecked, ...]) -> list[str]:
    """By stage, the largest error of any prompt and sigma, in words."""
    words = []
    for stage in (TEXT, PROLOGUE, VELOCITY, DECODER):
        found = [one for prompt in prompts for one in prompt.stages if one.stage == stage]
        errors = [one.error for one in found if one.error is not None]
        cosines = [one.cosine for one in found if one.cosine is not None]
        cosine = f" (cosine {min(cosines):.6g})" if cosines else ""
        words.append(f"{stage} {max(errors):.3g}{cosine}" if errors else f"{stage} not compared")
    return words


def measured_of(found: TargetChecked) -> tuple[StageErrors, ...]:
    """What a replay measured, as a manifest has it."""
    rows = []
    for prompt in found.prompts:
        by_stage = {stage: [one for one in prompt.stages if one.stage == stage] for stage in FIGURES.values()}
        single = {figure: by_stage[stage][0].error for figure, stage in FIGURES.items() if figure != "step_error"}
        velocity = by_stage[VELOCITY]
        rows.append(
            msgspec.convert(
                single
                | {"step_error": [one.error for one in velocity], "step_cosine": [one.cosine for one in velocity]},
                StageErrors,
            )
        )
    return tuple(rows)


def _input_faults(bundle: Bundle, evidence: Evidence, recorded: list[Recorded]) -> Iterator[str]:
    """What the runtime would give the target otherwise than it is recorded: tokens and sigmas."""
    sampling, encoder = bundle.manifest.sampling, load_encoder(bundle)
    for one in recorded:
        fault = tokens_fault(encoder, branches(sampling, one.prompt, evidence.guidance), one)
        if fault:
            yield fault
    tokens = recorded[0].latents.shape[1] if recorded else 0
    fault = schedule_fault(sampling.schedule, tokens, evidence.steps, evidence.sigmas)
    if fault:
        yield fault


def _checked(evidence: Evidence, target: str, recorded: list[Recorded], number: int, found: Replayed) -> PromptChecked:
    limits, errors = evidence.targets[target], found.errors[number]
    built = limits.measured[number] if number < len(limits.measured) else None
    stages = []
    for figure, stage in FIGURES.items():
        bound = limits.bounds[figure]
        if figure == "step_error":
            empty = (None,) * len(evidence.sigmas)
            before = (built.step_error, built.step_cosine) if built else (empty, empty)
            rows = zip(evidence.sigmas, errors.step_error, errors.step_cosine, *before, strict=True)
            stages += [
                StageChecked(stage, sigma, _known(error), _known(cosine), old, old_cosine, bound.error, bound.of)
                for sigma, error, cosine, old, old_cosine in rows
            ]
        else:
            before_one = getattr(built, figure) if built else None
            error = _known(getattr(errors, figure))
            stages.append(StageChecked(stage, None, error, None, before_one, None, bound.error, bound.of))
    return PromptChecked(recorded[number].prompt, recorded[number].seed, tuple(stages))


def _known(value: float | None) -> float | None:
    """`value` with six digits; None for what is not finite, which no file of a bundle holds."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
