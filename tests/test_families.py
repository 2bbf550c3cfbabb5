"""Small random models of every family, against diffusers: images alone and at once, in three sizes, on every kind of target."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fluxrt
from conftest import NANO, NANO_DEV, ROOT, compile_into, copy_checkpoint
from fluxc.base.errors import BuildError
from fluxc.fidelity.compare import check_at_once
from fluxc.fidelity.metrics import psnr, relative_error
from fluxc.rehearsal.gpu import FakeDriver, FakeLibrary
from fluxc.rehearsal.place import MadeUpPlace
from fluxrt.backends import Backend
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend
from fluxrt.backends.tensorrt import TensorRTBackend
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.evidence import read_evidence
from fluxrt.group import Group
from fluxrt.pipeline import Pipeline
from fluxrt.request import Request
from fluxrt.verify import TargetChecked, check_target, lines_of
from quick import QUICK
from ranks import on_every_rank
from test_ulysses_gpu import CAPSULE, kernel_cache  # noqa: F401

SIZES = ((64, 64), (32, 96), (128, 64))
FAMILIES = ("klein", "klein-base", "dev")
PROMPTS = ["a large red circle", "a ring", "two small squares at the top"]
SIGMA = 0.6
PLAIN = "precision={transformer: {default: bf16}, text_encoder: {default: bf16}}"


def random_checkpoint(root: Path, family: str) -> Path:
    """A pipeline of the family, small and with random weights; its tokenizer is flux2-nano's or flux2-nano-dev's."""
    import diffusers
    import transformers

    source = NANO_DEV if family == "dev" else NANO
    copy_checkpoint(root, source)
    index = json.loads((root / "model_index.json").read_text())
    if family == "klein":
        index["is_distilled"] = True
    (root / "model_index.json").write_text(json.dumps(index))
    torch.manual_seed(FAMILIES.index(family))
    for name, more in (
        ("transformer", {"num_layers": 1, "num_single_layers": 2}),
        ("text_encoder", {}),
        ("vae", {}),
    ):
        library, class_name = index[name]
        model_class = getattr(diffusers if library == "diffusers" else transformers, class_name)
        config = json.loads((root / name / "config.json").read_text()) | more
        made: Any = (
            model_class.from_config(config)
            if library == "diffusers"
            else model_class(model_class.config_class.from_dict(config))
        )
        for file in (root / name).glob("*.safetensors"):
            file.unlink()
        made.to(torch.bfloat16).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module", params=FAMILIES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    family = request.param
    root = tmp_path_factory.mktemp(family)
    checkpoint = random_checkpoint(root / "checkpoint", family)
    on_cpu = "{kind: onnxruntime}, {kind: onnxruntime, gpus: 2}"
    on_gpus = "{kind: onnxruntime, device: cuda}"
    engines = "{kind: tensorrt_rtx, shapes: range}, {kind: tensorrt_rtx, gpus: 2, shapes: range}"
    return open_bundle(
        compile_into(
            root / "bundle",
            *QUICK,
            f"model.source={checkpoint}",
            f"sizes={json.dumps(SIZES)}",
            "batches=[1, 3]",
            f"sampling.guidance={1.0 if family == 'klein' else 2.5}",
            PLAIN,
            f"targets=[{on_cpu}, {on_gpus}, {engines}]",
            recipe=ROOT / "recipes" / ("flux2-nano-dev.yaml" if family == "dev" else "flux2-nano.yaml"),
        )
    )


def velocities(pipeline: Pipeline, latents: np.ndarray, text: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    pipeline.begin(latents, pipeline.grid(size), pipeline.bundle.manifest.sampling.guidance, text)
    pipeline.step(SIGMA, SIGMA + 1)
    moved: np.ndarray = pipeline.backend.get("latents") - latents
    return moved


def noise(pipeline: Pipeline, size: tuple[int, int], images: int) -> np.ndarray:
    rows, columns = pipeline.grid(size)
    shape = (images, rows * columns, pipeline.bundle.manifest.sampling.latent_channels)
    return np.random.default_rng(rows).standard_normal(shape, dtype=np.float32)


def of_diffusers(
    transformer: Any, bundle: Bundle, latents: np.ndarray, text: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """The guided velocities of diffusers' transformer, all images in one call."""
    from diffusers import Flux2KleinPipeline

    sampling = bundle.manifest.sampling
    branches = len(text) // len(latents)
    rows, columns = (side // sampling.pixels_per_token for side in size)
    embeds = transformer.config.guidance_embeds
    with torch.no_grad():
        found = transformer(
            hidden_states=torch.from_numpy(latents).repeat_interleave(branches, 0),
            encoder_hidden_states=torch.from_numpy(text),
            timestep=torch.full((len(text),), SIGMA),
            guidance=torch.full((len(text),), sampling.guidance) if embeds else None,
            img_ids=Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 16, rows, columns)),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(torch.from_numpy(text[:1])),
            return_dict=False,
        )[0]
    found = found.unflatten(0, (len(latents), branches))
    if branches == 2:
        return (found[:, 1] + sampling.guidance * (found[:, 0] - found[:, 1])).numpy()
    return found[:, 0].numpy()


def texts(pipeline: Pipeline) -> np.ndarray:
    """The embeddings of PROMPTS, the branches of a prompt side by side."""
    guidance = pipeline.bundle.manifest.sampling.guidance
    return np.concatenate([pipeline.encode_text(prompt, guidance) for prompt in PROMPTS])


def test_every_stage_equals_diffusers(bundle: Bundle) -> None:
    """Text, prologue, velocity, decoder and image, one at a time and three at once; the gates are flux2-nano's."""
    figures = bundle.manifest.fidelity.targets["onnxruntime"]
    for stage in ("text_error", "prologue_error", "step_error", "decode_error"):
        assert figures[stage] <= 1e-3, stage
    assert figures["image_psnr_db_worst"] >= 50
    assert figures["at_once"]["3"]["step_error"] <= 1e-3
    assert figures["at_once"]["3"]["difference"] <= 1e-5


def test_every_size_and_batch_on_every_target_equals_diffusers(bundle: Bundle) -> None:
    """fp32 on the CPU; on GPUs the graphs that TensorRT and ONNX Runtime get, in bf16, in ONNX's evaluator."""
    from diffusers import Flux2Transformer2DModel

    source = bundle.manifest.provenance.source
    transformer = Flux2Transformer2DModel.from_pretrained(Path(source) / "transformer", torch_dtype=torch.float32)
    place = MadeUpPlace()
    with Pipeline(bundle, target="onnxruntime") as cpu:
        text = texts(cpu)
        each = len(text) // len(PROMPTS)
        wanted, decoded = {}, {}
        for size in SIZES:
            latents = noise(cpu, size, 3)
            wanted[size] = of_diffusers(transformer, bundle, latents, text, size)
            assert relative_error(velocities(cpu, latents, text, size), wanted[size]) < 1e-4
            assert relative_error(velocities(cpu, latents[:1], text[:each], size), wanted[size][:1]) < 1e-4
            assert relative_error(velocities(cpu, latents[:2], text[: 2 * each], size), wanted[size][:2]) < 1e-4
            decoded[size] = cpu.decode(latents[:1], cpu.grid(size))
        for name in ("tensorrt_rtx", "onnxruntime-cuda"):
            backend = place.backend(bundle, bundle.target(name), place.driver(), True)
            with Pipeline(bundle, target=name, backend=backend) as gpu:
                for size, images in itertools.product(SIZES, (1, 3)):
                    latents = noise(cpu, size, images)
                    found = velocities(gpu, latents, text[: images * each], size)
                    assert relative_error(found, wanted[size][:images]) < 5e-2, (name, size)
                    assert relative_error(gpu.decode(latents[:1], gpu.grid(size)), decoded[size]) < 5e-2
                ids, mask = cpu.tokenize(cpu.branches(PROMPTS[0], bundle.manifest.sampling.guidance))
                gpu.begin(latents[:1], gpu.grid(size), 1.0, [(ids, mask)])
                if name == "tensorrt_rtx":
                    assert relative_error(gpu.backend.get("text"), text[:each]) < 5e-2
                    assert relative_error(gpu.encode_text(PROMPTS[0], 2.5 if each == 2 else 1.0), text[:each]) < 5e-2


def test_images_made_at_once_are_those_made_alone(bundle: Bundle) -> None:
    """Resident and staged, in two processes too; a last group that is smaller; the order of what is told."""
    prompts = [*PROMPTS, PROMPTS[0], PROMPTS[1]]
    with fluxrt.load(bundle.root, target="onnxruntime") as pipeline:
        alone = pipeline(prompts, seed=7, size=(32, 96))
        told: list[tuple[int, int]] = []
        given: list[int] = []
        request = Request(prompts, seed=7, size=(32, 96), batch=3)
        together = pipeline.generate(
            request, lambda done, total: told.append((done, total)), lambda number, *_: given.append(number)
        )
    assert told == [(3, 15), (6, 15), (9, 15), (11, 15), (13, 15), (15, 15)][: len(told)]
    assert len(told) == 6
    assert given == [0, 1, 2, 3, 4]
    assert together.skipped == [()] * 5
    for ours, theirs in zip(together.images, alone.images, strict=True):
        assert psnr(np.asarray(ours) / 255, np.asarray(theirs) / 255) > 55
    with fluxrt.load(bundle.root, target="onnxruntime", memory="staged") as pipeline:
        assert [i.tobytes() for i in pipeline.generate(request).images] == [i.tobytes() for i in together.images]
    for memory in ("resident", "staged"):
        with fluxrt.load(bundle.root, gpus=2, memory=memory) as ranked:
            given.clear()
            shared = ranked.generate(request, on_image=lambda number, *_: given.append(number))
            assert given == [0, 1, 2, 3, 4]
            for ours, theirs in zip(shared.images, alone.images, strict=True):
                assert psnr(np.asarray(ours) / 255, np.asarray(theirs) / 255) > 55


def test_two_ranks_of_tensorrt_compute_three_images_at_once(bundle: Bundle) -> None:
    target = bundle.target("tensorrt_rtx-2gpus")
    with Pipeline(bundle, target="onnxruntime") as cpu:
        text = texts(cpu)
        latents = {size: noise(cpu, size, 3) for size in SIZES}
        wanted = {size: velocities(cpu, latents[size], text, size) for size in SIZES}

    def work(group: Group) -> list[np.ndarray]:
        driver = FakeDriver()
        library = FakeLibrary(bundle, target, driver, None, group)
        backend = TensorRTBackend(bundle, target, driver, library, group, CAPSULE)
        pipeline = Pipeline(bundle, target=target.name, group=group, backend=backend)
        moved = []
        for size in SIZES:
            pipeline.begin(latents[size], pipeline.grid(size), bundle.manifest.sampling.guidance, text)
            pipeline.step(SIGMA, SIGMA + 1)
            moved.append(pipeline.latents() - latents[size])
        return moved

    for size, one, other in zip(SIZES, *on_every_rank(2, work), strict=True):
        np.testing.assert_array_equal(one, other)
        assert relative_error(one, wanted[size]) < 5e-2, size


def test_what_cannot_be_made_at_once_is_said(bundle: Bundle) -> None:
    with fluxrt.load(bundle.root, target="onnxruntime") as pipeline:
        with pytest.raises(
            fluxrt.RequestError, match="batch 4 was not compiled: this bundle makes up to 3 images at once"
        ):
            pipeline(PROMPTS, batch=4)
        with pytest.raises(fluxrt.RequestError, match="batch must be at least 1"):
            pipeline(PROMPTS, batch=0)


def test_a_profile_for_several_images_serves_fewer_too(bundle: Bundle) -> None:
    profiles = bundle.target("tensorrt_rtx").engine.plans["single"].profiles
    tokens = (48, 64, 128)
    wanted = [(1, 2, 2), (2, 6, 6)] if bundle.manifest.sampling.cfg_batch else [(1, 1, 1), (2, 3, 3)]
    assert profiles == tuple({"batch": batch, "tokens": tokens} for batch in wanted)


def replayed(bundle: Bundle, name: str, backend: Callable[[], Backend | None]) -> TargetChecked:
    evidence = bundle.manifest.recorded
    assert evidence is not None
    target, recorded = bundle.target(name), read_evidence(bundle, evidence)
    return check_target(bundle, evidence, target, recorded, lambda: Pipeline(bundle, target=name, backend=backend()))


def test_evidence_is_replayed_at_once_too(bundle: Bundle) -> None:
    found = replayed(bundle, "onnxruntime", lambda: None)
    assert (found.status, found.why) == ("passed", "")
    (three,) = found.at_once
    assert (three.images, three.error < 1e-3, three.difference < 1e-5) == (3, True, True)
    assert any(line.startswith("  3 images at once: velocity error ") for line in lines_of(found))
    place = MadeUpPlace()
    engine = bundle.target("tensorrt_rtx")
    found = replayed(bundle, "tensorrt_rtx", lambda: place.backend(bundle, engine, place.driver(), True))
    assert (found.status, found.why) == ("passed", "")
    assert found.at_once[0].difference < 1e-2


def test_images_that_mix_are_found(bundle: Bundle) -> None:
    class Mixing(OnnxRuntimeBackend):
        def put(self, name: str, array: np.ndarray) -> None:
            super().put(name, np.repeat(array[:1], len(array), axis=0) if name == "latents" else array)

    found = replayed(bundle, "onnxruntime", lambda: Mixing(bundle, bundle.target("onnxruntime")))
    assert found.status == "failed"
    assert found.why.startswith("target onnxruntime: of 3 images made at once one has a velocity with relative error ")
    alone = bundle.manifest.fidelity.targets["onnxruntime"]["step_error"]
    with pytest.raises(BuildError, match="its graphs mix images, no bundle was written"):
        check_at_once("onnxruntime", found.at_once, alone)
