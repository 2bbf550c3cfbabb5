"""One block in both forms of its weights: built, audited and, where the GPU can be opened, timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import msgspec
import onnx

from fluxc.base.errors import BuildError
from fluxc.targets.findings import Finding
from fluxc.targets.tensorrt.audit import Audit, Expected
from fluxc.targets.tensorrt.build import build_audited
from fluxc.targets.tensorrt.builder import PlanRequest
from fluxc.targets.tensorrt.timing import LooseFiles, time_program
from fluxc.targets.tensorrt.weight_forms import Baked, Choice, Tried, bake, block_to_try, choose, expected_inside
from fluxrt.bundle import Bundle
from fluxrt.cuda import Driver, Gpu
from fluxrt.errors import BackendError
from fluxrt.manifest import Call, Engine, Plan, Program, TensorRTTarget
from fluxrt.sharding import sizes_of
from fluxrt.weights import component_weights

OpenDriver = Callable[[], Driver]
FILE = "trial.plan"


@dataclass(frozen=True)
class Place:
    """Where a block is tried: the library, the GPU and how it is opened, and a folder for the plans, which are left there."""

    module: ModuleType
    gpu: Gpu
    open_driver: OpenDriver
    folder: Path


def try_forms(bundle: Bundle, target: TensorRTTarget, place: Place) -> tuple[str, Choice] | None:
    """The plan that was tried and the form to keep; None where no plan takes FP4 weights, and nothing is tried."""
    found = block_to_try(target.engine)
    if found is None:
        return None
    name, made = found
    model = onnx.load(bundle.checked_file(made.plan.source))
    inside = bake(model, made, component_weights(bundle, made.weights))
    expected = msgspec.convert(made.plan.expected, Expected)
    plans = {
        "inputs": (made.plan, model, expected, made.prefix),
        "inside": (msgspec.structs.replace(made.plan, weights=()), inside, expected_inside(made.plan), ""),
    }
    tried, untimed = {}, ""
    for form, (plan, graph, wanted, prefix) in plans.items():
        request = PlanRequest(name, graph, (place.gpu.compute_capability,), plan.profiles)
        audit = _audited(place, request, wanted)
        seconds = None
        if not untimed and (place.folder / FILE).is_file():
            try:
                seconds = _timed(bundle, target, place, name, plan, replace(made, prefix=prefix))
            except BackendError as error:
                untimed = f"; not timed: {error}"
        (place.folder / FILE).unlink(missing_ok=True)
        tried[form] = Tried(audit, seconds)
    choice = choose(name, tried["inputs"], tried["inside"])
    return name, replace(choice, why=choice.why + untimed)


def _audited(place: Place, request: PlanRequest, expected: Expected) -> Audit:
    """The audit of one form; one that TensorRT does not build at all is one whose GEMMs are missing."""
    try:
        return build_audited(place.module, request, expected, place.folder / FILE)
    except BuildError as error:
        fault = Finding("missing", tuple(expected.gemms)[:1], str(error))
        return Audit({}, 0, 0, 0.0, 0, request.compute_capabilities, (fault,))


def _timed(bundle: Bundle, target: TensorRTTarget, place: Place, name: str, plan: Plan, made: Baked) -> float:
    """Seconds a run of the plan in FILE, at the bundle's first size with as many branches as guidance takes."""
    sampling = bundle.manifest.sampling
    height, width = (side // sampling.pixels_per_token for side in sampling.sizes[0])
    sizes = sizes_of(2 if sampling.cfg_batch else 1, (height, width))
    block = Program(made.weights, (Call(name, made.prefix),), tuple(port.name for port in plan.outputs))
    engine = Engine(
        library=target.engine.library,
        version=str(place.module.__version__),
        compute_capabilities=(place.gpu.compute_capability,),
        plans={name: msgspec.structs.replace(plan, file=FILE)},
        programs={"block": block},
    )
    loose = LooseFiles(place.folder, {FILE: place.folder / FILE}, bundle)
    alone = msgspec.structs.replace(target, engine=engine)
    return time_program(loose, alone, "block", sizes, place.open_driver(), place.module)
