"""The step cache in a build and in the runtime: the trace against the compiled graphs, skipping against diffusers, caching."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import fluxrt
from conftest import NANO, RECIPE, ROOT, RecordingProgress, compile_into
from fluxc.base.errors import BuildError, GateError, RecipeError
from fluxc.build.measure import merge_to_file, trace_to_file
from fluxc.checkpoint.reference import Generation, generate, load_pipeline
from fluxc.checkpoint.source import open_checkpoint
from fluxc.cli.main import main as fluxc_main
from fluxc.fidelity.metrics import psnr
from fluxc.fidelity.verify import verify_bundle
from fluxc.recipe.load import load_recipe
from fluxc.recipe.structs import LAGS
from fluxc.stepcache.file import check_complete, merge_traces, read_trace, write_trace
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.cli import main as fluxrt_main
from fluxrt.pipeline import Pipeline, starting_noise
from fluxrt.request import Request
from fluxrt.schedule import SCHEDULES
from fluxrt.stepcache import Decisions
from quick import contents, results_of

STEPS = 12
PROMPT = "a large red cross at the right on a blue background"
CHANGES = (
    "calibration.prompts=../tests/data/two-prompts.txt",
    "fidelity.prompts=../tests/data/two-prompts.txt",
    f"sampling.steps={STEPS}",
    "precision.transformer={default: bf16}",
    "targets=[{kind: onnxruntime}]",
    "gates={}",
)
CACHE = "{prompts: prompts/flux2-nano-calibration.txt, frontier: [3], skip: 4"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cached")


@pytest.fixture(scope="module")
def bundle(made: Path) -> Path:
    """Every layer in bf16, 12 steps, four of them skipped by a fixed schedule; traced in fp32 on 16 prompts."""
    return compile_into(made / "static", *CHANGES, f"step_cache={CACHE}}}")


@pytest.fixture(scope="module")
def trace(shared_cache: Path, bundle: Path) -> Path:
    (found,) = (path for path in results_of(shared_cache, bundle) if path.name.startswith("step-trace-"))
    return found / "trace.safetensors"


def begun(bundle: Path, prompt: str, seed: int) -> tuple[Pipeline, list[float]]:
    """A pipeline at the start of an image, and its sigmas."""
    pipeline = fluxrt.load(bundle)
    grid = pipeline.grid(None)
    tokens = grid[0] * grid[1]
    noise = starting_noise(seed, tokens, pipeline.bundle.manifest.sampling.latent_channels)
    pipeline.begin(noise[None], grid, 1.5, pipeline.tokenize([prompt, ""]))
    return pipeline, SCHEDULES["flux2-flow-match"](tokens, STEPS)


def generated(
    bundle: Path, decisions: Decisions | None, prompt: str = PROMPT, seed: int = 5
) -> tuple[np.ndarray, list[int]]:
    """An image in fp32, and the steps that were skipped."""
    pipeline, sigmas = begun(bundle, prompt, seed)
    skips = list(pipeline.denoise(sigmas, decisions))
    image = pipeline.decode(pipeline.backend.get("latents"), pipeline.grid(None))[0]
    return image, [step for step, skip in enumerate(skips) if skip]


def test_the_trace_is_what_the_compiled_graphs_do(bundle: Path, trace: Path) -> None:
    """Hooks in torch against the signal graph, and against the epilogue with older residuals put in the newest's place."""
    recorded = read_trace(trace).trace
    for number, prompt in enumerate([PROMPT, "a blue background with a small green ring at the left"]):
        pipeline, sigmas = begun(bundle, prompt, number)
        backend = pipeline.backend
        backend.put("previous_signal", np.zeros((1, 64, 128), np.float32))
        residuals: list[np.ndarray] = []
        changes, errors = [], np.full((STEPS, LAGS), np.inf)
        for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            latents = backend.get("latents")
            backend.put("sigma", np.array(sigma, np.float32))
            backend.put("next_sigma", np.array(following, np.float32))
            backend.run(("prologue", "signal", "body"), {"signal": "previous_signal"})
            moved, before = backend.get("change")
            changes.append(moved / before if before else 0.0)
            residual = backend.get("residual")
            backend.run(("epilogue",))
            after = backend.get("next_latents")
            for lag, old in enumerate(residuals[::-1][:LAGS]):
                backend.put("residual", old)
                backend.run(("epilogue",))
                errors[step, lag] = np.sqrt(np.square(backend.get("next_latents") - after).mean())
            residuals.append(residual)
            backend.put("latents", after)
            assert latents.shape == after.shape
        np.testing.assert_allclose(changes, recorded.change[number], rtol=2e-3)
        np.testing.assert_allclose(errors, recorded.residual_error[number], rtol=2e-2, atol=1e-6)
        relative = [
            [np.abs(new[b] - old[b]).mean() / np.abs(old[b]).mean() for b in range(2)]
            for old, new in itertools.pairwise(residuals)
        ]
        np.testing.assert_allclose(relative, recorded.residual_change[number, 1:], rtol=5e-3)


def test_the_latent_level_is_visual_gens(trace: Path) -> None:
    """Output minus input of the whole transformer, a branch each, from diffusers' own calls."""
    checkpoint = open_checkpoint(str(NANO), None, ROOT)
    pipeline = load_pipeline(checkpoint, torch.float32)
    passes: list[torch.Tensor] = []

    def on_pass(_: object, __: object, kwargs: dict[str, torch.Tensor], output: tuple[torch.Tensor]) -> None:
        passes.append(output[0] - kwargs["hidden_states"])

    pipeline.transformer.register_forward_hook(on_pass, with_kwargs=True)
    generate(pipeline, checkpoint, PROMPT, Generation((64, 64), STEPS, 1.5, 0, 32, (9, 18, 27)))
    by_branch = [passes[0::2], passes[1::2]]
    expected = [
        [float((new - old).abs().mean() / old.abs().mean()) for old, new in itertools.pairwise(branch)]
        for branch in by_branch
    ]
    found = read_trace(trace).trace.latent_change[0, 1:]
    np.testing.assert_allclose(found.T, expected, rtol=1e-4)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_skipping_is_what_reused_residuals_do_in_diffusers(bundle: Path, mode: str) -> None:
    """Diffusers computes every block; a hook puts the last kept residual in place of theirs on the skipped steps."""
    cache = open_bundle(bundle).manifest.step_cache
    rule = msgspec.structs.replace(cache.rule, threshold=0.12)
    decisions = Decisions(STEPS, None, cache.schedule) if mode == "static" else Decisions(STEPS, rule)
    ours, skipped = generated(bundle, decisions)
    full, _ = generated(bundle, None)
    assert len(skipped) == 4 if mode == "static" else 2 <= len(skipped) <= 9
    checkpoint = open_checkpoint(str(NANO), None, ROOT)
    pipeline = load_pipeline(checkpoint, torch.float32)
    state: dict[str, object] = {"calls": 0}
    kept: dict[int, torch.Tensor] = {}

    def on_block(_: object, __: object, kwargs: dict[str, torch.Tensor]) -> None:
        state["hidden"] = kwargs["hidden_states"]

    def on_output(_: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        step, branch = divmod(state["calls"], 2)
        state["calls"] += 1
        if step not in skipped:
            kept[branch] = args[0] - state["hidden"]
        return (state["hidden"] + kept[branch], *args[1:])

    pipeline.transformer.transformer_blocks[0].register_forward_pre_hook(on_block, with_kwargs=True)
    pipeline.transformer.norm_out.register_forward_pre_hook(on_output)
    theirs = generate(pipeline, checkpoint, PROMPT, Generation((64, 64), STEPS, 1.5, 5, 32, (9, 18, 27)))
    assert psnr(ours, theirs) > 85
    assert psnr(ours, full) < psnr(ours, theirs) - 10


def test_a_threshold_of_nothing_skips_nothing(bundle: Path) -> None:
    pipeline = fluxrt.load(bundle)
    cached = pipeline.generate(Request([PROMPT, "a red circle"], seed=3, threshold=0.0))
    plain = pipeline.generate(Request([PROMPT, "a red circle"], seed=3, step_cache=False))
    assert cached.skipped == plain.skipped == [(), ()]
    for ours, theirs in zip(cached.images, plain.images, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_an_image_does_not_depend_on_the_one_before(bundle: Path) -> None:
    pipeline = fluxrt.load(bundle)
    alone = pipeline.generate(Request(PROMPT, seed=4, threshold=0.12))
    batch = pipeline.generate(Request(["a red circle", PROMPT], seed=3, threshold=0.12))
    assert batch.skipped[1] == alone.skipped[0]
    assert np.array_equal(np.asarray(batch.images[1]), np.asarray(alone.images[0]))


def test_other_steps_and_guidance_are_served_by_the_rule(bundle: Path) -> None:
    pipeline = fluxrt.load(bundle)
    result = pipeline.generate(Request(PROMPT, steps=20))
    assert "fitted to 12 steps at 64x64, not to 20 at 64x64" in result.notes[0]
    assert 0 < len(result.skipped[0]) < 19
    assert pipeline.generate(Request(PROMPT, guidance=1.0)).skipped[0] == pipeline.generate(Request(PROMPT)).skipped[0]
    assert pipeline.generate(Request(PROMPT, steps=2)).skipped == [()]


def test_generate_says_what_was_skipped(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = ["generate", str(bundle), "--prompt", PROMPT, "--seed", "1", "--out", str(tmp_path / "a.png")]
    assert fluxrt_main(request) == 0
    schedule = open_bundle(bundle).manifest.step_cache.schedule
    assert f"a.png: skipped 4 steps ({', '.join(map(str, schedule))})" in capsys.readouterr().err
    assert fluxrt_main([*request, "--no-step-cache"]) == 0
    assert "skipped" not in capsys.readouterr().err
    assert fluxrt_main([*request, "--threshold", "0.5", "--steps", "15"]) == 0
    told = capsys.readouterr().err
    assert re.search(r"a\.png: skipped \d+ steps", told)
    assert "not to 15 at 64x64" in told
    assert fluxrt_main([*request, "--no-step-cache", "--threshold", "1"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_the_bundle_says_how_well_the_fit_and_the_images_are(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    cache = manifest.step_cache
    assert (cache.mode, cache.steps, cache.size, len(cache.schedule)) == ("static", STEPS, (64, 64), 4)
    for level in ("residual", "latent"):
        assert {"r2", "rmse", "worst", "r2_by_branch", "coefficients"} == set(cache.fit[level])
    assert sum(found["count"] for found in cache.fit["occurrences"]) == 16 * (STEPS - 1)
    assert cache.fit["prompts"] == {"fitted": 12, "held_out": 4}
    figures = manifest.fidelity.step_cache
    assert figures["computed"] == STEPS - 4
    assert figures["psnr_db"] >= figures["psnr_db_p5"] >= figures["psnr_db_worst"] > 30
    report = json.loads((bundle / "report" / "report.json").read_text())["step_cache"]
    assert set(report["frontier"]) == {"3"}
    assert set(report["frontier"]["3"]) == {"static", "dynamic", "published", "fewer steps"}
    assert report["frontier"]["3"]["fewer steps"]["computed"] == STEPS - 3
    assert len(report["changes"]) == min(300, 16 * (STEPS - 1))
    page = (bundle / "report" / "index.html").read_text()
    assert f"{figures['psnr_db']} dB</b> mean PSNR" in page
    assert page.count('class="skipped"') == 4
    for shown in ("Quality against compute", "Where it shows first", "3 skipped", "How well the polynomial fits"):
        assert shown in page
    images = {path.name for path in (bundle / "report" / "images").glob("step-cache-*")}
    assert images == {f"step-cache-{name}.png" for name in ("0", "1", "every-step", "skipped-3")}
    full, _ = generated(bundle, None, report_prompts()[1], 1001)
    cached, skipped = generated(bundle, Decisions(STEPS, None, cache.schedule), report_prompts()[1], 1001)
    assert skipped == list(cache.schedule)
    assert psnr(cached, full) == pytest.approx(report["chosen"]["by_prompt"][1]["psnr_db"], abs=0.01)
    assert [line for line in verify_bundle(bundle) if "generated again" in line] == [
        "target onnxruntime: the recorded image is generated again (identical)"
    ]


def report_prompts() -> list[str]:
    lines = (ROOT / "tests/data/two-prompts.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_another_number_of_steps_to_skip_repeats_the_fit_and_the_comparison_alone(made: Path, bundle: Path) -> None:
    progress = RecordingProgress()
    other = compile_into(
        made / "other", *CHANGES, f"step_cache={CACHE.replace('skip: 4', 'skip: 5')}}}", progress=progress
    )
    assert set(progress.ran) - {"hash checkpoint"} == {
        "fit step cache",
        "generate with the step cache",
        "report the step cache",
    }
    assert len(open_bundle(other).manifest.step_cache.schedule) == 5
    again = RecordingProgress()
    compile_into(made / "other", *CHANGES, f"step_cache={CACHE.replace('skip: 4', 'skip: 5')}}}", progress=again)
    assert set(again.ran) <= {"hash checkpoint"}
    # How well the polynomial fits is said at every build.
    quality = open_bundle(other).manifest.step_cache.fit["residual"]
    for said in (progress.said, again.said):
        assert f"R2 {quality['r2']}, RMSE {quality['rmse']}, largest error {quality['worst']}" in " ".join(said)


@pytest.mark.usefixtures("own_cache")
def test_a_step_cache_made_again_is_the_same_to_the_byte(bundle: Path, shared_cache: Path, tmp_path: Path) -> None:
    """All that comes of the trace is made again; how the rest is made again is test_build's."""
    for result in results_of(shared_cache, bundle):
        if result.name.startswith(("export-", "calibration-", "weights-")):
            shutil.copytree(result, tmp_path / ".fluxc" / result.name)
    again = compile_into(tmp_path / "static", *CHANGES, f"step_cache={CACHE}}}")
    assert contents(again) == contents(bundle)


def test_without_a_step_cache_nothing_of_it_is_in_the_bundle(made: Path, bundle: Path) -> None:
    plain = compile_into(made / "plain", *CHANGES)
    manifest = open_bundle(plain).manifest
    assert manifest.step_cache is None
    assert "signal" not in manifest.targets[0].graphs
    assert not [name for name in manifest.files if "step-cache" in name or "signal" in name]
    generated, cached = (
        fluxrt.load(path).generate(Request(PROMPT, step_cache=False)).images[0] for path in (plain, bundle)
    )
    assert np.array_equal(np.asarray(generated), np.asarray(cached))


def test_a_gate_holds_the_step_cache_to_its_images(made: Path, bundle: Path) -> None:
    with pytest.raises(GateError, match=r"step cache: step_cache_psnr_db [\d.]+ under 119.*skip fewer steps"):
        compile_into(made / "gated", *CHANGES, f"step_cache={CACHE}}}", "gates={step_cache_psnr_db: 119}")
    assert not (made / "gated").exists()


def test_parts_of_a_trace_merge_into_the_whole(trace: Path, made: Path, tmp_path: Path) -> None:
    loaded = load_recipe(RECIPE, (*CHANGES, f"step_cache={CACHE}}}"))
    for part in (1, 2, 3):
        trace_to_file(loaded, tmp_path / str(part), "auto", (part, 3), RecordingProgress())
    merged = merge_to_file([tmp_path / name for name in "312"], tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == trace.read_bytes()
    assert merged.images == list(range(16))
    with pytest.raises(BuildError, match=r"holds 5 of 16 prompts, prompt 6 is missing.*merge-traces"):
        check_complete(read_trace(tmp_path / "1"))
    with pytest.raises(BuildError, match=r"prompt 1 is also in .*/1; give every part of the prompts once"):
        merge_to_file([tmp_path / "1", tmp_path / "1"], tmp_path / "twice")
    other = read_trace(tmp_path / "2")
    request = {**other.origin.request, "guidance": 9.0}
    write_trace(tmp_path / "foreign", dataclasses.replace(other.origin, request=request), other.images, other.trace)
    with pytest.raises(BuildError, match=r"foreign: its request is not that of .*/1 \('guidance' differs\)"):
        merge_to_file([tmp_path / "1", tmp_path / "foreign"], tmp_path / "mixed")
    assert merge_traces([read_trace(tmp_path / "1")])[1] == list(range(5))
    (tmp_path / "recipe.txt").write_text("x")
    with pytest.raises(RecipeError, match=r"recipe\.txt: exists and is not a trace file"):
        merge_to_file([tmp_path / "1"], tmp_path / "recipe.txt")
    given = RecordingProgress()
    built = compile_into(made / "given", *CHANGES, f"step_cache={CACHE}, trace: {tmp_path / 'whole'}}}", progress=given)
    assert "trace steps" not in given.ran + given.found
    assert open_bundle(built).manifest.step_cache.fit["prompts"]["fitted"] == 12
    with pytest.raises(
        RecipeError, match=r"step_cache\.trace: .*whole: made with other steps \(12 there, 14 in the recipe\)"
    ):
        compile_into(
            made / "wrong", *CHANGES, "sampling.steps=14", f"step_cache={CACHE}, trace: {tmp_path / 'whole'}}}"
        )


def test_a_trace_that_saw_no_number_is_refused(trace: Path, tmp_path: Path) -> None:
    file = read_trace(trace)
    file.trace.change[2, 3] = np.nan
    with pytest.raises(BuildError, match="a step's velocity or modulated input holds NaN or infinity"):
        write_trace(tmp_path / "bad", file.origin, file.images, file.trace)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("step_cache={skip: 4, max_error: 0.1}",), "step_cache: give either skip or max_error"),
        (("step_cache={skip: 0}",), r"step_cache\.skip: must be more than 0, got 0"),
        (("step_cache={skip: 11}",), r"step_cache\.skip: 11 of 12 steps cannot be skipped; at most 8 can"),
        (("step_cache={skip: offen}",), r"step_cache\.skip: 'offen' is not possible"),
        (("step_cache={degree: 6}",), r"step_cache\.degree: must be at least 1 and at most 5, got 6"),
        (
            ("step_cache={max_consecutive_skips: 7}",),
            r"step_cache\.max_consecutive_skips: must be at least 1 and at most 6, got 7",
        ),
        (("step_cache={first: 0}",), r"step_cache\.first: must be at least 1"),
        (("step_cache={frontier: [0]}",), r"step_cache\.frontier\[0\]: must be at least 1, got 0"),
        (("step_cache={tresh: 1}",), r"unknown field 'step_cache\.tresh'"),
        (("step_cache={}", "sampling.steps=4"), r"step_cache: 4 steps are too few to skip any \(at least 10\)"),
        (("gates={step_cache_psnr_db: 30}",), r"gates\.step_cache_psnr_db: there is no step_cache in this recipe"),
    ],
)
def test_a_wrong_step_cache_is_refused_by_field(changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(RECIPE, (*CHANGES, *changes))


def test_too_few_prompts_are_refused_before_anything_runs(tmp_path: Path) -> None:
    progress = RecordingProgress()
    with pytest.raises(RecipeError, match=r"calibration\.prompts: 2 prompts are too few to fit a step cache"):
        compile_into(tmp_path / "few", *CHANGES, "step_cache={skip: auto}", progress=progress)
    assert progress.ran == []


def test_verbs_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, told in (
        (["trace", str(RECIPE), "--out", "x", "--part", "3/2"], 2, "'3/2' is not I/N"),
        (["trace", str(RECIPE), "--out", "x", "--part", "\u00b2/2"], 2, "'\u00b2/2' is not I/N"),
        (["trace", str(RECIPE), "--out", "x", "--part", f"1/{'9' * 5000}"], 2, "is not I/N"),
        (["trace", str(RECIPE), "--out", str(tmp_path / "x")], 2, "step_cache: this recipe has none"),
        (["merge-traces", str(tmp_path / "none"), "--out", str(tmp_path / "x")], 1, "there is no such trace file"),
    ):
        with pytest.raises(SystemExit) as ended:
            fluxc_main(arguments)
        assert ended.value.code == code
        assert told in capsys.readouterr().err


def test_a_change_that_is_nan_is_an_error_not_an_image(bundle: Path) -> None:
    pipeline = fluxrt.load(bundle)
    noise = np.full((1, 64, 32), 3e38, np.float32)
    with pytest.raises(fluxrt.BackendError, match=r"step 1: the change of the step cache's signal is nan"):
        pipeline.generate(Request(PROMPT, latents=noise, threshold=0.1))


def test_decisions_depend_on_the_bundle_alone(bundle: Path) -> None:
    """A bundle whose rule was changed generates by the changed rule: nothing about it is compiled into the graphs."""
    opened = open_bundle(bundle)
    cache = opened.manifest.step_cache
    rule = msgspec.structs.replace(cache.rule, threshold=1e9, max_consecutive_skips=3)
    manifest = msgspec.structs.replace(
        opened.manifest, step_cache=msgspec.structs.replace(cache, mode="dynamic", rule=rule)
    )
    result = Pipeline(Bundle(bundle, manifest)).generate(Request(PROMPT))
    assert result.skipped == [(1, 2, 3, 5, 6, 7, 9, 10)]
    assert Decisions(STEPS, rule).needs_change(0) is False
