"""Images decoded in tiles: the division, the graph that blends, diffusers as the witness, every kind of target."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import NANO, RECIPE, ROOT, compile_into, exported
from fluxc.base.errors import RecipeError
from fluxc.base.safetensors import read_header
from fluxc.build.job import check_targets
from fluxc.cli.describe import print_plan
from fluxc.fidelity.image_tiles import decoded_in_tiles
from fluxc.fidelity.metrics import psnr
from fluxc.graph.image_tiles import of_a_tile, trace_vae_blend
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.predict.scaling import recipe_model
from fluxc.predict.work import decoder_working
from fluxc.quantize.source import read_source
from fluxc.recipe.load import load_recipe
from fluxc.recipe.structs import Vae
from fluxc.recipe.targets import TensorRTRtxTarget
from fluxc.rehearsal.gpu import FakeDriver, FakeLibrary
from fluxc.rehearsal.onnxruntime import MadeUpCudaBackend
from fluxc.rehearsal.place import MadeUpPlace
from fluxc.targets.base import TargetContext
from fluxc.targets.decoder import Decoder, decoded_at_once
from fluxc.targets.tensorrt.build import Sizes, build_engine, write_sources
from fluxc.targets.tensorrt.cut import Component, Cutter
from fluxrt.backends.graphs import working_memory
from fluxrt.backends.tensorrt import TensorRTBackend
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.evidence import faults_of, read_evidence, replay
from fluxrt.group import Group
from fluxrt.manifest import OnnxRuntimeTarget, TensorRTTarget, Tiles, decode_manifest, encode_manifest
from fluxrt.pipeline import Pipeline
from fluxrt.request import Request
from fluxrt.sharding import sizes_of
from fluxrt.tiles import first_tokens, spans, tile_sizes
from fluxrt.verify import measured_of, verify_evidence
from quick import QUICK
from ranks import on_every_rank

PIXELS = 8
"""Of a token of flux2-nano."""
NANO_VAE = json.loads((NANO / "vae" / "config.json").read_text())
PROMPT = "a small white ring at the top on a red background"
SIZES = ((96, 120), (64, 64), (128, 64))


# The division.


@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 30))
def test_tiles_are_as_few_as_overlap_enough_and_end_with_the_image(length: int, tile: int, overlap: int) -> None:
    overlap = min(overlap, tile // 2)
    starts = first_tokens(length, tile, overlap)
    assert (starts[0], starts[-1]) == (0, max(length - tile, 0))
    assert all(tile - (after - before) >= overlap for before, after in itertools.pairwise(starts))
    if len(starts) > 1:
        assert tile + (len(starts) - 2) * (tile - overlap) < length


@given(st.integers(9, 90), st.integers(8, 40), st.integers(0, 20), st.sampled_from([8, 16]))
def test_weights_of_a_pixel_add_up_to_one_and_lie_on_the_tile(
    length: int, tile: int, overlap: int, pixels: int
) -> None:
    """Ramps follow the next: there is never a third tile on a pixel."""
    tile, at = min(tile, length), np.arange(length * pixels)
    found = spans(length, tile, min(overlap, tile // 2), pixels)
    weights = np.stack(
        [((at - s.rise) / s.rise_length).clip(0, 1) - ((at - s.fall) / s.fall_length).clip(0, 1) for s in found]
    )
    assert np.allclose(weights.sum(0), 1, atol=1e-12)
    assert weights.min() >= 0
    assert ((weights > 0).sum(0) <= 2).all()
    for span, own in zip(found, weights, strict=True):
        inside = (at >= span.start) & (at < span.start + tile * pixels)
        assert not own[~inside].any()


# The graphs, with diffusers as the witness.


@pytest.fixture(scope="module")
def vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2.from_pretrained(NANO / "vae", torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def blend() -> onnxruntime.InferenceSession:
    model = trace_vae_blend()
    del model.opset_import[2:]
    return onnxruntime.InferenceSession(model.SerializeToString())


def decode_whole(vae: Any, latents: torch.Tensor) -> np.ndarray:
    """The image [height, width, 3] in 0..1."""
    with torch.no_grad():
        image = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    return np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())


def in_graphs(vae: Any, blend: onnxruntime.InferenceSession, latents: torch.Tensor, tiles: Tiles) -> np.ndarray:
    """Tiles by diffusers' decoder, blended by the graph as the runtime places them."""
    rows, columns = (side // 2 for side in latents.shape[2:])
    sides = [
        spans(length, min(length, tile), overlap, PIXELS)
        for length, tile, overlap in zip((rows, columns), tiles.size, tiles.overlap, strict=True)
    ]
    canvas = np.zeros((1, rows * PIXELS, columns * PIXELS, 3), np.float32)
    for row, column in itertools.product(*sides):
        top, left = 2 * row.token, 2 * column.token
        part = latents[:, :, top : top + 2 * tiles.size[0], left : left + 2 * tiles.size[1]]
        feeds = {"tile": decode_whole(vae, part)[None], "canvas": canvas}
        (canvas,) = blend.run(None, {**feeds, "spans": np.array([row.values, column.values], np.float32)})
    return np.asarray(canvas[0])


def latents_of(rows: int, columns: int) -> torch.Tensor:
    """Latents of so many tokens, small enough for no pixel to be clipped."""
    return torch.from_numpy(
        np.random.default_rng(rows).standard_normal((1, 8, 2 * rows, 2 * columns)).astype(np.float32) * 0.3
    )


def diffusers_in_tiles(vae: Any, latents: torch.Tensor, tile: int, overlap: int) -> np.ndarray:
    """diffusers' own tiled decoding, with square tiles of `tile` tokens."""
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 2 * tile, PIXELS * tile
    vae.tile_overlap_factor = overlap / tile
    try:
        return decode_whole(vae, latents)
    finally:
        vae.disable_tiling()


def test_without_overlap_the_image_is_diffusers_tiled_image(vae: Any, blend: onnxruntime.InferenceSession) -> None:
    latents = latents_of(16, 24)
    ours = in_graphs(vae, blend, latents, Tiles((8, 8), (0, 0)))
    assert np.abs(ours - diffusers_in_tiles(vae, latents, 8, 0)).max() < 1e-6


def test_where_both_divide_alike_the_image_is_diffusers_tiled_image(
    vae: Any, blend: onnxruntime.InferenceSession
) -> None:
    """A side of a tile and k strides: diffusers adds one more tile, of the overlap alone, which ours has no need of.

    Before it both are the same, but where four tiles meet: diffusers blends there with what it blended before.
    """
    tile, overlap = 8, 2
    stride = tile - overlap
    latents = latents_of(tile + stride, tile + 2 * stride)
    ours, theirs = in_graphs(vae, blend, latents, Tiles((tile, tile), (overlap, overlap))), None
    theirs = diffusers_in_tiles(vae, latents, tile, overlap)
    differs = np.abs(ours - theirs).max(-1) > 1e-6
    rows, columns = 2 * stride * PIXELS, 3 * stride * PIXELS
    meets = np.zeros_like(differs)
    for left in (stride, 2 * stride):
        meets[stride * PIXELS : tile * PIXELS, left * PIXELS : (left + overlap) * PIXELS] = True
    assert not differs[:rows, :columns][~meets[:rows, :columns]].any()
    assert differs[rows:].any()
    assert differs[meets].any()


@pytest.mark.parametrize(
    ("grid", "tile", "overlap"),
    [((12, 15), (8, 8), (2, 2)), ((9, 30), (16, 8), (4, 4)), ((25, 8), (8, 12), (0, 3)), ((17, 17), (16, 16), (1, 8))],
)
def test_the_graph_blends_as_the_reference_does(
    vae: Any,
    blend: onnxruntime.InferenceSession,
    grid: tuple[int, int],
    tile: tuple[int, int],
    overlap: tuple[int, int],
) -> None:
    latents, tiles = latents_of(*grid), Tiles(tile, overlap)
    witness = decoded_in_tiles(lambda part: decode_whole(vae, part), latents, tiles, (2, 2))
    ours = in_graphs(vae, blend, latents, tiles)
    assert ours.shape == (grid[0] * PIXELS, grid[1] * PIXELS, 3)
    assert np.abs(ours - witness).max() < 1e-6
    assert np.abs(ours - decode_whole(vae, latents)).max() > 1e-4


def test_the_reference_blends_as_diffusers_own_blending_does(vae: Any) -> None:
    """One row of two tiles, and one column: blend_h and blend_v over what they share."""
    for grid, axis in (((8, 12), 1), ((12, 8), 0)):
        latents = latents_of(*grid)
        tiles = [latents.narrow(2 + axis, start, 16) for start in (0, 8)]
        first, second = (torch.from_numpy(decode_whole(vae, tile)).permute(2, 0, 1)[None].clone() for tile in tiles)
        second = (vae.blend_h if axis else vae.blend_v)(first, second, 4 * PIXELS)
        expected = torch.cat([first.narrow(2 + axis, 0, 4 * PIXELS), second], 2 + axis)[0].permute(1, 2, 0).numpy()
        ours = decoded_in_tiles(lambda part: decode_whole(vae, part), latents, Tiles((8, 8), (2, 2)), (2, 2))
        assert np.abs(ours - expected).max() < 1e-6


def test_a_tiles_decoder_is_the_images_with_other_names() -> None:
    model = exported("vae", NANO_VAE, 0, composed=True)["vae_decoder"]
    of_tile = of_a_tile(model)
    named = [
        {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in ports}
        for ports in ([port for port in of_tile.graph.input if "." not in port.name], of_tile.graph.output)
    ]
    assert named == [
        {"latent_grid": [1, "tile_rows", "tile_columns", 32]},
        {"tile": [1, "8*tile_rows", "8*tile_columns", 3]},
    ]
    assert [node.op_type for node in of_tile.graph.node] == [node.op_type for node in model.graph.node]


# Bundles.


@pytest.fixture(scope="module")
def bundle(workshop: Path) -> Bundle:
    targets = (
        "targets=[{kind: onnxruntime}, {kind: onnxruntime, gpus: 2}, {kind: onnxruntime, device: cuda}, "
        "{kind: tensorrt_rtx}, {kind: tensorrt_rtx, gpus: 2}]"
    )
    changes = (
        f"sizes={[list(size) for size in SIZES]}",
        "vae={tile: [64, 64]}",
        "batches=[1, 2]",
        "sampling.steps=2",
        "fidelity.max_prompts=1",
    )
    return open_bundle(
        compile_into(workshop / "tiled", *QUICK, *changes, "precision.transformer={default: bf16}", targets)
    )


@pytest.fixture(autouse=True)
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def cpu(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline(bundle, target="onnxruntime", threads=1) as pipeline:
        yield pipeline


def tokens_of(size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Final latents [1, S, 32] of an image, as the step loop leaves them, and its grid."""
    grid = (size[0] // PIXELS, size[1] // PIXELS)
    return np.random.default_rng(size[0]).standard_normal((1, grid[0] * grid[1], 32)).astype(np.float32), grid


def decoded(pipeline: Pipeline, size: tuple[int, int]) -> np.ndarray:
    latents, grid = tokens_of(size)
    pipeline._prepare(1, grid)
    return pipeline.decode(latents, grid)[0]


def unpacked(vae: Any, tokens: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    """What diffusers' decoder takes of final latents."""
    spread = torch.from_numpy(tokens).reshape(1, *grid, 32)
    patches = (spread * torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps) + vae.bn.running_mean).permute(
        0, 3, 1, 2
    )
    patches = patches.reshape(1, 8, 2, 2, *grid).permute(0, 1, 4, 2, 5, 3)
    return patches.reshape(1, 8, 2 * grid[0], 2 * grid[1])


@pytest.mark.parametrize("size", SIZES)
def test_the_runtimes_image_is_what_diffusers_decoder_gives_of_the_tiles(
    bundle: Bundle, cpu: Pipeline, vae: Any, size: tuple[int, int]
) -> None:
    latents = unpacked(vae, *tokens_of(size))
    tiles = bundle.manifest.sampling.tiled
    assert tiles == Tiles((8, 8), (2, 2))
    witness = decoded_in_tiles(lambda part: decode_whole(vae, part), latents, tiles, (2, 2))
    ours = decoded(cpu, size)
    assert ours.shape == (*size, 3)
    assert np.abs(ours - witness).max() < 1e-5
    whole = np.abs(ours - decode_whole(vae, latents)).max()
    assert (whole < 1e-5) == (size == (64, 64))


def test_the_report_tells_what_tiles_cost_from_what_a_target_costs(bundle: Bundle) -> None:
    """The decoder is held against diffusers' on tiles, images against those decoded whole."""
    fidelity = bundle.manifest.fidelity
    figures, tiling = fidelity.targets["onnxruntime"], fidelity.tiling
    assert isinstance(tiling, dict)
    assert (tiling["tile"], tiling["overlap"]) == ([64, 64], [16, 16])
    assert figures["decode_error"] < 1e-5 < 1e-3 < tiling["error"]
    assert figures["image_psnr_db"] == pytest.approx(tiling["psnr_db"], abs=0.1)
    assert fidelity.ranks["onnxruntime-2gpus"].image_psnr_db_worst > 55
    page = (bundle.root / "report" / "index.html").read_text()
    assert f"have a PSNR of {tiling['psnr_db']} dB to the same decoded whole" in page


def test_evidence_of_a_tiled_size_is_replayed(bundle: Bundle) -> None:
    (found,) = verify_evidence(bundle, "onnxruntime", threads=1)
    assert found.status == "passed"
    assert measured_of(found)[0].decode_error == pytest.approx(0, abs=1e-5)


def test_a_bundle_that_decodes_whole_says_nothing_of_tiles(quick_bundle: Path) -> None:
    raw = json.loads((quick_bundle / "bundle.json").read_text())
    assert "tiles" not in raw["sampling"]
    assert "tiling" not in raw["fidelity"]
    assert not (quick_bundle / "vae" / "vae_blend.onnx").exists()


def test_a_manifest_whose_tiles_cannot_be_laid_is_refused(bundle: Bundle) -> None:
    sampling = bundle.manifest.sampling
    altered = json.loads(encode_manifest(bundle.manifest))
    assert decode_manifest(json.dumps(altered).encode()).sampling == sampling
    altered["sampling"]["tiles"]["overlap"] = [8, 2]
    with pytest.raises(Exception, match=r"tiles of \[8, 8\] tokens cannot overlap by \[8, 2\]"):
        decode_manifest(json.dumps(altered).encode())


# GPUs, made up.


def on_fake_gpu(
    bundle: Bundle, driver: FakeDriver, target: str = "tensorrt_rtx", group: Group | None = None
) -> Pipeline:
    entry = bundle.target(target)
    assert isinstance(entry, TensorRTTarget)
    library = FakeLibrary(bundle, entry, driver, None, group)
    backend = TensorRTBackend(
        bundle, entry, driver, library, group, SimpleNamespace(capsule=object(), close=lambda: None) if group else None
    )
    return Pipeline(bundle, target=target, group=group, backend=backend)


def test_tiles_on_a_gpu_are_captured_and_give_the_same_image(bundle: Bundle, cpu: Pipeline) -> None:
    """Of six tiles the first runs eagerly, the second both ways, four are launched; the canvas never leaves the GPU."""
    driver = FakeDriver()
    pipeline = on_fake_gpu(bundle, driver)
    ours = decoded(pipeline, (96, 120))
    assert psnr(ours, decoded(cpu, (96, 120))) > 40
    assert not pipeline.backend.notes
    log = driver.log
    assert log.count("launch") == 1 + len(spans(12, 8, 2, 1)) * len(spans(15, 8, 2, 1)) - 2
    assert log.count(f"upload {96 * 120 * 3 * 4}") == 1 + 1
    again = decoded(pipeline, (96, 120))
    np.testing.assert_array_equal(ours, again)
    np.testing.assert_array_equal(decoded(pipeline, (64, 64)), decoded(on_fake_gpu(bundle, FakeDriver()), (64, 64)))
    pipeline.close()
    assert driver.blocks == {}


def test_plans_have_the_tiles_shape_and_the_audit_finds_no_fault(bundle: Bundle) -> None:
    entry = bundle.target("tensorrt_rtx")
    assert isinstance(entry, TensorRTTarget)
    plans, audit = entry.engine.plans, entry.engine.audit
    assert [tuple(port.shape) for port in plans["vae_decoder"].inputs] == [(1, 8, 8, 32)]
    assert [profile["width"][1] for profile in plans["vae_blend"].profiles] == [120, 64, 64]
    assert (audit["vae_blend"]["kernels"], audit["vae_blend"]["working_bytes"]) == (1, 0)
    assert [audit[name]["faults"] for name in ("vae_decoder", "vae_blend")] == [[], []]


def test_one_profile_spans_tiles_and_images_of_a_range(tmp_path: Path) -> None:
    """Images of 64 to 256 pixels a side, tiles of at most 128x64."""
    graphs = exported("vae", NANO_VAE, 0, dtype="bfloat16", tiles=True)
    target = TensorRTRtxTarget(compute_capabilities=("12.0",), shapes="range")
    requests = Sizes(((32, 32), (8, 8)), (1,), 32, tiles=Tiles((16, 8), (4, 2)), pixels_per_token=PIXELS).requests()
    cutter = Cutter(requests, True, target.name, "engines")
    refs = read_header(NANO / "vae" / "diffusion_pytorch_model.safetensors")
    component = Component("vae", refs, [], "")
    cutter.vae_decoder(graphs["vae_decoder"], component, 1)
    cutter.vae_blend(graphs["vae_blend"], component)
    write_sources(cutter.cut, tmp_path)
    engine = build_engine(target, cutter.cut, tmp_path)
    assert engine.plans["vae_decoder"].profiles == ({"tile_rows": (8, 16, 16), "tile_columns": (8, 8, 8)},)
    assert engine.plans["vae_blend"].profiles == (
        {"tile_height": (64, 128, 128), "tile_width": (64, 64, 64), "height": (64, 256, 256), "width": (64, 256, 256)},
    )
    assert [engine.audit[name]["faults"] for name in engine.plans] == [(), ()]


def test_onnxruntime_on_cuda_decodes_in_tiles(bundle: Bundle, cpu: Pipeline) -> None:
    entry = bundle.target("onnxruntime-cuda")
    assert isinstance(entry, OnnxRuntimeTarget)
    pipeline = Pipeline(bundle, target=entry.name, backend=MadeUpCudaBackend(bundle, entry))
    assert np.abs(decoded(pipeline, (96, 120)) - decoded(cpu, (96, 120))).max() < 1e-4


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "tensorrt_rtx"])
def test_evidence_of_a_tiled_size_is_replayed_on_made_up_gpus(bundle: Bundle, name: str) -> None:
    place, evidence = MadeUpPlace(), bundle.manifest.recorded
    assert evidence is not None
    backend = place.backend(bundle, bundle.target(name), place.driver(), captures=True)
    recorded = read_evidence(bundle, evidence)
    with Pipeline(bundle, target=name, backend=backend) as pipeline:
        found = replay(lambda: nullcontext(pipeline), recorded, evidence.size, evidence.guidance)
    assert faults_of(name, evidence.targets[name], recorded, found) == []
    assert found.errors[0].decode_error == pytest.approx(0, abs=0.03)


def test_rank_0_alone_decodes_tiles(bundle: Bundle) -> None:
    def work(group: Group) -> tuple[int, list[str]]:
        driver = FakeDriver()
        pipeline = on_fake_gpu(bundle, driver, "tensorrt_rtx-2gpus", group)
        images = pipeline.generate(Request(PROMPT, steps=2, seed=1)).images
        return len(images), driver.log

    (first, log), (second, other) = on_every_rank(2, work)
    assert (first, second) == (1, 0)
    assert "run vae_blend" in log
    assert not any("vae" in entry for entry in other)


def test_components_that_take_turns_decode_the_same(bundle: Bundle, cpu: Pipeline) -> None:
    request = Request(PROMPT, steps=1, seed=4)
    with Pipeline(bundle, target="onnxruntime", threads=1, memory="staged") as staged:
        theirs = staged.generate(request).images[0]
        assert set(staged.backend._sessions) == {"vae_decoder", "vae_blend"}
    np.testing.assert_array_equal(np.asarray(cpu.generate(request).images[0]), np.asarray(theirs))


# Memory.


def test_memory_is_predicted_for_the_tile(bundle: Bundle) -> None:
    large = Decoder(Flux2VAE(), ((128, 128), (64, 64)))
    tiled = large.in_tiles(Tiles((64, 64), (16, 16)))
    assert tiled.grids == ((64, 64),)
    assert decoder_working(tiled) == decoder_working(Decoder(Flux2VAE(), ((64, 64),))) < decoder_working(large) / 3
    assert tiled.tiles == 1
    sampling = bundle.manifest.sampling
    entry = bundle.target("onnxruntime")
    assert isinstance(entry, OnnxRuntimeTarget)
    plain = sizes_of(1, (256, 256))
    in_tiles = plain | tile_sizes(sampling.tiled, PIXELS, (256, 256))
    taken, whole = (working_memory(entry.graphs, bundle, sizes | {"tokens": 1}) for sizes in (in_tiles, plain))
    assert taken < whole / 20


def test_a_plan_tells_sizes_in_tiles_and_what_would_decode_large_ones_so(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*changes: str) -> str:
        loaded = load_recipe(RECIPE, (*QUICK, "fidelity.level=none", *changes))
        print_plan(loaded, False, ROOT / "artifacts" / "nothing")
        return " ".join(capsys.readouterr().out.split())

    large = "sizes=[[2048, 2048], [64, 64]]"
    tiled = told(large, "vae={tile: [1024, 512]}", "targets=[{kind: onnxruntime}]")
    said = "decoded in tiles of 1024x512 that overlap by at least 256x128: 2048x2048 in 15 tiles. The decoder takes 198 MiB"
    assert f"{said} in bf16 plans, for whole images 1.5 GiB" in tiled
    assert "tiles" not in told(large)
    assert "a recipe with `vae: {tile: [1024, 1024]}` decodes large images in tiles" in told("sizes=[[4096, 4096]]")


def test_decoding_in_tiles_is_budgeted_a_tile_at_a_time() -> None:
    asked, vae = Vae((1024, 1024)), Flux2VAE()
    assert decoded_at_once(asked, vae, (2048, 2048)) == ((1024, 1024), 9)
    assert decoded_at_once(asked, vae, (512, 2048)) == ((512, 1024), 3)
    assert decoded_at_once(asked, vae, (1024, 1024)) == ((1024, 1024), 1)
    assert decoded_at_once(None, vae, (2048, 2048)) == ((2048, 2048), 1)


def test_predict_takes_the_tiles_decoder() -> None:
    sizes = ("sizes=[[512, 512]]", "gates={}")
    whole, tiled = (
        recipe_model(loaded, read_source(loaded)).decoder
        for loaded in (
            load_recipe(ROOT / "recipes" / "flux2-nano-rtx.yaml", (*QUICK, *sizes, *more))
            for more in ((), ("vae={tile: [128, 256]}",))
        )
    )
    assert tiled == pytest.approx(whole / 8, rel=1e-6)


# Recipes.


def checked(*changes: str) -> None:
    loaded = load_recipe(ROOT / "recipes" / "flux2-nano-rtx.yaml", (*QUICK, *changes))
    check_targets(TargetContext(loaded.recipe, read_source(loaded)))


LARGE = "sizes=[[256, 256], [64, 64]]"


@pytest.mark.parametrize(
    ("sizes", "vae", "says"),
    [
        (LARGE, "{tile: [100, 64]}", r"vae\.tile: 100x64 is not possible: .* multiples of 8"),
        (LARGE, "{tile: [64, 56]}", r"vae\.tile: 64x56 is too small: a tile has at least 8 tokens a side, 64 pixels"),
        (LARGE, "{tile: [256, 256]}", r"vae\.tile: no size is larger than 256x256, so .* lower it, or leave `vae` out"),
        (LARGE, "{tile: [64, 64], overlap: 0.6}", r"vae\.overlap: must be at least 0 and at most 0\.5, got 0\.6"),
        (LARGE, "{tile: [64, 64], overlap: -0.1}", r"vae\.overlap: must be at least 0 and at most 0\.5, got -0\.1"),
        (LARGE, "{tile: [0, 64]}", r"vae\.tile\[0\]: must be at least 1"),
        (LARGE, "{tile: 64}", r"vae\.tile: .*list"),
        (LARGE, "{overlap: 0.25}", r"vae\.tile"),
        (
            "sizes=[[12000, 12000]]",
            "{tile: [8000, 8000]}",
            r"at 8000x8000 the VAE's decoder has an activation of .*; use a smaller vae\.tile, or sizes of at most",
        ),
    ],
)
def test_tiles_that_cannot_be_are_refused(sizes: str, vae: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        checked(sizes, f"vae={vae}")


def test_a_size_too_large_to_be_decoded_whole_is_taken_in_tiles() -> None:
    with pytest.raises(RecipeError, match=r"use the recipe's vae: \{tile: \[512, 512\]\} to decode in tiles, or sizes"):
        checked("sizes=[[12000, 12000]]")
    checked("sizes=[[12000, 12000]]", "vae={tile: [512, 512]}")
    checked(
        "sizes=[[12000, 12000], [64, 64]]", "vae={tile: [512, 512]}", "targets=[{kind: tensorrt_rtx, shapes: range}]"
    )
