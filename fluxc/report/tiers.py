"""How far each target was taken, and in words what was not run."""

from __future__ import annotations

from collections.abc import Mapping

from fluxc.report.structs import Reached, Tiers, Verdict
from fluxrt.manifest import OnTarget, Target, TensorRTTarget

MATCHED, FAILED = "matched on the target", "failed on the target"


UNCOMPARED = {
    "none": "NOTHING WAS COMPARED with the original model: fidelity.level is none. Whether this bundle's images are right was "
    "not looked at, and it carries no evidence that could be replayed.",
    "stages": "No image was generated: text encoder, prologue, velocity and decoder were compared, each by itself.",
}
"""By level of comparison, what it does not show."""


def tiers_of(targets: tuple[Target, ...], ran: Mapping[str, bool], entries: tuple[OnTarget, ...]) -> tuple[Tiers, ...]:
    """The tiers of every target; `ran` says of those that ran where the bundle was built whether every stage matched."""
    return tuple(_tiers(target, ran, entries) for target in targets)


def stages_matched(verdict: Verdict, targets: Mapping[str, object], ranks: Mapping[str, object]) -> dict[str, bool]:
    """By target that ran, whether every stage is as near to the reference as rounding explains; sharded ones match, or there
    would be no report."""
    missed = {gate.about.split(",")[0] for gate in verdict.gates if gate.name == "rounding" and not gate.passed}
    return {name: f"target {name}" not in missed for name in targets} | dict.fromkeys(ranks, True)


def never_run(tiers: tuple[Tiers, ...], entries: tuple[OnTarget, ...], level: str) -> tuple[str, ...]:
    """What the figures of this bundle do not show, plainly: what was not compared, then of GPUs, then by target."""
    lines = [UNCOMPARED[level]] if level in UNCOMPARED else []
    if not entries:
        lines.append(
            "Nothing of this bundle has run on a GPU. No time on a GPU was measured; those shown are predicted."
        )
    lines += [f"{found.target}: {found.missing}" for found in tiers if found.missing]
    return tuple(lines)


def _tiers(target: Target, ran: Mapping[str, bool], entries: tuple[OnTarget, ...]) -> Tiers:
    on_target = [entry.tiers[target.name] for entry in entries if target.name in entry.tiers]
    on_cpu = target.device == "cpu"
    here = target.name in ran
    return Tiers(
        target=target.name,
        kind=target.kind,
        device=target.device,
        built=_built(target),
        audited=_audited(target),
        ran="yes" if here else "no",
        matched=_yes(ran.get(target.name, False) or MATCHED in on_target),
        on_target=_yes(here) if on_cpu else _on_target(on_target),
        missing="" if here and on_cpu else _missing(target, here, on_target),
    )


def _built(target: Target) -> Reached:
    if not isinstance(target, TensorRTTarget):
        return "yes"
    unfinished = len(target.engine.unfinished)
    return "yes" if not unfinished else "no" if unfinished == len(target.engine.plans) else "partly"


def _audited(target: Target) -> Reached:
    if not isinstance(target, TensorRTTarget):
        return "does not apply" if target.audited is None else _yes(target.audited)
    audited = [name for name in target.engine.plans if target.engine.audit.get(name)]
    return "yes" if len(audited) == len(target.engine.plans) else "partly" if audited else "no"


def _on_target(tiers: list[str]) -> Reached:
    """Whether it ran on a GPU: "partly" where its images were not as expected."""
    if not tiers:
        return "no"
    return "partly" if all(tier == FAILED for tier in tiers) else "yes"


def _missing(target: Target, here: bool, on_target: list[str]) -> str:
    """What was not done with a target, in a sentence; empty where there is nothing to say."""
    if any(tier == MATCHED for tier in on_target):
        return ""
    if on_target:
        failed = all(tier == FAILED for tier in on_target)
        return (
            "its images were wrong on every GPU that was tried" if failed else "its stages were not compared on a GPU"
        )
    if target.device == "cpu":
        return "did not run where the bundle was built"
    if isinstance(target, TensorRTTarget) and target.engine.unfinished:
        return "its engines are not built yet; `fluxc finish` builds them on the GPU they are for"
    if isinstance(target, TensorRTTarget):
        return "built and audited, but no GPU has run it"
    return "ran on the CPU alone, on no GPU" if here else "written, but no GPU has run it"


def _yes(found: bool) -> Reached:
    return "yes" if found else "no"
