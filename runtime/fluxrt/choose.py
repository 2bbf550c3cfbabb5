"""Which of a bundle's targets this machine can run, and which of them is best."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxrt.backends.registry import find_kind
from fluxrt.errors import BackendError, RequestError
from fluxrt.install import update
from fluxrt.machine import Machine, this_machine

if TYPE_CHECKING:
    from fluxrt.bundle import Bundle
    from fluxrt.manifest import Target

__all__ = ["Machine", "choose", "obstacle", "this_machine"]


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
    targets = [target for target in bundle.manifest.targets if target.runs_on(gpus)]
    if not targets:
        known = ", ".join(f"{target.name} for {target.gpus}" for target in bundle.manifest.targets)
        raise RequestError(
            f"{bundle.root}: no target of this bundle is for {gpus} GPUs; it has {known}. Ask for one of these with --gpus, or "
            f"add `gpus: {gpus}` to a target of the recipe and rebuild"
        )
    if machine is None and all(target.device == "cpu" for target in targets):
        machine = Machine(None)
    found = machine or this_machine()
    obstacles = {target.name: obstacle(bundle, target, found) for target in targets}
    able = [target for target in targets if obstacles[target.name] is None]
    if not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in obstacles.items())
        raise BackendError(f"{bundle.root}: no target of this bundle runs on this machine. {reasons}")
    return max(able, key=_preference), obstacles


def _preference(target: Target) -> int:
    kind = find_kind(target)
    return kind.preference if kind else -1
