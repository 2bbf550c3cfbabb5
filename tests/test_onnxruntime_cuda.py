"""ONNX Runtime on CUDA: its graphs through ONNX's reference evaluator, its backend on the provider there is.

No GPU ran any of this. MatMulBlockQuantizedFp4Weight is written out from the operator's schema (fluxc/rehearsal).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from conftest import compile_into
from fluxc.base.errors import BuildError, RecipeError
from fluxc.fidelity.metrics import cosine, psnr, relative_error
from fluxc.gpu_check import images
from fluxc.gpu_check.checks import bounds_of, checks_for
from fluxc.gpu_check.machine import look
from fluxc.gpu_check.memory import check_memory
from fluxc.gpu_check.speed import check_steps
from fluxc.gpu_check.stages import check_stages
from fluxc.gpu_check.subject import REHEARSED, Subject, recorded_images
from fluxc.recipe.load import load_recipe
from fluxc.rehearsal.onnxruntime import OPERATORS
from fluxc.rehearsal.place import MadeUpPlace
from fluxc.targets.onnxruntime.build import check_loads
from fluxc.targets.onnxruntime.cuda_kernels import check_kernels
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend
from fluxrt.backends.onnxruntime_cuda import PROVIDER, OnnxRuntimeCudaBackend
from fluxrt.backends.registry import make_backend
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.cuda import Gpu
from fluxrt.errors import BackendError
from fluxrt.pipeline import Pipeline
from fluxrt.request import Request
from fluxrt.schedule import flow_match_sigmas
from quick import QUICK

PROMPT = "a small white ring at the top on a red background"
CUDA = "onnxruntime-cuda"
HALF = "onnxruntime-cuda-float16"


@pytest.fixture(scope="module")
def bundle(workshop: Path) -> Bundle:
    fp8 = 'precision.transformer.rules=[{match: "*.ff_context.*", format: fp8}]'
    targets = (
        "targets=[{kind: onnxruntime, compute: exact}, {kind: onnxruntime, device: cuda}, "
        "{kind: onnxruntime, device: cuda, dtype: float16}]"
    )
    return open_bundle(compile_into(workshop / "cuda", *QUICK, fp8, targets))


def evaluators(bundle: Bundle, target: str) -> dict[str, ReferenceEvaluator]:
    return {
        name: ReferenceEvaluator(onnx.load(bundle.path(graph.file)), new_ops=OPERATORS)
        for name, graph in bundle.target(target).graphs.items()
    }


@pytest.mark.parametrize(("target", "bound"), [(CUDA, 3e-2), (HALF, 5e-3)])
def test_the_graphs_compute_what_the_cpu_target_computes(bundle: Bundle, target: str, bound: float) -> None:
    """Weights in NVFP4 and FP8, activations in 16 bits: every stage on the same input, within that type's rounding."""
    cpu, graphs = Pipeline(bundle, target="onnxruntime-exact"), evaluators(bundle, target)
    dtype = np.float16 if target == HALF else ml_dtypes.bfloat16
    grid, guidance = cpu.grid(None), 1.5
    ids, mask = cpu.tokenize([PROMPT, ""])
    text = cpu.encode_text(PROMPT, guidance)
    (encoded,) = graphs["text_encoder"].run(None, {"input_ids": ids, "attention_mask": mask})
    assert encoded.dtype == dtype
    assert relative_error(encoded.astype(np.float32), text) < bound
    latents = np.random.default_rng(0).standard_normal((1, grid[0] * grid[1], 32)).astype(np.float32)
    for sigma, next_sigma in itertools.pairwise(flow_match_sigmas(64, 4)):
        cpu.begin(latents, grid, guidance, text)
        cpu.step(sigma, next_sigma)
        state = {
            "latents": latents,
            "text": text.astype(dtype),
            "columns": np.array(grid[1]),
            "guidance": np.array(guidance, np.float32),
            "sigma": np.array(sigma, np.float32),
            "next_sigma": np.array(next_sigma, np.float32),
        }
        for name in ("prologue", "body", "epilogue"):
            graph = bundle.target(target).graphs[name]
            outputs = graphs[name].run(None, {port.name: state[port.name] for port in graph.inputs})
            state |= dict(zip((port.name for port in graph.outputs), outputs, strict=True))
        ours, theirs = state["next_latents"] - latents, cpu.backend.get("latents") - latents
        assert relative_error(ours, theirs) < bound
        assert cosine(ours, theirs) > 1 - bound**2
        latents = cpu.backend.get("latents")
    (image,) = graphs["vae_decoder"].run(None, {"latent_grid": latents.reshape(1, *grid, -1)})
    assert psnr(image[0], cpu.decode(latents, grid)[0]) > 90


def checked(bundle: Bundle, tmp_path: Path, target: str) -> Subject:
    folders = [str(tmp_path / name) for name in ("kernels", "pictures", "cache")]
    settings = {"bounds": bounds_of(bundle, bundle.target(target)), "step_cosine": 0.98, "image_psnr_db": 30}
    return Subject(MadeUpPlace(), str(bundle.root), target, REHEARSED, *folders, settings)


def test_gpu_check_rehearses_these_targets(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, stages, memory and times; of bf16 ONNX Runtime gives neither text nor prologue, which is said."""
    monkeypatch.setattr(images, "recorded_images", lambda *given: recorded_images(*given)[:1] * 3)
    subject = checked(bundle, tmp_path, CUDA)
    found = images.check_images(subject)
    assert found.faults == []
    assert min(row["psnr_db"] for row in found.figures["images"]) > 35
    found = check_stages(subject)
    assert found.faults == []
    assert found.figures["text_error"] is None
    assert found.figures["not_compared"][0].startswith(
        "text: 'encoded' is bf16, which ONNX Runtime does not give to numpy"
    )
    assert check_memory(subject).figures["held_bytes"] == {}
    assert check_steps(subject).figures["decode"]["count"] == REHEARSED.phases
    machine = look(MadeUpPlace(), str(bundle.root))
    names = [check.name for check in checks_for(bundle, machine, REHEARSED, True) if check.target == CUDA]
    assert names == [f"{name}:{CUDA}" for name in ("images", "stages", "memory", "steps", "start")]


def test_gpu_check_compares_every_stage_in_fp16(bundle: Bundle, tmp_path: Path) -> None:
    found = check_stages(checked(bundle, tmp_path, HALF))
    assert (found.faults, found.figures["not_compared"]) == ([], [])
    assert min(found.figures["step_cosine"]) > 0.999
    assert 0 < found.figures["text_error"] < 5e-3


def test_nvfp4_weights_stay_in_four_bits(bundle: Bundle) -> None:
    """In the graph they are the file's own bytes, under the operator that multiplies by them."""
    body = onnx.load(bundle.path(bundle.target(CUDA).graphs["body"].file), load_external_data=False)
    kinds = {t.name: t for t in body.graph.initializer}
    products = [node for node in body.graph.node if node.op_type == "MatMulBlockQuantizedFp4Weight"]
    fp4 = [layer for layer in bundle.manifest.precision if layer.component == "transformer" and layer.format == "nvfp4"]
    assert len(products) == len(fp4)
    for node in products:
        assert [kinds[name].data_type for name in node.input[1:]] == [
            TensorProto.UINT8,
            TensorProto.UINT8,
            TensorProto.FLOAT,
        ]
        assert all(kinds[name].data_location == TensorProto.EXTERNAL for name in node.input[1:])


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.FLOAT16])
def test_a_type_without_cuda_kernel_is_refused(kind: int) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=kind), helper.make_node("Reciprocal", ["y"], ["z"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    z = helper.make_tensor_value_info("z", kind, [2])
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [z]))
    if kind == TensorProto.FLOAT16:
        check_kernels("prologue", model)
        return
    with pytest.raises(
        BuildError, match=r"prologue: ONNX Runtime has no CUDA kernel for Reciprocal in bfloat16 .* 'z'"
    ):
        check_kernels("prologue", model)


def test_a_graph_onnxruntime_does_not_accept_fails_the_build_without_a_gpu(tmp_path: Path) -> None:
    """The schema of the operator is checked here: three inputs are too few."""
    values = [
        helper.make_tensor_value_info("a", TensorProto.BFLOAT16, [2, 32]),
        helper.make_tensor_value_info("b", TensorProto.UINT8, [16, 16]),
        helper.make_tensor_value_info("s", TensorProto.UINT8, [16, 2]),
        helper.make_tensor_value_info("g", TensorProto.FLOAT, []),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2, 16])
    for count in (3, 4):
        names = [value.name for value in values[:count]]
        node = helper.make_node("MatMulBlockQuantizedFp4Weight", names, ["y"], domain="com.microsoft", block_size=16)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(helper.make_graph([node], "g", values, [y]), opset_imports=opsets, ir_version=11)
        onnx.save(model, tmp_path / f"{count}.onnx")
    check_loads(tmp_path, ["4.onnx"], for_gpu=True)
    with pytest.raises(BuildError, match="no kernel for it"):
        check_loads(tmp_path, ["4.onnx"])
    with pytest.raises(BuildError, match=r"3\.onnx: ONNX Runtime .* does not load it"):
        check_loads(tmp_path, ["3.onnx"], for_gpu=True)


def test_bound_buffers_give_the_images_of_plain_runs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend as it is, but on the CPU's provider and the CPU target's graphs, with weights as they are stored."""
    monkeypatch.setattr(OnnxRuntimeBackend, "_unfolds_once", lambda self: frozenset())
    pipeline = Pipeline(bundle, target="onnxruntime-exact")
    request = Request([PROMPT, "a large red circle"], steps=3)
    expected = pipeline.generate(request).images
    pipeline.backend = OnnxRuntimeCudaBackend(
        bundle, bundle.target("onnxruntime-exact"), "cpu", ("CPUExecutionProvider",)
    )
    for ours, theirs in zip(pipeline.generate(request).images, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_work_that_would_fall_back_to_the_cpu_is_refused(bundle: Bundle) -> None:
    """A provider that is there and takes no node: ONNX Runtime gives them all to the CPU, without a word."""
    pipeline = Pipeline(bundle, target="onnxruntime-exact")
    providers = ("AzureExecutionProvider", "CPUExecutionProvider")
    pipeline.backend = OnnxRuntimeCudaBackend(bundle, bundle.target("onnxruntime-exact"), "cpu", providers)
    with pytest.raises(BackendError, match=r"nodes that do a layer's work \(\w+\) were given to CPUExecutionProvider"):
        pipeline.generate(Request(PROMPT, steps=1))


class Refused(Exception):
    """Raised in place of a session on CUDA."""


def test_libraries_are_loaded_and_options_given_before_the_first_session(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def session(path: str, options: object, providers: object, enable_fallback: int) -> None:
        asked.append((providers, enable_fallback))
        raise Refused("no CUDA here")

    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: asked.append("libraries"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDER])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    backend = OnnxRuntimeCudaBackend(bundle, bundle.target(CUDA))
    with pytest.raises(BackendError, match="cannot load it: no CUDA here"):
        backend.try_graphs(no_gpu)
    options = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
    assert asked == ["libraries", ([(PROVIDER, options)], 0)]


def no_gpu() -> Gpu:
    raise BackendError("there is none")


class Replaced(Bundle):
    """A bundle in which the file of one graph is another."""

    def __init__(self, bundle: Bundle, name: str, path: Path) -> None:
        super().__init__(bundle.root, bundle.manifest)
        self.replaced = {name: path}

    def checked_file(self, name: str) -> Path:
        return self.replaced.get(name) or super().checked_file(name)


def test_a_kernel_that_fails_when_it_computes_is_found_at_load(bundle: Bundle, tmp_path: Path) -> None:
    """Attention of opset 23 whose mask fits no number of keys: it loads, and its kernel throws."""
    target = bundle.target("onnxruntime-exact")
    entry = target.graphs["vae_decoder"]
    heads = numpy_helper.from_array(np.array([1, 2, -1, 16]), "heads")
    mask = numpy_helper.from_array(np.zeros((3, 5), np.float32), "mask")
    nodes = [
        helper.make_node("Reshape", ["latent_grid", "heads"], ["q"]),
        helper.make_node("Attention", ["q", "q", "q", "mask"], ["image"], name="mid_block/attention"),
    ]
    (port,) = entry.inputs
    given = helper.make_tensor_value_info(port.name, TensorProto.FLOAT, port.shape)
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph(nodes, "g", [given], [image], [heads, mask])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), tmp_path / "g.onnx")
    replaced = Replaced(bundle, entry.file, tmp_path / "g.onnx")
    backend = OnnxRuntimeCudaBackend(replaced, target, "cpu", ("CPUExecutionProvider",))
    said = (
        r"'vae_decoder': its node 'mid_block/attention' \(Attention\) failed in a trial run at 64x64.*another --target"
    )
    with pytest.raises(BackendError, match=said):
        backend.try_graphs(no_gpu)


def test_graphs_that_ran_before_are_not_tried_again(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target, gpu = bundle.target("onnxruntime-exact"), Gpu("a made-up GPU", "9.0", "13.0")
    opened: list[str] = []

    class Counting(OnnxRuntimeCudaBackend):
        def _open(self, graph: str, path: str, constants: Mapping[str, np.ndarray]) -> object:
            opened.append(graph)
            return super()._open(graph, path, constants)

    def tried(found: Gpu) -> list[str]:
        opened.clear()
        backend = Counting(bundle, target, "cpu", ("CPUExecutionProvider",))
        backend.try_graphs(lambda: found)
        with pytest.raises(BackendError, match="nothing has produced"):
            backend.get("latents")
        assert backend.notes == []
        return list(opened)

    assert tried(gpu) == list(target.graphs)
    assert tried(gpu) == []
    assert tried(replace(gpu, driver="13.1")) == list(target.graphs)
    with pytest.raises(BackendError, match=r"supports CUDA 12\.8, the libraries need CUDA 13"):
        tried(replace(gpu, driver="12.8"))


def test_a_target_on_cuda_is_tried_when_it_is_loaded(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    class Backend:
        def __init__(self, *given: object) -> None:
            self.given = given

        def try_graphs(self) -> None:
            tried.append(self.given)

    monkeypatch.setattr("fluxrt.backends.onnxruntime_cuda.OnnxRuntimeCudaBackend", Backend)
    make_backend(bundle, bundle.target(CUDA), None)
    assert tried == [(bundle, bundle.target(CUDA))]


def test_without_the_cuda_provider_the_package_is_named(bundle: Bundle) -> None:
    with pytest.raises(
        BackendError,
        match=r"needs ONNX Runtime's CUDAExecutionProvider.*pip uninstall -y onnxruntime .* 'onnxruntime-gpu\[cuda",
    ):
        Pipeline(bundle, target=CUDA)
    assert Pipeline(bundle).target.name == "onnxruntime-exact"


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("{kind: onnxruntime, device: cuda, activations: nvfp4}", r"targets\[0\]\.activations: goes with device: cpu"),
        ("{kind: onnxruntime, device: cuda, weights_in_memory: 4-bit}", r"weights_in_memory: goes with device: cpu"),
        ("{kind: onnxruntime, dtype: float16}", r"targets\[0\]\.dtype: goes with device: cuda"),
    ],
)
def test_options_that_do_not_go_together_are_refused(target: str, says: str) -> None:
    recipe = Path(__file__).parent.parent / "recipes" / "flux2-nano.yaml"
    with pytest.raises(RecipeError, match=says):
        load_recipe(recipe, (f"targets=[{target}]",))
