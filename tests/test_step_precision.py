"""Precision over steps: bodies that leave inputs of layers as they are, run at some steps, on one set of weights.

No engine ran on a GPU here: TensorRT's plans are built and audited, and their graphs go through fakes of CUDA and TensorRT.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from conftest import RECIPE, compile_into, exported
from fluxc.base.errors import RecipeError
from fluxc.base.safetensors import TensorRef
from fluxc.build.preflight import preflight
from fluxc.build.stages import planned_stages, steps
from fluxc.calibrate.sensitivity import velocities_of
from fluxc.calibrate.simulated import Rounded, simulated
from fluxc.calibrate.step_errors_stage import StepErrors
from fluxc.checkpoint.reference import Generation
from fluxc.cli.main import main
from fluxc.fidelity.metrics import psnr
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.predict.gpus import GPUS
from fluxc.predict.scaling import Subject, predict, published_model
from fluxc.predict.work import work_of
from fluxc.quantize.plan import LayerPlan, precision_plan, to_quantize
from fluxc.quantize.source import read_source
from fluxc.quantize.steps import EXACT, body_plans, schedule_of
from fluxc.quantize.writer import planned_tensors
from fluxc.recipe.load import load_recipe
from fluxc.recipe.structs import ComponentPrecision, Precision, StepRule
from fluxc.recipe.targets import TensorRTRtxTarget
from fluxc.rehearsal.gpu import FakeDriver, FakeLibrary
from fluxc.report.gains import predicted
from fluxc.running.model import ReferenceModel
from fluxc.running.placement import Placement
from fluxc.targets.sharding import shards_of
from fluxc.targets.tensorrt.build import build_engine, write_sources
from fluxc.targets.tensorrt.cut import Component, Cutter
from fluxrt.backends.onnxruntime import OnnxRuntimeBackend
from fluxrt.backends.tensorrt import TensorRTBackend
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.group import Group
from fluxrt.manifest import OnnxRuntimeTarget, TensorRTTarget
from fluxrt.memory import DENOISE, ENCODE
from fluxrt.pipeline import Pipeline, starting_noise
from fluxrt.request import Request
from fluxrt.schedule import flow_match_sigmas
from fluxrt.sharding import sizes_of
from fluxrt.stepcache import Decisions
from fluxrt.stepprecision import BODY, Body, StepPrecision, bodies_of, step_words
from fluxrt.verify import verify_evidence
from quick import QUICK
from ranks import on_every_rank
from test_flux2_tables import DEV, KLEIN_4B
from test_tensorrt import RTX

PROMPT = "a small white ring at the top on a red background"
STEPS = 6
RULES = 'precision.steps=[{last: 2}, {first: 1, layers: ["*.to_q"]}]'
SCHEDULE = ["body-exact2", *[BODY] * 3, EXACT, EXACT]
CPU = "targets=[{kind: onnxruntime, compute: exact}, {kind: onnxruntime, activations: nvfp4}]"
CAPSULE = SimpleNamespace(capsule=object(), close=lambda: None)
OF_STEPS = (*QUICK, f"sampling.steps={STEPS}", "calibration.steps=3")


@pytest.fixture(scope="module")
def stepped(workshop: Path) -> Bundle:
    return open_bundle(compile_into(workshop / "stepped", *OF_STEPS, CPU, RULES))


@pytest.fixture(scope="module")
def on_engines(workshop: Path) -> Bundle:
    pytest.importorskip("tensorrt_rtx", reason="the plans need tensorrt-rtx-cu13, as `make test` installs it")
    targets = (
        "targets=[{kind: tensorrt_rtx}, {kind: tensorrt_rtx, gpus: 2}, {kind: onnxruntime, activations: nvfp4}, "
        "{kind: onnxruntime, activations: nvfp4, gpus: 2}]"
    )
    return open_bundle(compile_into(workshop / "stepped-rtx", *OF_STEPS, targets, RULES, recipe=RTX))


def latents_of(bundle: Bundle, target: str, **request: Any) -> np.ndarray:
    """The final latents of an image."""
    pipeline = Pipeline(bundle, target=target, threads=1)
    pipeline.generate(Request(PROMPT, seed=3, **request))
    return pipeline.latents()


def fluxc(*words: str) -> str:
    """What a command prints, in one line."""
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def plan_of_nano() -> list[LayerPlan]:
    return read_source(load_recipe(RECIPE)).plans["transformer"]


# Which step runs what.


def test_a_generation_of_another_number_of_steps_takes_the_same_part_of_the_way() -> None:
    precision = StepPrecision(24, {EXACT: Body(tuple(range(16, 24)), ("one",))})
    assert bodies_of(precision, 24, (BODY, EXACT)) == [BODY] * 16 + [EXACT] * 8
    assert bodies_of(precision, 12, (BODY, EXACT)) == [BODY] * 8 + [EXACT] * 4
    assert bodies_of(precision, 48, (BODY, EXACT)) == [BODY] * 32 + [EXACT] * 16
    assert bodies_of(precision, 1, (BODY, EXACT)) == [BODY]
    assert bodies_of(precision, 4, (BODY,)) == bodies_of(None, 4, (BODY, EXACT)) == [BODY] * 4
    assert step_words(precision) == ["steps 17 to 24 of 24 leave the inputs of 1 layers in 16 bits (body-exact)"]


def test_a_manifest_of_steps_that_are_none_is_refused() -> None:
    for name, numbers in (("other", (1,)), (EXACT, (24,)), (EXACT, (-1,))):
        plain = {"steps": 24, "bodies": {name: {"steps": numbers, "layers": []}}}
        with pytest.raises(msgspec.ValidationError, match="cannot be the body of steps"):
            msgspec.convert(plain, StepPrecision)


def test_the_first_rule_that_has_a_step_decides() -> None:
    attention = ("*.to_q",)
    precision = Precision(steps=(StepRule(last=3), StepRule(first=5, layers=attention)))
    found = schedule_of(precision, plan_of_nano(), 6)
    assert found is not None
    assert {name: body.steps for name, body in found.bodies.items()} == {EXACT: (3, 4, 5), "body-exact2": (0, 1, 2)}
    # A fusion group changes as a whole.
    ends = {name.rpartition(".")[2] for name in found.bodies["body-exact2"].layers}
    assert ends == {"to_q", "to_k", "to_v"}


def test_the_worst_steps_are_those_of_the_largest_gain() -> None:
    plan, squared = plan_of_nano(), np.array([9.0, 4.0, 16.0, 25.0, 1.0])
    errors = StepErrors(1, tuple(range(5)), {BODY: squared, EXACT: np.array([4.0, 4.0, 15.0, 5.0, 2.0])})

    def chosen(*rules: StepRule) -> dict[str, tuple[int, ...]]:
        found = schedule_of(Precision(steps=rules), plan, 5, errors.gains)
        return {name: body.steps for name, body in found.bodies.items()} if found else {}

    assert chosen(StepRule(worst=1)) == {EXACT: (3,)}
    assert chosen(StepRule(worst=2)) == {EXACT: (0, 3)}
    # No step that gains nothing, and none that an earlier rule has.
    assert chosen(StepRule(worst=5)) == {EXACT: (0, 2, 3)}
    assert chosen(StepRule(last=2), StepRule(worst=1)) == {EXACT: (0, 3, 4)}
    # Half of 5 + 1 + 20.
    auto = schedule_of(Precision(steps="auto"), plan, 5, errors.gains)
    assert auto is not None
    assert auto.bodies[EXACT].steps == (3,)
    nothing = StepErrors(1, (0,), {BODY: squared, EXACT: squared})
    assert schedule_of(Precision(steps="auto"), plan, 5, nothing.gains) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["precision.steps=[{first: 1, last: 1}]"], "give one of first, last, at and worst"),
        (["precision.steps=[{}]"], "give one of first, last, at and worst"),
        (["precision.steps=[{at: [1, 4]}]"], r"steps\[0\].at: an image has 3 steps"),
        (["precision.steps=[{last: 4}]"], r"steps\[0\].last: an image has 3 steps"),
        (['precision.steps=[{last: 1, layers: ["*.to_qq"]}]'], r"matches no layer; did you mean '\*attn.to_q'"),
        (['precision.steps=[{last: 1, layers: ["x_embedder"]}]'], "this would change nothing"),
        (["precision.steps=auto", "precision.transformer.default=fp8"], "layers in nvfp4 have"),
        (["precision.steps=[{last: 1}]", "targets=[{kind: onnxruntime}]"], "no target of this recipe rounds inputs"),
        (
            ["precision.steps=[{last: 1}]", "targets=[{kind: visual_gen}, {kind: tensorrt_rtx}]"],
            "VisualGen computes all",
        ),
        (["precision.steps=[{last: 1}]", "targets=[{kind: tensorrt_rtx, weights: baked}]"], "use weights: bound"),
        (
            ["precision.steps=[{worst: 1}]", "calibration.engine=none"],
            "measured by calibration.engine: fluxc, not none",
        ),
    ],
)
def test_rules_that_can_do_nothing_are_refused(changes: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        preflight(load_recipe(RECIPE, (*QUICK, *changes)), tmp_path / "bundle", None)


# What is computed.


def test_each_step_is_that_of_a_bundle_that_is_so_at_every_step(stepped: Bundle, workshop: Path) -> None:
    """Three bundles whose steps are all alike, put together step by step, make the same latents to the bit."""
    every = {
        BODY: compile_into(workshop / "alike", *OF_STEPS, CPU),
        EXACT: compile_into(workshop / "alike-exact", *OF_STEPS, CPU, "precision.transformer.default=nvfp4-w4a16"),
        "body-exact2": compile_into(
            workshop / "alike-some",
            *OF_STEPS,
            CPU,
            'precision.transformer.rules=[{match: "*.to_q", format: nvfp4-w4a16}]',
        ),
    }
    pipelines = {
        body: Pipeline(open_bundle(path), target="onnxruntime-nvfp4", threads=1) for body, path in every.items()
    }
    ours = Pipeline(stepped, target="onnxruntime-nvfp4", threads=1)
    assert ours.bodies(STEPS) == SCHEDULE
    result = ours.generate(Request(PROMPT, seed=3))
    assert len(result.images) == 1
    first = pipelines[BODY]
    words = first.tokenize(first.branches(PROMPT, 1.5))
    grid = first.grid(None)
    latents = starting_noise(3, 64, 32)[None]
    for body, (sigma, after) in zip(SCHEDULE, itertools.pairwise(flow_match_sigmas(64, STEPS)), strict=True):
        pipelines[body].begin(latents, grid, 1.5, words)
        pipelines[body].step(sigma, after)
        latents = pipelines[body].latents()
    np.testing.assert_array_equal(ours.latents(), latents)


def test_a_target_that_rounds_nothing_has_one_body(stepped: Bundle) -> None:
    assert stepped.target("onnxruntime-exact").bodies == (BODY,)
    assert stepped.target("onnxruntime-nvfp4").bodies == (BODY, EXACT, "body-exact2")
    pipeline = Pipeline(stepped, target="onnxruntime-exact")
    assert pipeline.bodies(STEPS) == [BODY] * STEPS


def test_the_record_says_which_steps(stepped: Bundle) -> None:
    manifest = stepped.manifest
    assert isinstance(manifest.step_precision, StepPrecision)
    assert {name: body.steps for name, body in manifest.step_precision.bodies.items()} == {
        EXACT: (4, 5),
        "body-exact2": (0,),
    }
    layers = sorted(layer.name for layer in manifest.precision if layer.format == "nvfp4")
    assert sorted(manifest.step_precision.bodies[EXACT].layers) == layers
    figures = json.loads((stepped.root / "report" / "report.json").read_text())["targets"]
    rounded, exact = (figures[f"onnxruntime-{name}"]["prompts"][0]["step_error"] for name in ("nvfp4", "exact"))
    assert rounded[4:] == exact[4:]
    assert rounded[1] > exact[1]
    told = fluxc("inspect", str(stepped.root))
    assert "steps 5 to 6 of 6 leave the inputs of 36 layers in 16 bits (body-exact)" in told
    assert "steps 5 to 6 of 6" in (stepped.root / "README.md").read_text()
    page = (stepped.root / "report" / "index.html").read_text()
    assert "Precision over steps" in page


def test_other_steps_are_compared_anew(stepped: Bundle, workshop: Path) -> None:
    """Nothing of a bundle's files differs, and its images do."""
    other = open_bundle(compile_into(workshop / "stepped-else", *OF_STEPS, CPU, RULES.replace("last: 2", "last: 4")))
    graphs = {name: file for name, file in stepped.manifest.files.items() if name.endswith(".onnx")}
    assert graphs == {name: file for name, file in other.manifest.files.items() if name.endswith(".onnx")}
    errors = [
        json.loads((bundle.root / "report" / "report.json").read_text())["targets"]["onnxruntime-nvfp4"]["prompts"][0]
        for bundle in (stepped, other)
    ]
    assert errors[0]["step_error"][2] > errors[1]["step_error"][2]
    assert errors[0]["image_psnr_db"] != errors[1]["image_psnr_db"]


def test_evidence_is_replayed_with_the_body_of_its_step(stepped: Bundle) -> None:
    assert [checked.status for checked in verify_evidence(stepped)] == ["passed", "passed"]


def test_weights_that_are_unfolded_are_there_once(stepped: Bundle) -> None:
    target = stepped.target("onnxruntime-nvfp4")
    assert isinstance(target, OnnxRuntimeTarget)
    backend = OnnxRuntimeBackend(stepped, target, threads=1)
    pipeline = Pipeline(stepped, target=target.name, backend=backend, memory="staged")
    pipeline.generate(Request(PROMPT, seed=3))
    one, other = (backend._unfolded.get(name) for name in (BODY, EXACT))
    if one is not None and other is not None:
        assert one
        assert one.keys() == other.keys()
        assert all(array is other[name] for name, array in one.items())
    backend.keep(DENOISE)
    # Taking turns loads the text encoder anew, and lets go of every body.
    backend.keep(ENCODE)
    assert not any(name.startswith(BODY) for name in backend._sessions)


def test_a_measurement_chooses_steps_and_is_shown(workshop: Path) -> None:
    bundle = open_bundle(compile_into(workshop / "stepped-auto", *OF_STEPS, CPU, "precision.steps=auto"))
    report = json.loads((bundle.root / "report" / "report.json").read_text())
    found = report["step_precision"]
    assert found["prompts"] == 2
    rounded, exact = (np.square(found["errors"][body]) for body in (BODY, EXACT))
    assert np.all(rounded > exact)
    gains = rounded - exact
    chosen = found["schedule"]["bodies"][EXACT]["steps"]
    assert gains[chosen].sum() >= 0.499 * gains.sum() > np.sort(gains[chosen])[1:].sum()
    assert min(gains[chosen]) >= max(np.delete(gains, chosen))
    assert "if all steps ran the same body" in (bundle.root / "report" / "index.html").read_text()


@pytest.mark.parametrize("pieces", ["component", "layer"])
def test_the_model_in_torch_rounds_inputs_as_its_steps_say(pieces: Literal["component", "layer"]) -> None:
    """Each pass of two images, made one after the other, is that of a model that is so at every step."""
    source = read_source(load_recipe(RECIPE))
    plan = source.plans["transformer"]
    exact = body_plans(Precision(steps=(StepRule(last=1),)), plan)[EXACT]
    steps, branches, generation = 3, 2, Generation((64, 64), 3, 1.5, 0, 32, (9, 18, 27))
    schedule = StepPrecision(steps, {EXACT: Body((0, 2), tuple(entry.layer.name for entry in to_quantize(plan)))})
    ranges = {entry.layer.name: 8.0 for entry in plan}
    model = ReferenceModel(source.checkpoint, Placement("cpu", torch.float32, pieces))
    with model.component("text_encoder", generation.text_layers) as encoder:
        text, empty = model.encode(encoder, [PROMPT, ""], generation)
    passes: list[tuple[dict[str, Any], torch.Tensor]] = []

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        passes.append((dict(kwargs), output[0].detach().clone()))

    with model.component("transformer") as transformer:
        scheduled = Rounded(plan, "max", True, assumed=ranges, steps=schedule)
        handle = transformer.module.register_forward_hook(keep, with_kwargs=True)
        with simulated(source.checkpoint, "transformer", transformer, {"transformer": scheduled}, (steps, branches)):
            for _ in range(2):
                model.denoise(transformer, [text], empty, [generation])
        handle.remove()
        found = {}
        for name, of_body in ((BODY, plan), (EXACT, exact)):
            rounded = {"transformer": Rounded(of_body, "max", True, assumed=ranges)}
            with simulated(source.checkpoint, "transformer", transformer, rounded):
                found[name] = velocities_of(transformer)([kwargs for kwargs, _ in passes])
    assert len(passes) == 2 * steps * branches
    for number, (_, output) in enumerate(passes):
        body = (EXACT, BODY, EXACT)[number // branches % steps]
        other = BODY if body == EXACT else EXACT
        assert torch.equal(output, found[body][number])
        assert not torch.equal(output, found[other][number])


# Engines, and ranks.


def test_engines_of_both_precisions_share_weights(on_engines: Bundle) -> None:
    target = on_engines.target("tensorrt_rtx")
    assert isinstance(target, TensorRTTarget)
    engine = target.engine
    assert target.bodies == (BODY, EXACT, "body-exact2")
    kinds = {name: dict.fromkeys(call.plan for call in engine.programs[name].calls) for name in target.bodies}
    assert list(kinds[EXACT]) == ["double-exact", "single-exact", "residual"]
    # Blocks that a rule does not change are those of the body.
    assert list(kinds["body-exact2"]) == ["double-exact2", "single", "residual"]
    assert engine.audit["double"]["gemms"] == {"nvfp4": 8}
    assert engine.audit["double-exact"]["gemms"] == {"bf16": 8}
    assert engine.audit["double-exact2"]["gemms"] == {"bf16": 1, "nvfp4": 7}
    driver = FakeDriver()
    backend = TensorRTBackend(on_engines, target, driver, FakeLibrary(on_engines, target, driver, None))
    stored = {
        layer.name: layer.bytes_after for layer in on_engines.manifest.precision if layer.component == "transformer"
    }
    arena = backend._arena(BODY)
    assert len(arena.pieces) == len({piece.name for piece in arena.pieces})
    assert arena.nbytes < sum(stored.values()) + 256 * 3 * len(stored)
    backend.close()


def on_fake_gpus(bundle: Bundle, ranks: int, **request: Any) -> list[tuple[np.ndarray, FakeDriver, list[str]]]:
    """Of every rank: the final latents, its driver, and notes."""
    target = bundle.target("tensorrt_rtx" + (f"-{ranks}gpus" if ranks > 1 else ""))

    def work(group: Group | None) -> tuple[np.ndarray, FakeDriver, list[str]]:
        driver = FakeDriver()
        library = FakeLibrary(bundle, target, driver, None, group)
        backend = TensorRTBackend(bundle, target, driver, library, group, CAPSULE if group else None)
        pipeline = Pipeline(bundle, target=target.name, group=group, backend=backend)
        pipeline.generate(Request(PROMPT, seed=3, **request))
        return pipeline.latents(), driver, list(backend.notes)

    return on_every_rank(ranks, work) if ranks > 1 else [work(None)]


def test_engines_run_the_body_of_each_step(on_engines: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager, captured and launched: each body is a CUDA graph of its own, and the image is the CPU's to rounding."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = latents_of(on_engines, "onnxruntime-nvfp4")
    ((latents, driver, notes),) = on_fake_gpus(on_engines, 1)
    assert notes == []
    pipeline = Pipeline(on_engines, target="onnxruntime-nvfp4")
    assert psnr(*(pipeline.decode(found, (8, 8))[0] for found in (latents, whole))) > 25
    ran = [entry.removeprefix("run ") for entry in driver.log if entry.startswith("run ")]
    # Of every body one eager run, then one both ways; the rest is launched.
    assert ran.count("single") == 6 * (1 + 2)
    assert ran.count("double-exact2") == 2 * 1
    assert ran.count("single-exact") == 6 * 2
    ranked = on_fake_gpus(on_engines, 2)
    assert all(np.array_equal(ranked[0][0], one) for one, _, _ in ranked)
    assert psnr(*(pipeline.decode(found, (8, 8))[0] for found in (ranked[0][0], latents))) > 35


def test_skipped_steps_and_other_bodies_go_together(stepped: Bundle) -> None:
    """A skipped step takes the residual that the last computed one left, whichever body that was."""
    pipeline, skipped = Pipeline(stepped, target="onnxruntime-nvfp4", threads=1), (1, 5)
    text, noise, sigmas = (
        pipeline.encode_text(PROMPT, 1.5),
        starting_noise(3, 64, 32)[None],
        flow_match_sigmas(64, STEPS),
    )
    pipeline.begin(noise, pipeline.grid(None), 1.5, text)
    assert list(pipeline.denoise(sigmas, Decisions(STEPS, None, skipped))) == [step in skipped for step in range(STEPS)]
    ours = pipeline.latents()
    pipeline.begin(noise, pipeline.grid(None), 1.5, text)
    for step, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        pipeline._put_sigmas(sigma, after)
        graphs = ("prologue", "epilogue") if step in skipped else ("prologue", SCHEDULE[step], "epilogue")
        pipeline.backend.run(graphs, {"next_latents": "latents"})
    np.testing.assert_array_equal(pipeline.latents(), ours)


def test_processes_run_the_body_of_each_step(on_engines: Bundle) -> None:
    """Two ranks on the CPU, whose bodies are pieces between exchanges, against one process."""
    target = on_engines.target("onnxruntime-nvfp4-2gpus")
    assert target.sharding is not None
    pieces = {name: [part for part in parts if isinstance(part, str)] for name, parts in target.sharding.bodies.items()}
    assert list(pieces) == [BODY, EXACT, "body-exact2"]
    assert pieces[EXACT][0] == "body-exact-0"
    assert len({len(found) for found in pieces.values()}) == 1

    def work(group: Group) -> np.ndarray:
        pipeline = Pipeline(on_engines, target=target.name, threads=1, group=group)
        pipeline.generate(Request(PROMPT, seed=3))
        return pipeline.latents()

    ours = on_every_rank(2, work)[0]
    whole = latents_of(on_engines, "onnxruntime-nvfp4")
    pipeline = Pipeline(on_engines, target="onnxruntime-nvfp4")
    assert psnr(*(pipeline.decode(found, (8, 8))[0] for found in (ours, whole))) > 35


@pytest.mark.parametrize(("config", "singles"), [(KLEIN_4B, 20), (DEV, 48)], ids=["klein-4B", "dev"])
def test_plans_at_real_shapes_dequantize_in_one_pass(config: dict[str, Any], singles: int, tmp_path: Path) -> None:
    """The audit refuses a plan that moves a whole weight first; a second body adds a few megabytes."""
    pytest.importorskip("tensorrt_rtx", reason="the plans need tensorrt-rtx-cu13, as `make test` installs it")
    model = Flux2Transformer.read(config)
    plan = precision_plan("transformer", model.linears, ComponentPrecision("nvfp4", preset="modelopt-flux2"))
    source = {
        name: TensorRef(name, "BF16", shape, Path(), 0, 2 * math.prod(shape)) for name, shape in model.tensors.items()
    }
    bodies = body_plans(Precision(steps=(StepRule(last=5),)), plan)
    component = Component("transformer", planned_tensors(source, plan), plan, "", bodies)
    target, request = TensorRTRtxTarget(), sizes_of(1, (64, 64)) | {"tokens": 4096}
    cutter = Cutter([request], False, target.name, f"engines/{target.name}")
    cutter.transformer(exported("transformer", config, 512, dtype="bfloat16"), component, 512, None)
    write_sources(cutter.cut, tmp_path)
    engine = build_engine(target, cutter.cut, tmp_path)
    assert [call.plan for call in engine.programs[EXACT].calls].count("single-exact") == singles
    exact = [name for name in engine.plans if name.endswith("-exact")]
    assert sorted(exact) == ["double-exact", "single-exact"]
    assert sum((tmp_path / str(engine.plans[name].file)).stat().st_size for name in exact) < 6e6
    shards = shards_of(1, (1024, 1024), 4096, model, 512, 1, 2)
    for name in exact:
        assert set(engine.audit[name]["gemms"]) == {"bf16"}
        assert engine.audit[name]["copied_bytes"] < 2000
    predicted = work_of(model, bodies[EXACT], shards, 1).working_bytes
    assert max(engine.audit[name]["working_bytes"] for name in exact) < predicted * 1.05


# What it is predicted to take.


def test_an_image_takes_the_steps_of_each_body() -> None:
    subject: Subject = published_model("klein-4b")
    plan = body_plans(Precision(steps=(StepRule(last=1),)), subject.plan)[EXACT]
    b200 = GPUS["b200"]
    (plain,) = predict(subject, b200, (1,)).predictions
    (exact,) = predict(replace(subject, plan=plan), b200, (1,)).predictions
    (mixed,) = predict(replace(subject, bodies={EXACT: (plan, 1)}), b200, (1,)).predictions
    assert exact.time.seconds > plain.time.seconds
    assert plain.image_seconds == pytest.approx(4 * plain.time.seconds)
    assert mixed.image_seconds == pytest.approx(3 * plain.time.seconds + exact.time.seconds)
    assert mixed.first.weights == plain.first.weights
    assert mixed.first.working >= plain.first.working


def test_a_report_predicts_the_average_step() -> None:
    """With every step so it is that of the format without rounded inputs; bf16 and FP8 stay what they are."""
    found = []
    for changes in (("precision.steps=[{last: 24}]",), ("precision.transformer.default=nvfp4-w4a16",), ()):
        loaded = load_recipe(RECIPE, (CPU, "gates={}", *changes))
        prediction = predicted(loaded, read_source(loaded))
        assert prediction is not None
        found.append([(point.step_ms, point.step_ms_fp8, point.step_ms_bf16) for point in prediction.points])
    assert found[0] == found[1]
    assert all(one[0] != other[0] and one[1:] == other[1:] for one, other in zip(found[0], found[2], strict=True))


def test_the_command_line_predicts_and_plans_it() -> None:
    options = [word for change in (*QUICK, CPU, RULES.replace("last: 2", "last: 1")) for word in ("--set", change)]
    (gpu,) = json.loads(fluxc("predict", str(RECIPE), *options, "--on", "b200", "--gpus", "1", "--json"))["gpus"]
    assert {name: found["steps"] for name, found in gpu["bodies"].items()} == {EXACT: 1, "body-exact2": 1}
    assert "the last 1 of 3 leave the inputs of 36 layers" in fluxc("plan", str(RECIPE), *options)


def test_steps_that_are_measured_come_before_weights(tmp_path: Path) -> None:
    ready = preflight(load_recipe(RECIPE, (*QUICK, CPU, "precision.steps=auto")), tmp_path / "bundle", None)
    names = [step.name for step in steps(ready.job)]
    assert names.index("sensitivity") < names.index("step-errors") < names.index("weights-transformer")
    cached = (
        *QUICK,
        CPU,
        "precision.steps=auto",
        "sampling.steps=10",
        "step_cache={skip: 2, prompts: ../tests/data/eight-prompts.txt}",
    )
    ready = preflight(load_recipe(RECIPE, cached), tmp_path / "other", None)
    names = [step.name for step in steps(ready.job)]
    assert names.index("step-errors") < names.index("step-trace")
    # What is not measured yet leaves open what depends on it.
    told = {step.name: words for step, words in planned_stages(ready.job, steps(ready.job))}
    assert told["step-trace"] == "to run"
