"""Which of a bundle's targets this machine can run, and which of them is best; what is chosen is said, with the reasons."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fluxrt.backends.registry import find_kind
from fluxrt.errors import BackendError, RequestError
from fluxrt.install import update
from fluxrt.machine import Machine, this_machine

if TYPE_CHECKING:
    from fluxrt.bundle import Bundle
    from fluxrt.manifest import Target

__all__ = ["GPU", "Machine", "choose", "obstacle", "pick", "this_machine"]

LOG = logging.getLogger("fluxrt")
GPU = "gpu"
"""What `require` calls any target that generates on a GPU."""


def obstacle(bundle: Bundle, target: Target, machine: Machine) -> str | None:
    """Why `target` does not run on `machine`, in one sentence or two; None if it does."""
    kind = find_kind(target)
    if kind is None:
        return f"this fluxrt cannot run targets of kind {target.kind!r}; {update('fluxrt')}"
    return kind.obstacle(bundle, target, machine)


def choose(bundle: Bundle, machine: Machine | None = None, gpus: int = 1) -> tuple[Target, dict[str, str | None]]:
    """The best target for `gpus` GPUs that `machine` (this one by default) runs, and by target what stands in its way.

    Of equally good targets the first listed is taken. Raises BackendError naming every obstacle when none runs, and
    RequestError when the bundle has no target for so many.
    """
    return _best(bundle, _targets_for(bundle, gpus), machine)


def pick(
    bundle: Bundle,
    target: str | None = None,
    gpus: int | None = None,
    require: str | None = None,
    machine: Machine | None = None,
) -> Target:
    """The target to generate with: the one called `target`, else the best for `gpus` (one by default) that `machine` runs.

    `require` is the name of the only target that will do, or "gpu" for any on a GPU. What is picked is logged, and why each
    better target does not run: as a warning where the machine has a GPU, or else as information. Raises RequestError for what
    the bundle does not have, BackendError for what it has and this machine does not run.
    """
    if target is not None and require not in (None, GPU, target):
        raise RequestError(f"target {target!r} is asked for and target {require!r} required; give one of them")
    named = target if require in (None, GPU) else require
    if named is not None:
        picked = bundle.target(named)
        if require == GPU and picked.device == "cpu":
            raise RequestError(f"a GPU is required, and target {named!r} generates on the CPU; leave one of them out")
        reason = obstacle(bundle, picked, machine or _machine_for([picked])) if require else None
        if reason:
            raise BackendError(f"target {named!r} is required and does not run here: {reason}")
    else:
        picked = _pick_best(bundle, gpus or 1, machine, require == GPU)
    LOG.info(
        "target %s: %s on %s",
        picked.name,
        picked.kind,
        _place(picked, gpus or picked.gpus),
        extra={"fields": {"target": picked.name, "kind": picked.kind, "device": picked.device}},
    )
    return picked


def _best(
    bundle: Bundle, targets: list[Target], machine: Machine | None, which: str = "no target of this bundle"
) -> tuple[Target, dict[str, str | None]]:
    """The best of `targets` that runs, and what stands in the way of each; BackendError where none does."""
    found = machine or _machine_for(targets)
    obstacles = {target.name: obstacle(bundle, target, found) for target in targets}
    able = [target for target in targets if obstacles[target.name] is None]
    if not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in obstacles.items())
        raise BackendError(f"{bundle.root}: {which} runs on this machine. {reasons}")
    return max(able, key=_preference), obstacles


def _pick_best(bundle: Bundle, gpus: int, machine: Machine | None, on_gpu: bool) -> Target:
    """The best target, or the best of those on a GPU; says what was passed over."""
    targets = [target for target in _targets_for(bundle, gpus) if target.device != "cpu" or not on_gpu]
    if not targets:
        known = ", ".join(target.name for target in bundle.manifest.targets)
        raise RequestError(
            f"{bundle.root}: a GPU is required, and no target of this bundle is for one; it has {known}. Add a target for a "
            "GPU to the recipe and rebuild"
        )
    found = machine or _machine_for(targets)
    which = "a GPU is required, and no target for one" if on_gpu else "no target of this bundle"
    picked, obstacles = _best(bundle, targets, found, which)
    level = logging.INFO if found.gpu is None and found.driver is None else logging.WARNING
    for other in sorted(targets, key=_preference, reverse=True):
        reason = obstacles[other.name]
        if reason and (_preference(other) > _preference(picked) or find_kind(other) is None):
            fields = {"passed_over": other.name, "reason": reason}
            LOG.log(level, "better target %s does not run here: %s", other.name, reason, extra={"fields": fields})
    _say_of_more_gpus(bundle, gpus, found)
    return picked


def _say_of_more_gpus(bundle: Bundle, gpus: int, machine: Machine) -> None:
    """Tell of targets for more GPUs, where the machine has them."""
    more = [
        target
        for target in bundle.manifest.targets
        if target.device != "cpu" and machine.gpu is not None and gpus < target.gpus <= machine.gpus
    ]
    for target in more:
        LOG.info("target %s would use %d of this machine's GPUs; ask for it with --gpus", target.name, target.gpus)


def _targets_for(bundle: Bundle, gpus: int) -> list[Target]:
    targets = [target for target in bundle.manifest.targets if target.runs_on(gpus)]
    if not targets:
        known = ", ".join(f"{target.name} for {target.gpus}" for target in bundle.manifest.targets)
        raise RequestError(
            f"{bundle.root}: no target of this bundle is for {gpus} GPUs; it has {known}. Ask for one of these with --gpus, or "
            f"add `gpus: {gpus}` to a target of the recipe and rebuild"
        )
    return targets


def _place(target: Target, ranks: int) -> str:
    if target.device == "cpu":
        how = f", in {target.computed_in}" if target.computed_in else ""
        return f"the CPU{how}" if ranks == 1 else f"the CPU, in {ranks} processes{how}"
    return ("the NPU" if target.device == "npu" else "the GPU") if ranks == 1 else f"{ranks} GPUs"


def _machine_for(targets: list[Target]) -> Machine:
    """This machine; without a look at its GPUs where no target needs one."""
    return Machine(None) if all(target.device == "cpu" for target in targets) else this_machine()


def _preference(target: Target) -> int:
    kind = find_kind(target)
    return kind.preference if kind else -1
