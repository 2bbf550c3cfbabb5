"""The trace of the model that will run: against the compiled graphs, beside that of the checkpoint's own, and refusals."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fluxrt
from conftest import RECIPE, RecordingProgress, compile_into
from fluxc.base.errors import RecipeError
from fluxc.build.build import build
from fluxc.build.job import open_job
from fluxc.build.measure import merge_to_file, trace_to_file
from fluxc.calibrate.simulated import Rounded
from fluxc.checkpoint.reference import Generation
from fluxc.cli.main import main
from fluxc.quantize.source import read_source
from fluxc.recipe.load import load_recipe
from fluxc.recipe.structs import LAGS
from fluxc.running.placement import Placement
from fluxc.stepcache.choose import make_step_cache
from fluxc.stepcache.file import Origin, read_trace, write_trace
from fluxc.stepcache.record import record_steps
from fluxc.stepcache.trace import StepTrace
from fluxrt.bundle import open_bundle
from fluxrt.pipeline import starting_noise
from fluxrt.schedule import SCHEDULES
from quick import QUICK, results_of

STEPS = 10
PROMPTS = "../tests/data/eight-prompts.txt"
CHANGES = (
    *QUICK,
    f"sampling.steps={STEPS}",
    "calibration={steps: 3, prompts: ../tests/data/two-prompts.txt, margin: 1}",
    "precision.transformer.rounding=gptq",
    "precision.text_encoder={default: nvfp4}",
    "targets=[{kind: onnxruntime, activations: nvfp4}]",
)
CACHE = f"prompts: {PROMPTS}, skip: 3, frontier: [], min_r2: -9"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traced")


@pytest.fixture(scope="module")
def bundle(made: Path) -> Path:
    """Solved NVFP4 weights, a text encoder in NVFP4, inputs rounded; both models traced, 8 prompts of 10 steps."""
    return compile_into(made / "bundle", *CHANGES, f"step_cache={{{CACHE}, compare: true}}")


@pytest.fixture(scope="module")
def traces(bundle: Path, shared_cache: Path) -> dict[str, Path]:
    """By what was traced, the files."""
    files = [path / "trace.safetensors" for path in results_of(shared_cache, bundle) if "step-trace-" in path.name]
    return {
        "reference" if read_trace(file).origin.request["precision"] is None else "quantized": file for file in files
    }


def errors_of(bundle: Path, prompt: str, number: int) -> np.ndarray:
    """The error of reuse [steps, LAGS] by the compiled graphs, at the latents that they come to themselves."""
    pipeline = fluxrt.load(bundle)
    grid = pipeline.grid(None)
    tokens = grid[0] * grid[1]
    noise = starting_noise(number, tokens, pipeline.bundle.manifest.sampling.latent_channels)
    pipeline.begin(noise[None], grid, 1.5, pipeline.tokenize([prompt, ""]))
    backend, residuals = pipeline.backend, []
    backend.put("previous_signal", np.zeros((1, 64, 128), np.float32))
    errors = np.full((STEPS, LAGS), np.inf)
    for step, (sigma, following) in enumerate(itertools.pairwise(SCHEDULES["flux2-flow-match"](tokens, STEPS))):
        backend.put("sigma", np.array(sigma, np.float32))
        backend.put("next_sigma", np.array(following, np.float32))
        backend.run(("prologue", "signal", "body"), {"signal": "previous_signal"})
        residual = backend.get("residual")
        backend.run(("epilogue",))
        after = backend.get("next_latents")
        for lag, old in enumerate(residuals[::-1][:LAGS]):
            backend.put("residual", old)
            backend.run(("epilogue",))
            errors[step, lag] = np.sqrt(np.square(backend.get("next_latents") - after).mean())
        residuals.append(residual)
        backend.put("latents", after)
    return errors


def test_the_trace_is_of_the_model_that_runs(bundle: Path, traces: dict[str, Path]) -> None:
    """Simulated in torch, against ONNX Runtime on the bundle's own weights. A value that lies near the middle of two falls to
    either side, so runs part; the checkpoint's own model is much farther."""
    files = {name: read_trace(path) for name, path in traces.items()}
    prompts = files["quantized"].origin.request["prompts"]
    distance = dict.fromkeys(files, 0.0)
    for number in range(3):
        found = errors_of(bundle, prompts[number], number)
        known = np.isfinite(found)
        for name, file in files.items():
            recorded = file.trace.residual_error[number]
            assert (np.isfinite(recorded) == known).all()
            distance[name] += float(np.mean(np.abs(recorded[known] / found[known] - 1))) / 3
    assert distance["quantized"] < 0.05
    assert distance["reference"] > 3 * distance["quantized"]


def test_a_build_says_which_model_was_traced_and_what_the_other_gives(bundle: Path, traces: dict[str, Path]) -> None:
    manifest = open_bundle(bundle).manifest
    cache = manifest.step_cache
    assert manifest.provenance.computed["step cache"].endswith("the model as planned, weights and inputs rounded")
    assert manifest.provenance.measured["step cache"] == f"8 prompts, {STEPS} steps, 64x64"
    trace = {name: read_trace(path).trace for name, path in traces.items()}
    settings = load_recipe(RECIPE, (*CHANGES, f"step_cache={{{CACHE}}}")).recipe.step_cache
    for name, schedule in (("quantized", list(cache.schedule)), ("reference", cache.fit["reference"]["schedule"])):
        assert list(make_step_cache(settings, trace[name], (64, 64)).schedule) == schedule
    other = cache.fit["reference"]
    # No schedule has less error on the images it was made of than the one that was made of them.
    held = [number for number in range(8) if number % 4 == 3]
    errors = trace["quantized"].of(held).residual_error
    for schedule, said in ((cache.schedule, cache.fit), (other["schedule"], other)):
        total, last, lag = 0.0, -2, 0
        for step in schedule:
            lag = lag + 1 if step == last + 1 else 1
            total, last = total + float(errors[:, step, lag - 1].mean()), step
        assert said["accumulated_error"]["static"] == pytest.approx(total, rel=1e-3)
    report = json.loads((bundle / "report" / "report.json").read_text())["step_cache"]
    assert report["fit"]["reference"] == other
    assert report["reference"]["computed"] == STEPS - 3
    assert report["reference"]["by_prompt"][0]["skipped"] == other["schedule"]
    if other["schedule"] == list(cache.schedule):
        assert report["reference"]["psnr_db"] == report["chosen"]["psnr_db"]
    page = (bundle / "report" / "index.html").read_text()
    assert "Fitted on the model that runs, and on the checkpoint's own" in page.replace("&#39;", "'")
    told = CliRunner().invoke(main, ["inspect", str(bundle)]).output
    assert f"fitted on the checkpoint's own model it would have R2 {other['residual']['r2']}" in " ".join(told.split())


def test_a_model_that_is_read_layer_by_layer_is_rounded_too(bundle: Path, traces: dict[str, Path]) -> None:
    """The same numbers, whatever is in memory at a time."""
    file = read_trace(traces["quantized"])
    source = read_source(load_recipe(RECIPE, CHANGES))
    rounded = {
        name: Rounded(plan, "max", True, assumed={entry.layer.name: 8.0 for entry in plan})
        for name, plan in source.plans.items()
    }
    generation = Generation((64, 64), 3, 1.5, 0, 32, (9, 18, 27))
    found = {}
    for pieces in ("component", "layer"):
        for how in (rounded, {}):
            placement = Placement("cpu", torch.float32, pieces)
            origin = replace(file.origin, request={"prompts": ["a red circle"], "steps": 3})
            work = bundle.with_name(f"work-{pieces}-{len(how)}")
            model = (source.checkpoint, how)
            found[pieces, len(how)] = record_steps(
                model, ["a red circle"], [0], generation, 2, origin, placement, work
            ).residual_error
    for layers in (0, 2):
        assert np.array_equal(found["component", layers], found["layer", layers])
    assert not np.allclose(found["layer", 0], found["layer", 2], rtol=1e-3)


def test_nothing_of_the_reference_depends_on_how_layers_are_rounded(bundle: Path, made: Path) -> None:
    """Another format traces the model that runs again, and not the checkpoint's own; `until` comes to both."""
    progress = RecordingProgress()
    changes = (*CHANGES, "precision.text_encoder={default: bf16}", f"step_cache={{{CACHE}, compare: true}}")
    assert build(load_recipe(RECIPE, changes), made / "other", progress, "step-cache") is None
    assert "trace steps" in progress.ran
    assert "trace steps of the reference" in progress.found
    assert "solve transformer weights" in progress.found
    assert not [title for title in progress.ran if title.startswith("write")]


def test_parts_are_traced_elsewhere_as_the_build_would(bundle: Path, traces: dict[str, Path], tmp_path: Path) -> None:
    loaded = load_recipe(RECIPE, (*CHANGES, f"step_cache={{{CACHE}}}"))
    for number in (1, 2):
        progress = RecordingProgress()
        trace_to_file(loaded, tmp_path / f"{number}.trace", "cpu", (number, 2), progress)
        assert "trace steps" in progress.ran
        assert {"calibrate", "solve transformer weights"} <= set(progress.found)
    merged = merge_to_file([tmp_path / "1.trace", tmp_path / "2.trace"], tmp_path / "whole.trace")
    assert merged.path.read_bytes() == traces["quantized"].read_bytes()


def written(path: Path, precision: object, changes: tuple[str, ...]) -> Path:
    """A trace file for a recipe with `changes`, said to be of a model with this `precision`."""
    from fluxc.build.requests import trace_request

    request = trace_request(load_recipe(RECIPE, changes)) | {"precision": precision}
    images = len(request["prompts"])
    ones = {name: np.ones((images, STEPS, 2)) for name in ("residual_change", "latent_change")}
    errors = {name: np.ones((images, STEPS, LAGS)) for name in ("residual_error", "latent_error")}
    trace = StepTrace(change=np.ones((images, STEPS)), **ones, **errors)
    write_trace(path, Origin({}, request, "cpu", {}), list(range(images)), trace)
    return path


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    plain = f"step_cache={{{CACHE}}}"
    file = written(tmp_path / "reference.trace", None, (*CHANGES, plain))
    named = f"step_cache={{{CACHE}, trace: {file}}}"
    with pytest.raises(
        RecipeError, match=r"is of the checkpoint's own model; trace again.*step_cache\.traced: reference"
    ):
        open_job(load_recipe(RECIPE, (*CHANGES, named)), tmp_path)
    open_job(load_recipe(RECIPE, (*CHANGES, f"step_cache={{{CACHE}, traced: reference, trace: {file}}}")), tmp_path)
    file = written(tmp_path / "other.trace", {"precision": "another", "inputs_rounded": True}, (*CHANGES, plain))
    named = f"step_cache={{{CACHE}, trace: {file}}}"
    with pytest.raises(RecipeError, match=r"made with other precision; measure again"):
        open_job(load_recipe(RECIPE, (*CHANGES, named)), tmp_path)


def test_traces_that_are_one_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"step_cache\.compare: compares the quantized model's trace"):
        load_recipe(RECIPE, (*CHANGES, f"step_cache={{{CACHE}, traced: reference, compare: true}}"))
    plain = ("precision.transformer={default: bf16}", "precision.text_encoder={default: bf16}")
    with pytest.raises(RecipeError, match=r"step_cache\.compare: no layer of this recipe's model is rounded"):
        open_job(load_recipe(RECIPE, (*CHANGES, *plain, f"step_cache={{{CACHE}, compare: true}}")), tmp_path)


def test_what_is_not_solved_yet_is_not_called_cached(bundle: Path, tmp_path: Path) -> None:
    """The weights stage of another rounding is another one, also before it is known what it is given."""
    plan = ["plan", str(RECIPE), "--json", "--out", str(tmp_path / "bundle")]
    for change in (*CHANGES, f"step_cache={{{CACHE}}}"):
        plan += ["--set", change]

    def results(*more: str) -> dict[str, str]:
        found = CliRunner().invoke(main, [*plan, *(a for change in more for a in ("--set", change))])
        assert found.exit_code == 0, found.output
        return {stage["name"]: stage["result"] for stage in json.loads(found.stdout)["budget"]["stages"]}

    solved = results()
    assert {solved[name] for name in ("rounding-transformer", "step-trace", "weights-transformer")} == {"cached"}
    other = results("calibration.seed=5")
    assert {other[name] for name in ("rounding-transformer", "step-trace", "weights-transformer")} == {"to run"}
    reference = results(f"step_cache={{{CACHE}, traced: reference}}", "calibration.steps=2")
    assert reference["step-trace"] == "cached"
