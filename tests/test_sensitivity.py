"""`exclude: auto`: costs are measured on the model, the choice is the best under its budget, and it beats the presets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import NANO, RECIPE, RecordingProgress, compile_into
from fluxc.base.errors import RecipeError
from fluxc.calibrate.sensitivity import Simulation, State, output_errors, record_states, state_errors, velocities_of
from fluxc.calibrate.sensitivity_stage import keep
from fluxc.checkpoint.reference import Generation
from fluxc.checkpoint.source import open_checkpoint
from fluxc.formats import nvfp4
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.quantize.plan import precision_plan
from fluxc.quantize.presets import PRESETS
from fluxc.quantize.source import read_source
from fluxc.recipe.load import load_recipe
from fluxc.recipe.structs import ComponentPrecision
from fluxc.running.model import PlacedModel, ReferenceModel
from fluxc.running.placement import Placement
from fluxrt.bundle import open_bundle
from quick import QUICK

GENERATION = Generation((64, 64), 3, 1.5, 0, 32, (9, 18, 27))
PROMPTS = ["a small red ring at the top on a blue background", "a large green cross at the left on a black background"]


def test_the_choice_is_the_best_one_within_the_budget() -> None:
    generator = np.random.default_rng(0)
    for budget in (0, 7, 20, 45, 1000):
        sizes, alone = generator.integers(1, 20, 9).tolist(), generator.random(9).tolist()
        every = [c for n in range(10) for c in itertools.combinations(range(9), n)]
        best = max(sum(alone[i] for i in c) for c in every if sum(sizes[i] for i in c) <= budget)
        kept = keep(alone, sizes, budget)
        assert sum(sizes[i] for i in kept) <= budget
        assert sum(alone[i] for i in kept) == pytest.approx(best)


class CountReads(TorchDispatchMode):
    """Counts the numbers that are read out of tensors, each of which a GPU would be waited for."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_errors_of_all_states_are_read_at_the_end() -> None:
    generator = torch.Generator().manual_seed(0)
    velocities = [torch.randn(2, 3, generator=generator) for _ in range(5)]
    states = [State([{"given": velocity}], velocity * 1.25) for velocity in velocities]

    with CountReads() as counted:
        errors = output_errors(lambda listed: [arguments["given"] for arguments in listed], states, 1.0)
    assert errors == pytest.approx([0.04] * 5, rel=1e-6)
    assert counted.reads == 0


@contextmanager
def nano_transformer(pieces: str) -> Iterator[tuple[PlacedModel, list[State]]]:
    """flux2-nano's transformer in fp32, and states of PROMPTS."""
    checkpoint = open_checkpoint(str(NANO), None, NANO)
    model = ReferenceModel(checkpoint, Placement("cpu", torch.float32, pieces))
    with model.component("text_encoder", GENERATION.text_layers) as encoder:
        *texts, empty = model.encode(encoder, [*PROMPTS, ""], GENERATION)
    with model.component("transformer") as transformer:
        generations = [GENERATION.of_prompt(number) for number in range(len(PROMPTS))]
        yield transformer, record_states(model, transformer, texts, empty, generations)


def counted(transformer: PlacedModel) -> list[int]:
    """How many calls go through `transformer` together, of each run from now on."""
    found: list[int] = []
    run = transformer.run

    def noting(calls: Sequence[Callable[[], Any]]) -> list[Any]:
        found.append(len(calls))
        return run(calls)

    transformer.run = noting  # type: ignore[method-assign]
    return found


def test_layer_by_layer_the_error_of_a_quantized_group_is_the_same() -> None:
    checkpoint = open_checkpoint(str(NANO), None, NANO)
    component = checkpoint.components["transformer"]
    linears = Flux2Transformer.read(component.config).linears
    plan = precision_plan("transformer", linears, ComponentPrecision("nvfp4"))
    group = [entry for entry in plan if entry.layer.group == "transformer_blocks.1.attn.to_qkv"]
    simulation = Simulation(component.tensors, {(e.layer.name, e.format): 8.0 for e in group}, "max", True)
    errors: dict[str, list[list[float]]] = {}
    for pieces in ("component", "layer"):
        with nano_transformer(pieces) as (transformer, states):
            assert len(states) == 6
            together = counted(transformer)
            before = state_errors(transformer, states, GENERATION.guidance)
            with simulation.of(transformer, group):
                changed = state_errors(transformer, states, GENERATION.guidance)
                # Of each image the second step takes from the first, the third from itself.
                reused = state_errors(transformer, states, GENERATION.guidance, [0, 0, 2, 3, 3, 5])
            after = state_errors(transformer, states, GENERATION.guidance)
            errors[pieces] = [found.tolist() for found in (before, changed, reused, after)]
            # Layer by layer all calls of a run keep their activations: those of four states, and of the fifth, which reuses the
            # fourth's; two branches each.
            assert max(together) == (12 if pieces == "component" else 10)
    assert errors["component"] == errors["layer"]
    before, changed, reused, after = (np.array(found) for found in errors["layer"])
    assert not before.any()
    assert not after.any()
    assert changed.all()
    assert (np.nonzero(reused != changed)[0] == [1, 4]).all()


def test_a_quantized_group_computes_as_stored_and_is_restored_exactly() -> None:
    with nano_transformer("component") as (transformer, states):
        _check_group(transformer, states)


def _check_group(transformer: PlacedModel, states: list[State]) -> None:
    checkpoint = open_checkpoint(str(NANO), None, NANO)
    model, velocities = transformer.module, velocities_of(transformer)
    assert len(states) == 6
    assert not output_errors(velocities, states, GENERATION.guidance).any()
    plan = precision_plan(
        "transformer",
        Flux2Transformer.read(checkpoint.components["transformer"].config).linears,
        ComponentPrecision("nvfp4"),
    )
    group = [entry for entry in plan if entry.layer.group == "transformer_blocks.1.attn.to_qkv"]
    assert len(group) == 3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = checkpoint.components["transformer"].tensors
    errors = {}
    for rounded in (False, True):
        with Simulation(tensors, {(e.layer.name, e.format): 8.0 for e in group}, "max", rounded).of(transformer, group):
            shared = torch.cat([before[f"{e.layer.name}.weight"].flatten() for e in group]).abs().amax()
            for entry in group:
                weight = before[f"{entry.layer.name}.weight"]
                expected = nvfp4.dequantize(*nvfp4.quantize(weight, nvfp4.tensor_scale(shared)))
                module = model.get_submodule(entry.layer.name)
                assert torch.equal(module.weight, expected)
                x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
                seen = nvfp4.fake_quantize(x, torch.tensor(8.0 / 2688)) if rounded else x
                assert torch.equal(module(x), torch.nn.functional.linear(seen, expected))
            errors[rounded] = output_errors(velocities, states, GENERATION.guidance).mean()
    assert 0 < errors[False] < errors[True] < 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def mean_error(bundle: Path) -> float:
    """Root mean square over held-out prompts and steps of the velocity's relative error."""
    prompts = json.loads((bundle / "report" / "report.json").read_text())["targets"]["onnxruntime-nvfp4"]["prompts"]
    return float(np.sqrt(np.mean(np.square([prompt["step_error"] for prompt in prompts]))))


def kept_share(bundle: Path) -> float:
    layers = [layer for layer in open_bundle(bundle).manifest.precision if layer.component == "transformer"]
    sizes = {kept: sum(np.prod(x.shape) for x in layers if (x.format == "bf16") == kept) for kept in (True, False)}
    return float(sizes[True] / (sizes[True] + sizes[False]))


HELD_OUT = (
    "targets=[{kind: onnxruntime, activations: nvfp4}]",
    "sampling.steps=6",
    "calibration.prompts=../tests/data/two-prompts.txt",
    "gates={}",
)


def held_out_build(workshop: Path, name: str, precision: str) -> Path:
    return compile_into(workshop / name, *HELD_OUT, f"precision.transformer={precision}")


def test_it_beats_every_preset_of_equal_size_on_held_out_prompts(workshop: Path) -> None:
    presets = {
        name: held_out_build(workshop, name, f"{{default: nvfp4, preset: {name}}}")
        for name in ("modelopt-flux2", "nvidia-blog")
    }
    # On flux2-nano, trtllm-auto keeps what modelopt-flux2 keeps.
    assert set(presets) | {"trtllm-auto"} == set(PRESETS)
    for name, bundle in presets.items():
        share = kept_share(bundle)
        auto = held_out_build(
            workshop, f"auto-{name}", f"{{default: nvfp4, exclude: auto, budget: {{share: {share + 1e-9}}}}}"
        )
        assert kept_share(auto) <= share + 1e-9
        assert mean_error(auto) < mean_error(bundle), name


@pytest.fixture(scope="module")
def auto_bundle(workshop: Path) -> Path:
    return compile_into(
        workshop / "auto", *QUICK, "precision.transformer={default: nvfp4, exclude: auto, budget: {share: 0.1}}"
    )


def sensitivity(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "report" / "report.json").read_text())["sensitivity"]


def test_the_bundle_says_what_was_kept_and_why(auto_bundle: Path) -> None:
    measured = sensitivity(auto_bundle)
    layers = {x.name: x for x in open_bundle(auto_bundle).manifest.precision if x.component == "transformer"}
    assert sorted(name for group in measured["ranking"] for name in group["layers"]) == sorted(layers)
    for rank, group in enumerate(measured["ranking"], start=1):
        for name in group["layers"]:
            assert (layers[name].format == "bf16") == group["kept"]
            if group["kept"]:
                assert layers[name].rule == f"exclude auto: rank {rank}, error alone {group['error_alone']}"
    by_parameter = [group["error_alone"] ** 2 / group["parameters"] for group in measured["ranking"]]
    assert all(a >= b * 0.999 for a, b in itertools.pairwise(by_parameter))
    assert measured["inputs_rounded"]
    assert 0 < measured["share_kept"] <= 0.1
    assert measured["error"] < measured["error_all_quantized"]
    assert "What exclude: auto measured" in (auto_bundle / "report" / "index.html").read_text()


def test_a_second_build_measures_nothing(auto_bundle: Path) -> None:
    progress = RecordingProgress()
    change = "precision.transformer={default: nvfp4, exclude: auto, budget: {share: 0.1}}"
    compile_into(auto_bundle, *QUICK, change, progress=progress)
    assert progress.ran == ["hash checkpoint"]


def test_an_error_budget_keeps_only_what_it_takes(auto_bundle: Path, workshop: Path) -> None:
    allowed = sensitivity(auto_bundle)["error_all_quantized"] * 0.7
    change = f"precision.transformer={{default: nvfp4, exclude: auto, budget: {{error: {allowed}}}}}"
    progress = RecordingProgress()
    bundle = compile_into(workshop / "auto-error", *QUICK, change, progress=progress)
    assert "measure sensitivity" not in progress.ran, "the groups were measured for another budget already"
    assert "choose layers" in progress.ran
    assert sensitivity(bundle)["error"] <= allowed * 1.001
    assert 0 < sensitivity(bundle)["share_kept"] < 0.3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("precision.transformer={default: nvfp4, exclude: auto}", r"budget: goes with `exclude: auto`"),
        ("precision.transformer={default: nvfp4, budget: {share: 0.1}}", r"budget: goes with `exclude: auto`"),
        ("precision.transformer={exclude: auto, budget: {}}", "give either share or error"),
        ("precision.transformer={exclude: auto, budget: {share: 0.1, error: 0.1}}", "give either share or error"),
        ("precision.transformer={exclude: auto, budget: {share: 1.5}}", "more than 0 and less than 1"),
        ("precision.text_encoder={exclude: auto, budget: {share: 0.1}}", "auto measures the transformer"),
        ("precision.transformer.exclude=automatic", "exclude"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(RECIPE, (change,))


def test_auto_with_nothing_to_choose_from_is_refused() -> None:
    change = "precision.transformer={default: bf16, exclude: auto, budget: {share: 0.1}}"
    with pytest.raises(RecipeError, match="auto has nothing to choose from: no layer of the transformer"):
        read_source(load_recipe(RECIPE, (change,)))
