"""The VAE's decoder over query tiles: the same image, memory that grows with the number of pixels, and no tensor too large."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from conftest import NANO, ROOT, compile_into, exported
from fluxc.base.errors import BuildError, RecipeError
from fluxc.base.safetensors import TensorRef, read_header
from fluxc.build.job import check_targets
from fluxc.graph.attention import attention_apart, attention_in_tiles
from fluxc.graph.bind import argument_names, bind
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.predict.work import decoder_working
from fluxc.quantize.source import read_source
from fluxc.recipe.load import load_recipe
from fluxc.recipe.targets import TensorRTRtxTarget
from fluxc.rehearsal.operators import OPERATORS, read_tensor, unrounded
from fluxc.targets.base import TargetContext
from fluxc.targets.decoder import INDEXABLE, Decoder
from fluxc.targets.onnxruntime.lower import lower
from fluxc.targets.tensorrt.build import build_engine, write_sources
from fluxc.targets.tensorrt.cut import Component, Cutter
from fluxc.targets.tensorrt.lower import fix_shapes, lower_tensorrt
from fluxrt.backends.library import make_logger
from fluxrt.bundle import open_bundle
from fluxrt.manifest import OnnxRuntimeTarget, TensorRTTarget
from fluxrt.sharding import sizes_of
from quick import QUICK

trt = pytest.importorskip("tensorrt_rtx", reason="the plans need tensorrt-rtx-cu13, as `make test` installs it")

RTX = ROOT / "recipes" / "flux2-nano-rtx.yaml"
NANO_VAE = json.loads((NANO / "vae" / "config.json").read_text())
WEIGHTS = NANO / "vae" / "diffusion_pytorch_model.safetensors"
SQUARES = (512, 1024, 1536, 2048)


def grids(*sizes: int) -> tuple[tuple[int, int], ...]:
    return tuple((side // 16, side // 16) for side in sizes)


def published() -> dict[str, Any]:
    """The config of FLUX.2's VAE: diffusers' defaults."""
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        return {k: v for k, v in AutoencoderKLFlux2().config.items() if not k.startswith("_")}


# The numbers.


@pytest.fixture(scope="module")
def nano() -> onnx.ModelProto:
    return exported("vae", NANO_VAE, 0, composed=True)["vae_decoder"]


def decoded(model: onnx.ModelProto, latents: np.ndarray, folder: Path) -> np.ndarray:
    """The image of flux2-nano's decoder `model` in ONNX Runtime, as the onnxruntime target lowers and binds it."""
    refs, arguments = read_header(WEIGHTS), argument_names(model)
    lowered = lower(model, arguments, {name: ref.dtype for name, ref in refs.items()}, {})
    bind(lowered, arguments, refs)
    file = folder / "vae_decoder.onnx"
    (folder / WEIGHTS.name).unlink(missing_ok=True)
    (folder / WEIGHTS.name).hardlink_to(WEIGHTS)
    file.write_bytes(lowered.SerializeToString())
    (image,) = onnxruntime.InferenceSession(str(file)).run(None, {"latent_grid": latents})
    return np.asarray(image)


@pytest.mark.parametrize(("rows", "columns", "tiles"), [(8, 8, 4), (6, 10, 3), (5, 7, 4), (5, 7, 7), (8, 8, 256)])
def test_tiles_give_the_whole_attentions_image_and_diffusers(
    nano: onnx.ModelProto, rows: int, columns: int, tiles: int, tmp_path: Path
) -> None:
    """One tiled graph at several sizes, as far as one query a tile; the image is diffusers' own."""
    from diffusers import AutoencoderKLFlux2

    latents = np.random.default_rng(rows).standard_normal((1, rows, columns, 32)).astype(np.float32)
    tiled = attention_in_tiles(nano, tiles)
    assert sum(node.op_type == "Attention" for node in tiled.graph.node) == tiles
    ours, whole = (decoded(model, latents, tmp_path) for model in (tiled, nano))
    assert np.abs(ours - whole).max() < 1e-5
    vae = AutoencoderKLFlux2.from_pretrained(NANO / "vae", torch_dtype=torch.float32)
    grid = torch.from_numpy(latents)
    with torch.no_grad():
        unnormalized = grid * torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps) + vae.bn.running_mean
        patched = unnormalized.permute(0, 3, 1, 2).reshape(1, 8, 2, 2, rows, columns)
        unpacked = patched.permute(0, 1, 4, 2, 5, 3).reshape(1, 8, 2 * rows, 2 * columns)
        image = (vae.decode(unpacked).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - image).max() < 1e-4


def test_tensorrts_form_of_the_tiles_computes_the_same(nano: onnx.ModelProto, tmp_path: Path) -> None:
    model = exported("vae", NANO_VAE, 0, dtype="bfloat16")["vae_decoder"]
    refs = read_header(WEIGHTS)
    tiled = attention_apart(attention_in_tiles(model, 4))
    lowered = lower_tensorrt(tiled, argument_names(model), refs, {})
    latents = np.random.default_rng(0).standard_normal((1, 4, 6, 32)).astype(np.float32)
    feeds = {
        port.name: read_tensor(WEIGHTS, port.tensors[0], port.dtype).astype(np.float32) for port in lowered.weights
    }
    (image,) = ReferenceEvaluator(unrounded(lowered.model), new_ops=OPERATORS).run(
        None, {"latent_grid": latents} | feeds
    )
    assert np.abs(image - decoded(nano, latents, tmp_path)).max() < 1e-4


def test_one_tile_is_the_graph_as_it_was_and_a_mask_is_refused(nano: onnx.ModelProto) -> None:
    assert attention_in_tiles(nano, 1) is nano
    masked = onnx.ModelProto()
    masked.CopyFrom(nano)
    next(node for node in masked.graph.node if node.op_type == "Attention").input.append("mask")
    with pytest.raises(BuildError, match="has a mask"):
        attention_in_tiles(masked, 4)


def test_bundles_of_large_images_have_tiles_and_small_ones_none(quick_bundle: Path, workshop: Path) -> None:
    """flux2-nano's decoder holds 1024 values for each of its latents, so a tile may have 1024 queries: those of 128x128."""
    large = ("sizes=[[160, 160]]", "sampling.steps=1", "precision.transformer={default: bf16}")
    targets = "targets=[{kind: onnxruntime}, {kind: onnxruntime, device: cuda}, {kind: tensorrt_rtx}]"
    bundle = open_bundle(compile_into(workshop / "large", *QUICK, *large, targets))
    cpu, cuda, rtx = bundle.manifest.targets
    assert isinstance(cpu, OnnxRuntimeTarget)
    assert isinstance(cuda, OnnxRuntimeTarget)
    assert isinstance(rtx, TensorRTTarget)
    files = (cpu.graphs["vae_decoder"].file, cuda.graphs["vae_decoder"].file, rtx.engine.plans["vae_decoder"].source)
    found = [onnx.load(bundle.path(file), load_external_data=False) for file in files]
    assert [sum(node.op_type == "Attention" for node in model.graph.node) for model in found] == [2, 2, 0]
    assert sum(node.op_type == "Softmax" for node in found[2].graph.node) == 2
    assert bundle.manifest.fidelity.targets["onnxruntime"]["image_psnr_db_worst"] > 80
    small = onnx.load(quick_bundle / "vae" / "vae_decoder.onnx", load_external_data=False)
    # Attention of the whole needs no transposition.
    assert sum(node.op_type in ("Attention", "MultiHeadAttention") for node in small.graph.node) == 1


# The memory.


@pytest.fixture(scope="module")
def decoder() -> onnx.ModelProto:
    """FLUX.2's decoder in bf16."""
    return exported("vae", published(), 0, dtype="bfloat16")["vae_decoder"]


def weights_of(vae: Flux2VAE) -> dict[str, TensorRef]:
    """The tensors of a weights file of `vae` in bf16."""
    return {n: TensorRef(n, "BF16", shape, Path(), 0, 2 * math.prod(shape)) for n, shape in vae.tensors.items()}


def built(model: onnx.ModelProto, decoder: Decoder, folder: Path) -> dict[str, Any]:
    """What the audit found in the plan of `model` for `decoder`."""
    target = TensorRTRtxTarget(compute_capabilities=("12.0",))
    requests = [sizes_of(1, (rows, columns)) for rows, columns in decoder.grids]
    cutter = Cutter(requests, decoder.between, target.name, "engines")
    cutter.vae_decoder(model, Component("vae", weights_of(decoder.vae), [], ""), decoder.tiles)
    write_sources(cutter.cut, folder)
    return build_engine(target, cutter.cut, folder).audit["vae_decoder"]


@pytest.mark.parametrize(
    ("sizes", "between", "tiles"),
    [
        *(((size,), False, tiles) for size, tiles in zip(SQUARES, (1, 1, 3, 4), strict=True)),
        (SQUARES, False, 4),
        ((512, 1024), True, 1),
        ((2048, 512), True, 4),
        ((512, 2304), True, 4),
    ],
)
def test_a_decoders_plan_wants_the_memory_that_is_predicted(
    decoder: onnx.ModelProto, sizes: tuple[int, ...], between: bool, tiles: int, tmp_path: Path
) -> None:
    """Plans of the published decoder for one size, several, and ranges; 2048x2048 took 16.3 GiB in one tile, in a range 19."""
    asked = Decoder(Flux2VAE(), grids(*sizes), between)
    found = built(decoder, asked, tmp_path)
    assert asked.tiles == tiles
    assert found["faults"] == ()
    assert found["working_bytes"] == pytest.approx(decoder_working(asked), rel=0.02)
    assert found["working_bytes"] < 7.2 * 2**30 or max(sizes) > 2048


def test_the_small_decoder_is_predicted_by_its_own_widths(tmp_path: Path) -> None:
    config = published() | {"decoder_block_out_channels": (96, 192, 384, 384)}
    asked = Decoder(Flux2VAE.read(config), grids(1024))
    found = built(exported("vae", config, 0, dtype="bfloat16")["vae_decoder"], asked, tmp_path)
    assert asked.tiles == 2
    assert found["working_bytes"] == pytest.approx(decoder_working(asked), rel=0.05)


# The largest tensor.


@pytest.mark.parametrize("side", [*SQUARES, 2880])
def test_the_largest_tensor_is_the_one_that_is_counted(decoder: onnx.ModelProto, side: int) -> None:
    """Against TensorRT's parser, by every layer of the graph; scores of a tile never exceed the largest activation."""
    asked = Decoder(Flux2VAE(), grids(side))
    tiled = attention_apart(attention_in_tiles(decoder, asked.tiles))
    lowered = lower_tensorrt(tiled, argument_names(decoder), weights_of(asked.vae), {}).model
    fix_shapes(lowered, {"rows": side // 16, "columns": side // 16})
    logger = make_logger(trt)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(lowered.SerializeToString())
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    values = [math.prod(layer.get_output(0).shape) for layer in layers]
    scores = [n for layer, n in zip(layers, values, strict=True) if layer.type == trt.LayerType.SOFTMAX]
    assert scores == [asked.scores] * asked.tiles
    assert asked.scores <= asked.activation == max(values) <= INDEXABLE


def test_whatever_the_sizes_their_tiles_divide_them() -> None:
    vae = Flux2VAE()
    assert Decoder(vae, ((85, 48), (64, 64))).tiles == 1
    assert Decoder(vae, ((128, 128), (85, 48))).tiles == 4
    assert Decoder(vae, ((180, 180),)).tiles == 8
    assert Decoder(vae, ((131, 131),)).tiles == 131
    assert Decoder(vae, ((131, 131), (128, 128))).tiles == 4
    assert Decoder(vae, ((128, 32), (32, 128)), between=True).largest == (128, 128)
    assert Decoder(Flux2VAE(mid_block_add_attention=False), ((128, 128),)).tiles == 1


@pytest.mark.parametrize(
    ("target", "sizes", "says"),
    [
        (
            "onnxruntime",
            "[[64, 64], [12000, 12000]]",
            r"at 12000x12000 the VAE's decoder has an activation of 9,216,000,000 values",
        ),
        (
            "tensorrt_rtx",
            "[[12000, 12000]]",
            r"index 2,147,483,647; use the recipe's vae: .* in tiles, or sizes of at most 33\.6 megapixels$",
        ),
        (
            "tensorrt_rtx, shapes: range",
            "[[64, 12000], [12000, 64]]",
            r"at 12000x12000, the most rows and columns of the range, .*, or shapes: profiles",
        ),
    ],
)
def test_sizes_whose_tensors_no_kernel_can_index_are_refused(target: str, sizes: str, says: str) -> None:
    loaded = load_recipe(RTX, (*QUICK, f"targets=[{{kind: {target}}}]", f"sizes={sizes}", "gates={}"))
    with pytest.raises(RecipeError, match=says):
        check_targets(TargetContext(loaded.recipe, read_source(loaded)))


def test_long_images_need_no_memory_for_their_range_with_profiles() -> None:
    targets = "targets=[{kind: tensorrt_rtx, shapes: profiles}]"
    loaded = load_recipe(RTX, (*QUICK, targets, "sizes=[[64, 12000], [12000, 64]]", "gates={}"))
    check_targets(TargetContext(loaded.recipe, read_source(loaded)))


def test_what_divides_every_size_bounds_the_tiles() -> None:
    """Any size has four latents for each token, and no other number of tiles divides every size of a range."""
    wide = Decoder(Flux2VAE(), grids(512, 2416), between=True)
    assert wide.tiles == 4
    wide.check("targets[0]")
    with pytest.raises(
        RecipeError, match=r"targets\[0\]: at 2448x2448, .* 2,191,925,124 scores, .* than 4 tiles .* profiles"
    ):
        Decoder(Flux2VAE(), grids(512, 2448), between=True).check("targets[0]")
    with pytest.raises(RecipeError, match=r"at 2448x2448 a tile .* than 4 tiles .* a larger number$"):
        Decoder(Flux2VAE(), grids(512, 2448)).check("targets[0]")
    Decoder(Flux2VAE(), grids(2448)).check("targets[0]")
