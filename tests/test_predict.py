"""Predicted scaling: what is counted against torch's own counter, the fit, and what `plan --on` says.

What compiled plans move and hold is compared in test_ulysses_gpu.py, where plans of real shapes are built.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from conftest import RECIPE
from fluxc.cli.main import main
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.published import DEV, KLEIN_4B
from fluxc.predict import published
from fluxc.predict.gpus import GPUS
from fluxc.predict.rates import ASSUMED, Efficiency, fit, step_time
from fluxc.predict.report import print_scaling
from fluxc.predict.scaling import predict, published_model
from fluxc.predict.work import Work, work_of
from fluxc.quantize.plan import precision_plan
from fluxc.recipe.structs import ComponentPrecision, Format
from fluxc.targets.sharding import shards_of
from test_flux2_tables import NANO_CONFIG

SIZE = (1024, 1024)
console = Console(width=200)


def work(config: dict[str, Any], ranks: int = 1, branches: int = 1, format: Format = "nvfp4") -> Work:
    model = Flux2Transformer.read(config)
    plan = precision_plan("transformer", model.linears, ComponentPrecision(default=format))
    return work_of(model, plan, shards_of(ranks, SIZE, 4096, model, 512, branches, 2), branches)


@pytest.mark.parametrize(
    ("config", "branches"), [(DEV, 1), (KLEIN_4B, 1), (NANO_CONFIG, 2)], ids=["dev", "klein", "nano"]
)
def test_operations_are_those_torch_counts_in_diffusers(config: dict[str, Any], branches: int) -> None:
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        model = Flux2Transformer2DModel.from_config(config)
        inputs = {
            "hidden_states": torch.empty(branches, 4096, config["in_channels"]),
            "encoder_hidden_states": torch.empty(branches, 512, config["joint_attention_dim"]),
            "timestep": torch.empty(branches),
            "guidance": torch.empty(branches) if config["guidance_embeds"] else None,
            "img_ids": torch.empty(4096, 4),
            "txt_ids": torch.empty(512, 4),
        }
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs)
    assert work(config, branches=branches).flop == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_share_the_operations_and_exchange_twice_a_block(ranks: int) -> None:
    alone, one = work(DEV), work(DEV, ranks)
    outside_the_streams = sum(p.flop * p.count for p in alone.gemms if p.flop < 1e10)
    assert ranks * one.flop == pytest.approx(alone.flop + (ranks - 1) * outside_the_streams, rel=1e-3)
    assert (one.exchanges, alone.exchanges, alone.sent_bytes) == (112, 0, 0)


@dataclass(frozen=True)
class Measured:
    """A figure that the model itself gave at known shares of the peaks."""

    published: float
    formula: Callable[[Efficiency], float]
    doubt: float = 1e-3

    def predicted(self, efficiency: Efficiency) -> float:
        return self.formula(efficiency)


def test_a_fit_finds_the_shares_that_made_the_figures() -> None:
    truth = Efficiency(nvfp4=0.4, other_gemms=0.7, attention=0.5, memory=0.8, link=0.6)
    one, four, bf16 = work(DEV), work(DEV, 4), work(DEV, format="bf16")
    formulas: list[Callable[[Efficiency], float]] = [
        lambda efficiency: step_time(one, GPUS["b200"], efficiency).gemms,
        lambda efficiency: step_time(one, GPUS["b200"], efficiency).attention,
        lambda efficiency: step_time(one, GPUS["b200"], efficiency).memory,
        lambda efficiency: step_time(four, GPUS["b200"], efficiency).seconds,
        lambda efficiency: step_time(bf16, GPUS["h200"], efficiency).seconds,
    ]
    found = fit([Measured(formula(truth), formula) for formula in formulas])
    assert astuple(found) == pytest.approx(astuple(truth), rel=0.02)
    assert fit([]) == ASSUMED


def test_the_published_figures_are_predicted_and_every_error_is_told() -> None:
    errors = {c.point.what: c.error for c in published.checked()}
    assert len(errors) == 8
    assert abs(errors["B200, NVFP4"]) < 0.05
    outlier = errors.pop("B200 against H200, bf16")
    assert 0.2 < outlier < 0.4
    assert max(map(abs, errors.values())) < 0.15
    assert 15 < published.steps_computed_with_teacache() < 25


def test_an_error_without_a_point_does_not_come_from_that_point(monkeypatch: pytest.MonkeyPatch) -> None:
    before = published.checked()[0]
    altered = replace(published.POINTS[0], published=50.0)
    monkeypatch.setattr(published, "POINTS", (altered, *published.POINTS[1:]))
    efficiency = fit(published.POINTS)
    assert altered.predicted(efficiency) > 1.5 * before.predicted
    others = fit([point for point in published.POINTS if point is not altered])
    assert altered.predicted(others) == pytest.approx(before.without, rel=1e-6)


def test_more_gpus_are_faster_but_never_ideal_and_hold_the_same_weights() -> None:
    found = predict(published_model("dev"), GPUS["b200"], (1, 2, 4, 8)).predictions
    steps = [p.time.seconds for p in found]
    for count, step in zip((2, 4, 8), steps[1:], strict=True):
        assert steps[0] / count < step < steps[0]
    assert found[0].others is None
    for p in found[1:]:
        assert p.others is not None
        assert p.others.weights == published_model("dev").weights < p.first.weights
        assert p.others.working < found[0].first.working


def test_a_gpu_without_fp4_computes_nvfp4_layers_in_bf16_and_holds_them_in_four() -> None:
    dev = published_model("dev")
    in_bf16 = replace(
        dev, plan=precision_plan("transformer", Flux2Transformer.read(DEV).linears, ComponentPrecision("bf16"))
    )
    nvfp4, bf16 = (predict(subject, GPUS["h200"], (1,)).predictions[0] for subject in (dev, in_bf16))
    assert nvfp4.time == bf16.time
    assert nvfp4.first.weights - dev.text_encoder - dev.vae < 20 * 2**30
    assert predict(dev, GPUS["b200"], (1,)).predictions[0].time.gemms < 0.2 * nvfp4.time.gemms


def predicted(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["predict", *arguments])


def test_a_published_model_is_predicted_and_names_it_a_prediction() -> None:
    result = predicted("--on", "B200", "--gpus", "8,1,3,2,4")
    assert result.exit_code == 0
    assert result.output.startswith("PREDICTED, not measured: FLUX.2 dev on B200")
    assert "3 GPUs: --gpus: among 3 GPUs the 512 text tokens cannot be shared equally" in result.output
    for row in ("5.6 s", "3.61 s", "6.94 s", "6.3x", "10.2x", "calibrated without it", "the text encoder's"):
        assert row in result.output


def test_a_recipe_is_predicted_as_planned_with_its_text_encoder_and_vae_on_the_first_rank() -> None:
    result = predicted(str(RECIPE), "--on", "b200", "--gpus", "1,2", "--json", "--set", "step_cache={skip: 8}")
    assert result.exit_code == 0
    told = json.loads(result.output)
    assert (told["predicted"], told["steps"], told["skipped"]) == (True, 24, 8)
    one, two = told["gpus"]
    assert two["first_rank_bytes"]["weights"] > two["other_ranks_bytes"]["weights"]
    assert one["other_ranks_bytes"] is None
    assert one["step_seconds"] == pytest.approx(sum(one["parts_seconds"].values()))
    text = predicted(str(RECIPE), "--on", "b200", "--gpus", "1,2", "--set", "step_cache={skip: 8}").output
    assert "8 steps skipped, s" in text
    assert "two passes a step (guidance)" in text


def test_published_kleins_are_generated_in_four_steps() -> None:
    told = json.loads(predicted("--on", "b200", "--model", "klein-4b", "--json", "--gpus", "1").output)
    assert (told["model"], told["steps"]) == ("FLUX.2 klein-4b", 4)


def test_a_gpu_without_published_figures_and_one_that_is_too_small_are_named() -> None:
    told = predicted("--on", "rtx-5090", "--gpus", "1").output
    assert "None of these figures is of RTX 5090" in told
    assert "None of these figures" not in predicted("--on", "b200", "--gpus", "1").output
    dev_in_bf16 = replace(published_model("dev"), weights=64 * 10**9)
    with console.capture() as capture:
        print_scaling(console, predict(dev_in_bf16, GPUS["rtx-5090"], (1, 2)))
    text = " ".join(capture.get().split())
    # Resident or staged, rank 0 does not fit, nor does another rank.
    assert text.count(": does not fit") == 5


def test_a_step_cache_that_chooses_for_itself_is_not_counted() -> None:
    result = predicted(str(RECIPE), "--on", "b200", "--set", "step_cache={skip: auto}")
    assert "is known once the recipe is built" in result.output


@pytest.mark.parametrize(("model", "fits"), [("klein-4b", True), ("klein-9b", True), ("dev", False)])
def test_four_megapixels_on_32_gb_are_told(model: str, fits: bool) -> None:
    """dev fits where its components take turns, and only then."""
    arguments = ("--on", "rtx-5090", "--gpus", "1", "--model", model, "--size", "2048x2048")
    told = json.loads(predicted(*arguments, "--json").output)
    (one,) = told["gpus"]
    assert told["size"] == [2048, 2048]
    resident, staged = one["first_rank_bytes"], one["first_rank_staged_bytes"]
    assert resident["working"] == pytest.approx(6.188 * 2**30, rel=0.01)
    assert (sum(resident.values()) < 32e9) == fits
    assert sum(staged.values()) < min(32e9, sum(resident.values()))
    text = " ".join(predicted(*arguments).output.split())
    assert ("does not fit" in text) != fits
    assert "e+" not in text


@pytest.mark.parametrize("size", [(1024, 1024), (2048, 2048)])
def test_devs_components_take_turns_under_32_gb(size: tuple[int, int]) -> None:
    """Its 18 GiB of NVFP4 and the 17 GiB of its FP8 text encoder: each beside the buffers and its own working memory."""
    dev = published_model("dev", size)
    (one,) = predict(dev, GPUS["rtx-5090"], (1,)).predictions
    assert one.first.weights == dev.weights + dev.text_encoder + dev.vae > 32e9
    assert {name: memory.weights for name, memory in one.stages.items()} == {
        "text encoder": dev.text_encoder,
        "transformer": dev.weights,
        "VAE": dev.vae,
    }
    assert all(memory.total < 32e9 for memory in one.stages.values())
    assert one.staged.total == max(memory.total for memory in one.stages.values())
    assert one.stages["VAE"].working == dev.decoder == one.first.working


def test_weights_of_published_text_encoders_are_those_their_shapes_have() -> None:
    """Mistral-Small by hand: 30 layers in FP8 and the embedding in bf16."""
    layer = 5120 * (2 * 32 * 128 + 2 * 8 * 128) + 3 * 5120 * 32768
    assert published_model("dev").text_encoder == pytest.approx(30 * layer + 2 * 131072 * 5120, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--on", "b200", "--size", "1024"], "'1024' is not a size HEIGHTxWIDTH"),
        (["--on", "b200", "--size", "1000x1000"], "1000x1000 is not possible: this model's tokens are 16x16 pixels"),
        (
            ["--on", "b200", "--size", "4096x4096"],
            "--size: at 4096x4096 the VAE's decoder has an activation",
        ),
        (["--on", "b200", "--size", "64x64", str(RECIPE)], "--size goes without a RECIPE"),
        ([], "missing option '--on'"),
        (["--on", "b300x"], "'b300x' is not one of"),
        (["--on", "b200", "--gpus", "two"], "'two' is not a list of numbers"),
        (["--on", "b200", "--gpus", "0,1"], "is not a list of numbers"),
        (["--on", "b200", "--gpus", "-1"], "'-1' is not a list of numbers"),
        (["--on", "b200", "--size", "0x0"], "0x0 is not possible"),
        (["--on", "b200", "--size", "9" * 5000 + "x8"], "is not a size HEIGHTxWIDTH"),
        (["--on", "b200", "--model", "dev", str(RECIPE)], "without a RECIPE"),
        (["--on", "b200", "--set", "text.length=7"], "--set goes with a RECIPE"),
        (["--on", "b200", "--gpus", "3,5"], "among 3 GPUs the 512 text tokens cannot be shared equally"),
    ],
)
def test_what_cannot_be_predicted_is_refused(arguments: list[str], says: str) -> None:
    result = predicted(*arguments)
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize(("width", "left_out"), [(80, ["launches"]), (60, ["attention", "launches"]), (180, [])])
def test_a_narrow_terminal_keeps_whole_figures_and_leaves_parts_of_a_step_out(width: int, left_out: list[str]) -> None:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    print_scaling(console, predict(published_model("dev"), GPUS["b200"], (1, 8)))
    table = console.file.getvalue().partition("predicted time")[2].partition("predicted memory")[0]
    header = next(line for line in table.splitlines() if "GPUs" in line)
    for column in ("a step, ms", "image, s", "against 1", "of ideal"):
        assert column in header
    note = " ".join(table.partition("not shown at this width")[2].split())
    assert [name for name in ("attention", "launches") if name in note] == left_out
