"""`fluxc finish`: builds the plans that need the GPU they run on, audits them, and seals the bundle again.

Which of two forms of FP4 weights this TensorRT multiplies is found out first, on one block (weight_forms.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import onnx

from fluxc.base.errors import BuildError
from fluxc.base.output import check_writable, names_place
from fluxc.base.progress import Report, StageProgress
from fluxc.recipe.targets import TARGETS, TensorRTTarget
from fluxc.targets.tensorrt.audit import Expected
from fluxc.targets.tensorrt.build import build_audited, check_audits, plan_file
from fluxc.targets.tensorrt.builder import PlanRequest
from fluxc.targets.tensorrt.library import load_library
from fluxc.targets.tensorrt.trial import OpenDriver, Place, try_forms
from fluxc.targets.tensorrt.weight_forms import Baked, bake, with_weights_inside
from fluxrt import manifest as format
from fluxrt.bundle import Bundle, open_bundle, sha256_file, verify_files
from fluxrt.cuda import CudaDriver, Gpu, first_gpu
from fluxrt.weights import component_weights

FindGpu = Callable[[], Gpu]


def unfinished(path: Path, target: str | None = None) -> list[str]:
    """The names of targets with plans that are still to be built: `target` alone, or any of the bundle at `path`."""
    bundle = open_bundle(path)
    names = [bundle.target(target).name] if target is not None else [t.name for t in bundle.manifest.targets]
    entries = [t for t in bundle.manifest.targets if isinstance(t, format.TensorRTTarget) and t.name in names]
    return [entry.name for entry in entries if entry.engine.unfinished]


def finish_bundle(
    path: Path,
    target: str | None = None,
    find_gpu: FindGpu = first_gpu,
    open_driver: OpenDriver = CudaDriver,
    progress: StageProgress | None = None,
) -> Iterator[str]:
    """Build what is left of `target`, or of every target; yields a line for each plan and one at the end.

    `open_driver` opens the GPU to time a block on it; where it cannot, nothing is timed and the line says why. The bundle is
    verified first and changes only when all plans are built and audited: plans appear by rename, the manifest last, with the
    library's version, the GPU and its driver. Raises BuildError and the errors of the runtime.
    """
    progress = progress or StageProgress()
    bundle = open_bundle(path)
    names = unfinished(path, target)
    with progress.stage("check the files' SHA-256"):
        verify_files(bundle)
    left = [t for t in bundle.manifest.targets if isinstance(t, format.TensorRTTarget) and t.name in names]
    if not left:
        yield f"{path}: nothing is left to build"
        return
    check_writable(path)
    check_writable(path.resolve().parent)
    gpu = find_gpu()
    finished = []
    with ExitStack() as stack:
        stack.enter_context(names_place("finish", path))
        # Beside the bundle, so that a rename suffices, and not in it, where a foreign file would be one error more.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".finish-", dir=path.resolve().parent)))
        for entry in left:
            with progress.stage(f"build {entry.name}") as report:
                engine, lines = _build(bundle, entry, gpu, scratch, open_driver, report)
            finished.append(msgspec.structs.replace(entry, engine=engine))
            yield from lines
        _seal(bundle, finished, scratch)
    yield f"{path}: finished for {gpu.name} (compute capability {gpu.compute_capability}, driver {gpu.driver})"


def _build(
    bundle: Bundle, target: format.TensorRTTarget, gpu: Gpu, scratch: Path, open_driver: OpenDriver, report: Report
) -> tuple[format.Engine, list[str]]:
    engine = target.engine
    if gpu.compute_capability not in engine.compute_capabilities:
        raise BuildError(
            f"{bundle.root}: target {target.name} is for compute capability {', '.join(engine.compute_capabilities)}, this "
            f"machine has {gpu.name} with {gpu.compute_capability}; finish it on the GPU that will serve it, or name this one "
            "under the target's compute_capabilities and build again"
        )
    module = load_library(target.kind)
    lines: list[str] = []
    inside: dict[str, Baked] = {}
    tried = try_forms(bundle, target, Place(module, gpu, open_driver, scratch))
    if tried is not None:
        lines.append(f"target {target.name}: {tried[1].why}")
        if tried[1].form == "inside":
            engine, inside = with_weights_inside(engine, target.name)
    plans, audits = dict(engine.plans), {}
    for number, name in enumerate(engine.unfinished):
        report(number, len(engine.unfinished), f"plan {name}, {number} of {len(engine.unfinished)} are built")
        plan = engine.plans[name]
        if name in inside:
            request = _with_weights(bundle, name, plan, inside[name], gpu, scratch)
        else:
            request = _request(bundle, name, plan, gpu)
        file = plan_file(target.name, name)
        audits[name] = build_audited(module, request, msgspec.convert(plan.expected, Expected), scratch / file)
        plans[name] = msgspec.structs.replace(plan, file=file)
        nbytes = (scratch / file).stat().st_size
        lines.append(f"target {target.name}: {name}, {nbytes:,} bytes, {audits[name].kernels} kernels")
    check_audits(_allowing(bundle, target), audits)
    found = {name: audit.as_json() for name, audit in audits.items()}
    if tried is not None:
        name, choice = tried
        found[name if name in found else f"{name}.0"]["weights"] = choice.why
    finished = msgspec.structs.replace(
        engine,
        version=str(module.__version__),
        compute_capabilities=(gpu.compute_capability,),
        plans=plans,
        gpu=gpu.name,
        driver=gpu.driver,
        audit={**engine.audit, **found},
    )
    return finished, lines


def _request(bundle: Bundle, name: str, plan: format.Plan, gpu: Gpu) -> PlanRequest:
    source = bundle.checked_file(plan.source)
    model = onnx.load(source, load_external_data=False)
    baked = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)
    return PlanRequest(name, model, (gpu.compute_capability,), plan.profiles, source if baked else None)


def _with_weights(bundle: Bundle, name: str, plan: format.Plan, made: Baked, gpu: Gpu, scratch: Path) -> PlanRequest:
    """Of a plan that gets its weights inside; its graph is written to its place, whose weights lie in the bundle's files."""
    model = onnx.load(bundle.checked_file(made.plan.source))
    stored = component_weights(bundle, made.weights)
    source = scratch / plan.source
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_bytes(bake(model, made, stored, inline=False).SerializeToString(deterministic=True))
    return PlanRequest(name, bake(model, made, stored), (gpu.compute_capability,), plan.profiles)


def _allowing(bundle: Bundle, target: format.TensorRTTarget) -> TensorRTTarget:
    """The recipe's own entry of `target`, as the manifest keeps it, with what it allows."""
    entries = [entry for entry in bundle.manifest.recipe["targets"] if entry["kind"] == target.kind]
    options = TARGETS[target.kind]
    targets = (msgspec.convert(entry, options) for entry in entries)
    return next(found for found in targets if isinstance(found, TensorRTTarget) and found.name == target.name)


def _seal(bundle: Bundle, finished: list[format.TensorRTTarget], scratch: Path) -> None:
    """Put the plans into the bundle and, last, a manifest that names them."""
    files = dict(bundle.manifest.files)
    for path in sorted(p for p in scratch.rglob("*") if p.is_file()):
        name = path.relative_to(scratch).as_posix()
        files[name] = format.File(path.stat().st_size, sha256_file(path))
    by_name = {target.name: target for target in finished}
    targets = tuple(by_name.get(target.name, target) for target in bundle.manifest.targets)
    manifest = msgspec.structs.replace(bundle.manifest, targets=targets, files=files)
    sealed = scratch / format.MANIFEST
    for name in set(files) - set(bundle.manifest.files):
        (bundle.root / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).replace(bundle.root / name)
    sealed.write_bytes(format.encode_manifest(manifest))
    sealed.replace(bundle.root / format.MANIFEST)
