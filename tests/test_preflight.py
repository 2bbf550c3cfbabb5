"""What `plan` refuses and what `build` refuses before its first stage are the same: message, exit code, nothing written."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from conftest import NANO, RECIPE, ROOT, copy_checkpoint
from fluxc.base.cache import StageCache
from fluxc.base.measured import Origin
from fluxc.base.progress import StageProgress
from fluxc.build.requests import calibration_request, trace_request
from fluxc.calibrate.file import write_calibration
from fluxc.cli.main import main
from fluxc.recipe.load import load_recipe
from fluxc.stepcache.file import write_trace
from fluxc.stepcache.trace import StepTrace

STEPS = ("sampling.steps=20", "step_cache={skip: auto}")
DIGESTS = {"": {"model_index.json": "0" * 64}}


def write_one_layer(path: Path, changes: tuple[str, ...]) -> None:
    """A calibration file that measured no layer, on another checkpoint."""
    write_calibration(
        path, Origin(DIGESTS, calibration_request(load_recipe(RECIPE, changes), is_large=False), "cpu", {}), {}
    )


def write_random_trace(path: Path, changes: tuple[str, ...], digests: dict[str, dict[str, str]]) -> None:
    """A trace of noise, which no polynomial explains."""
    request = trace_request(load_recipe(RECIPE, changes))
    images, steps, random = len(request["prompts"]), request["steps"], np.random.default_rng(0)
    trace = StepTrace(
        change=random.random((images, steps)),
        residual_change=random.random((images, steps, 1)),
        latent_change=random.random((images, steps, 1)),
        residual_error=random.random((images, steps, 6)),
        latent_error=random.random((images, steps, 6)),
    )
    write_trace(path, Origin(digests, request, "cpu", {}), list(range(images)), trace)


FAULTS: list[tuple[tuple[str, ...], str]] = [
    (("fidelity.prompts=none.txt",), "fidelity.prompts: cannot read"),
    (("calibration.prompts=none.txt", "fidelity.prompts=no.txt"), "2 things are wrong:"),
    ((*STEPS, "step_cache.prompts=none.txt"), "step_cache.prompts: cannot read"),
    ((*STEPS, "step_cache.prompts=../tests/data/two-prompts.txt"), "2 prompts are too few"),
    (("fidelity.seed=18446744073709551614",), "must be less than 2^64"),
    (("text.length=4",), "and text.length is 4; shorten it, or set text.length to at least"),
    (("sizes=[[60, 64]]",), "height and width must be multiples of 8"),
    (("sizes=[[60, 64]]", "precision.transformer.exclude=[x_embeder, proj_uot]"), "3 things are wrong:"),
    (("calibration.size=[60, 64]",), "calibration.size: 60x64 is not possible"),
    (("sizes=[[60, 64]]", "calibration.size=[32, 30]"), "2 things are wrong:"),
    (("sizes=[[16384, 16384]]",), "kernels index 2,147,483,647"),
    (("precision.transformer.rules=[{match: 're:(', format: fp8}]",), "is not a regular expression"),
    (("precision.text_encoder.preset=nvidia-blog",), "names layers of the transformer"),
    (("precision.transformer.preset=nvidia-blogg",), "there is no preset 'nvidia-blogg'"),
    (("precision.transformer.default=int4",), "there is no format 'int4'"),
    (("targets=[{kind: tensorrt_rtx, gpus: 3}, {kind: onnxruntime}]",), "cannot be shared equally"),
    (("targets=[{kind: onnxruntime}, {kind: onnxruntime, gpus: 5}]",), "among 5 GPUs"),
    (("targets=[{kind: onnxruntime, gpus: 2}]",), "add the same target without gpus"),
    (("targets=[{kind: tensorrt_rtx, compute_capabilities: ['10.0']}, {kind: onnxruntime}]",), "kind: tensorrt does"),
    (("targets=[{kind: tensorrt, compute_capabilities: ['9.0']}, {kind: onnxruntime}]",), "do not compute in nvfp4"),
    (("targets=[{kind: tensorrt, compute_capabilities: ['10.0', '12.0']}, {kind: onnxruntime}]",), "give one"),
    (
        ("targets=[{kind: tensorrt_rtx, weights: baked, memory_gib: 1.0001}, {kind: onnxruntime}]",),
        "cannot be baked in",
    ),
    (("targets=[{kind: visual_gen}, {kind: onnxruntime}]",), "VisualGen takes every image token for 16 pixels"),
    (
        ("targets=[{kind: tensorrt}]", "gates={step_cosine: 0.97}"),
        "gates.step_cosine: no target of this recipe runs on the machine",
    ),
    (("calibration.file=none",), "calibration.file: "),
    (("calibration.file=../README.md",), "calibration.file: "),
    ((*STEPS, "step_cache.trace=none"), "step_cache.trace: "),
    ((*STEPS, "fidelity.lpips=none.pth"), "fidelity.lpips: there is no file"),
    ((*STEPS, "fidelity.image_text=none"), "fidelity.image_text: there is no folder"),
    ((*STEPS, "fidelity.image_text=prompts"), "does not hold a CLIP model"),
    (("model.source=./none",), "model.source: "),
    (("model.source=.",), "there is no model_index.json"),
    (("calibration.engine=modelopt",), "calibration.engine: modelopt needs"),
    (("calibration={engine: none, amax: mse}",), "calibration.amax: mse needs measured inputs"),
    (("calibration={engine: none, amax: percentile}",), "calibration.amax: percentile needs measured inputs"),
    (("calibration={engine: none, file: nano.calibration}",), "calibration.file: holds measured inputs"),
    (
        ("calibration.engine=none", "precision.transformer={exclude: auto, budget: {share: 0.1}, default: nvfp4}"),
        "precision.transformer.exclude: auto runs the model on calibration's prompts",
    ),
    ((*STEPS, "calibration={engine: none}"), "step_cache.prompts: is missing"),
    (
        ("precision.transformer={exclude: auto, budget: {share: 0.1}, default: bf16}",),
        "auto has nothing to choose from",
    ),
]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: None):
    """Runs plan and build with changes; the message and exit code that both gave."""
    place = tmp_path / "place"
    place.mkdir()

    def no_stage(*_: object) -> None:
        raise AssertionError("a stage was started")

    monkeypatch.setattr(StageCache, "run", no_stage)

    def run(changes: tuple[str, ...], out: Path | None = None) -> tuple[str, int]:
        # The recipe's own ask for the targets that it has.
        ungated = () if any(change.startswith("gates") for change in changes) else ("gates={}",)
        options = [option for change in (*ungated, *changes) for option in ("--set", change)]
        before = sorted(tmp_path.rglob("*"))
        found = [
            CliRunner().invoke(main, [verb, str(RECIPE), *options, "--out", str(out or place / "bundle")])
            for verb in ("plan", "build")
        ]
        assert sorted(tmp_path.rglob("*")) == before
        # Libraries that are imported for the first time may say something of their own before.
        said = [result.stderr[result.stderr.index("fluxc: ") :] for result in found]
        assert said[0] == said[1]
        assert found[0].exit_code == found[1].exit_code
        assert "Traceback" not in said[0]
        return said[0], found[0].exit_code

    return run


@pytest.mark.parametrize(("changes", "expected"), FAULTS, ids=[" ".join(changes)[:70] for changes, _ in FAULTS])
def test_plan_and_build_refuse_the_same(changes: tuple[str, ...], expected: str, refused) -> None:
    message, code = refused(changes)
    assert expected in message
    assert "--set " in message or re.search(r"flux2-nano\.yaml(, line \d+)?: ", message)
    # A library that is not here, or a damaged model, is a failure and no wrong recipe.
    assert code == (1 if "modelopt needs" in message or "CLIP model" in message else 2)


def test_they_refuse_a_library_that_is_missing(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    message, code = refused(("targets=[{kind: onnxruntime}, {kind: tensorrt_rtx}]",))
    assert "targets[1]: " in message
    assert "tensorrt-rtx-cu13 is not installed here" in message
    assert code == 1


def test_they_refuse_a_library_that_loses_the_ranks_of_its_plans(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxc.targets.tensorrt import kind, library

    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__name__="tensorrt", __version__="11.1.0"))
    monkeypatch.setattr(kind, "gpu_here", lambda _: True)
    assert library.installed_version("tensorrt") == "11.1.0"
    message, code = refused(("targets=[{kind: tensorrt, gpus: 2}, {kind: onnxruntime}]",))
    assert "targets[0]: TensorRT 11.1.0 can lose the number of ranks of a sharded plan" in message
    assert code == 1


@pytest.mark.parametrize("verb", ["calibrate", "trace"])
def test_a_gpu_that_is_not_here_is_missed_before_anything_is_hashed(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    changes = ["--set", "sampling.steps=20", "--set", "step_cache={skip: auto}"]
    result = CliRunner().invoke(
        main, [verb, str(RECIPE), *changes, "--device", "cuda", "--out", str(tmp_path / "file")]
    )
    assert "torch sees no CUDA GPU here" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["plan", "build", "calibrate", "trace", "predict"])
def test_a_model_in_place_of_a_recipe_is_sent_to_init(verb: str, tmp_path: Path, quick_bundle: Path) -> None:
    options = ["--on", "b200"] if verb == "predict" else ["--out", str(tmp_path / "out")]
    for given, said in (
        ("black-forest-labs/FLUX.2-klein-4B", "`fluxc init black-forest-labs/FLUX.2-klein-4B` writes a recipe"),
        ("klein-4b", "`fluxc init klein-4b` writes a recipe"),
        (str(NANO), f"is a checkpoint, not a recipe; `fluxc init {NANO}` writes a recipe"),
        (str(quick_bundle), "is a bundle, which is built already"),
        (str(ROOT / "docs"), "is a folder, not a recipe"),
    ):
        result = CliRunner().invoke(main, [verb, given, *options])
        assert result.exit_code == 2, result.output
        assert said in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_plan_shows_its_tables_before_it_says_what_the_machine_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    recipe = ROOT / "recipes" / "flux2-nano-rtx.yaml"
    result = CliRunner().invoke(main, ["plan", str(recipe), "--out", str(tmp_path / "x")])
    assert result.exit_code == 1
    assert "stages of a build here" in result.stdout
    as_json = CliRunner().invoke(main, ["plan", str(recipe), "--json", "--out", str(tmp_path / "x")])
    assert as_json.exit_code == 1
    (lacking,) = json.loads(as_json.stdout)["lacking_here"]
    assert "tensorrt-rtx-cu13 is not installed here" in lacking


def test_they_refuse_calibrations_of_other_checkpoints_and_without_the_layers(refused, tmp_path: Path) -> None:
    file = tmp_path / "empty.safetensors"
    write_one_layer(file, ())
    message, code = refused((f"calibration.file={file}",))
    assert "it lacks the inputs of transformer layer" in message
    assert code == 2
    message, code = refused((f"calibration.file={file}", "precision.transformer.default=bf16"))
    assert "made from another checkpoint: model_index.json is a different file there" in message
    assert code == 2
    message, code = refused((f"calibration.file={file}", "calibration.seed=7"))
    assert "made with other seed (0 there, 7 in the recipe)" in message
    assert code == 2


def test_they_refuse_a_trace_that_nothing_can_be_fitted_to(refused, tmp_path: Path) -> None:
    import hashlib

    from fluxc.checkpoint.files import checkpoint_digests
    from fluxc.checkpoint.source import open_checkpoint

    digests = checkpoint_digests(
        open_checkpoint(str(NANO), None, ROOT),
        lambda file: hashlib.sha256(file.read_bytes()).hexdigest(),
        lambda *_: None,
    )
    steps = ("sampling.steps=20", "step_cache={skip: 4, prompts: prompts/flux2-nano-steps.txt}")
    file = tmp_path / "noise.safetensors"
    write_random_trace(file, steps, digests)
    message, code = refused((*steps, f"step_cache.trace={file}"))
    assert "the fit explains too little" in message
    assert code == 2


@pytest.mark.parametrize(("damage", "expected"), [("tokenizer/tokenizer.json", "there is no tokenizer.json")])
def test_a_damaged_checkpoint_is_a_failure_of_both(damage: str, expected: str, refused, tmp_path: Path) -> None:
    copy = copy_checkpoint(tmp_path / "nano")
    (copy / damage).unlink()
    message, code = refused((f"model.source={copy}",))
    assert expected in message
    assert code == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [("folder", "exists and is not a bundle"), ("file/below", "is not a folder"), ("file", "exists")],
)
def test_they_refuse_a_place_where_no_bundle_can_be(name: str, expected: str, refused, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    message, _ = refused((), tmp_path / name)
    assert expected in message


def test_a_hash_that_would_take_long_is_left_to_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxc.build import preflight
    from fluxc.build.job import open_job

    monkeypatch.setattr(preflight, "HASHED_AT_ONCE", 0)
    recorded = {"transformer": {"diffusion_pytorch_model.safetensors": "1" * 64}}
    job = open_job(load_recipe(RECIPE), tmp_path)
    digests = preflight._digests(job, StageCache(tmp_path / "cache", StageProgress()), recorded)
    assert digests["transformer"]["diffusion_pytorch_model.safetensors"] == "1" * 64
