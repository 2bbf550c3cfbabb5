"""Presets: each keeps what the published list would keep, found by that list's own means on diffusers' own model."""

from __future__ import annotations

import fnmatch
import re
from typing import Any

import pytest
import torch

from fluxc.base.errors import RecipeError
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.quantize.memory import weights_memory
from fluxc.quantize.plan import LayerPlan, precision_plan
from fluxc.quantize.presets import PRESETS, absent_parts
from fluxc.recipe.structs import ComponentPrecision, Rule
from test_flux2_tables import DEV, KLEIN_4B, KLEIN_9B, NANO_CONFIG

FAMILIES = {"dev": DEV, "klein-9B": KLEIN_9B, "klein-4B": KLEIN_4B, "nano": NANO_CONFIG}
BLOG = r".*(embedder|norm_out|proj_out|to_add_out|to_added_qkv|stream).*"
MODELOPT = (
    r"(proj_out.*|.*(time_text_embed|context_embedder|x_embedder|norm_out|time_guidance_embed|stream_modulation).*)"
)

family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


def plan_of(config: dict[str, Any], **precision: Any) -> list[LayerPlan]:
    return precision_plan("transformer", Flux2Transformer.read(config).linears, ComponentPrecision(**precision))


def kept(config: dict[str, Any], **precision: Any) -> set[str]:
    return {e.layer.name for e in plan_of(config, default="nvfp4", **precision) if e.format == "bf16"}


def share_and_gib(config: dict[str, Any], **precision: Any) -> tuple[float, float]:
    plan = plan_of(config, default="nvfp4", **precision)
    share = sum(e.parameters for e in plan if e.format == "bf16") / sum(e.parameters for e in plan)
    return 100 * share, weights_memory(Flux2Transformer.read(config).tensors, plan).planned / 2**30


def diffusers_model(config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        return Flux2Transformer2DModel.from_config(config)


def linears(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


@family
def test_modelopt_flux2_keeps_what_the_original_expression_matches(config: dict[str, Any]) -> None:
    # The original is asked about quantizers, which are submodules of the Linears.
    names = linears(diffusers_model(config))
    assert kept(config, preset="modelopt-flux2") == {n for n in names if re.match(MODELOPT, f"{n}.weight_quantizer")}


@family
def test_nvidia_blog_keeps_what_the_original_expression_matches_once_projections_are_fused(
    config: dict[str, Any],
) -> None:
    model = diffusers_model(config)
    names = linears(model)
    as_written = {name for name in names if re.match(BLOG, name)}
    assert not any(".add_" in name for name in as_written)

    for block in model.transformer_blocks:
        block.attn.fuse_projections()
    fused = {name for name in linears(model) - names if re.match(BLOG, name)}
    assert {name.rsplit(".", 1)[-1] for name in fused} == {"to_added_qkv"}
    assert len(fused) == config["num_layers"]
    members = {name.replace("to_added_qkv", f"add_{part}_proj") for name in fused for part in "qkv"}
    assert members <= names
    assert kept(config, preset="nvidia-blog") == as_written | members


@family
def test_trtllm_auto_keeps_what_a_walk_over_the_modules_finds(config: dict[str, Any]) -> None:
    model = diffusers_model(config)
    patterns = [
        f"*{name}*"
        for name, child in model.named_children()
        if not isinstance(child, torch.nn.ModuleList)
        and any(min(m.weight.shape) <= 512 for m in child.modules() if isinstance(m, torch.nn.Linear))
    ]
    expected = {name for name in linears(model) if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    assert kept(config, preset="trtllm-auto") == expected


@pytest.mark.parametrize(
    ("precision", "share", "gib"),
    [
        # The first three were computed on diffusers' meta model before this table of layers existed.
        ({"exclude": ["*embedder*", "*norm_out*", "*proj_out*", "*to_add_out*", "*stream*"]}, 3.47, 18.4),
        ({"preset": "modelopt-flux2"}, 2.53, 18.0),
        ({"preset": "trtllm-auto"}, 0.25, 17.0),
        ({"preset": "nvidia-blog"}, 6.28, 19.6),
    ],
    ids=["nvidia-blog as written", "modelopt-flux2", "trtllm-auto", "nvidia-blog mended"],
)
def test_share_and_size_on_dev(precision: dict[str, Any], share: float, gib: float) -> None:
    actual_share, actual_gib = share_and_gib(DEV, **precision)
    assert actual_share == pytest.approx(share, abs=0.005)
    assert actual_gib == pytest.approx(gib, abs=0.05)


@pytest.mark.parametrize(
    ("config", "preset", "share", "gib"),
    [
        (KLEIN_9B, "nvidia-blog", 9.82, 5.95),
        (KLEIN_9B, "modelopt-flux2", 3.90, 5.23),
        (KLEIN_9B, "trtllm-auto", 0.21, 4.78),
        (KLEIN_4B, "nvidia-blog", 9.90, 2.54),
        (KLEIN_4B, "modelopt-flux2", 5.03, 2.29),
        (KLEIN_4B, "trtllm-auto", 0.28, 2.05),
    ],
)
def test_the_documented_shares_and_sizes_on_klein(
    config: dict[str, Any], preset: str, share: float, gib: float
) -> None:
    assert share_and_gib(config, preset=preset) == (pytest.approx(share, abs=0.005), pytest.approx(gib, abs=0.005))


@family
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_which_part_decided_and_splits_no_fusion_group(config: dict[str, Any], name: str) -> None:
    plan = plan_of(config, default="nvfp4", preset=name)
    assert not any(entry.widened for entry in plan)
    assert all(entry.rule.startswith(f"preset {name}: '") for entry in plan if entry.format == "bf16")
    assert PRESETS[name].source
    assert PRESETS[name].meaning


@family
def test_the_only_part_a_flux2_may_lack_is_flux1s(config: dict[str, Any]) -> None:
    lacking = {
        (name, part.pattern)
        for name in PRESETS
        for part in absent_parts(PRESETS[name], Flux2Transformer.read(config).linears)
    }
    assert lacking == {("modelopt-flux2", "*time_text_embed*")}


def test_explicit_rules_win_over_the_preset_and_keep_wins_over_both() -> None:
    plan = {
        entry.layer.name: entry
        for entry in plan_of(
            KLEIN_4B,
            default="nvfp4",
            exclude=("x_embedder",),
            preset="modelopt-flux2",
            rules=(Rule(match="*_embedder", format="fp8"),),
        )
    }
    assert (plan["x_embedder"].format, plan["x_embedder"].rule) == ("bf16", "exclude 'x_embedder'")
    assert (plan["context_embedder"].format, plan["context_embedder"].rule) == ("fp8", "rule '*_embedder'")
    assert (plan["proj_out"].format, plan["proj_out"].rule) == ("bf16", "preset modelopt-flux2: 'proj_out*'")
    assert (plan["transformer_blocks.0.attn.to_q"].format, plan["transformer_blocks.0.attn.to_q"].rule) == (
        "nvfp4",
        "default",
    )


def test_a_rule_for_one_member_of_a_group_that_a_preset_keeps_moves_the_whole_group() -> None:
    rule = Rule(match="transformer_blocks.0.attn.add_k_proj", format="fp8")
    plan = {e.layer.name: e for e in plan_of(KLEIN_4B, default="nvfp4", preset="nvidia-blog", rules=(rule,))}
    assert {plan[f"transformer_blocks.0.attn.add_{part}_proj"].format for part in "qkv"} == {"fp8"}
    assert [plan[f"transformer_blocks.0.attn.add_{part}_proj"].widened for part in "qkv"] == [True, False, True]
    assert {plan[f"transformer_blocks.1.attn.add_{part}_proj"].format for part in "qkv"} == {"bf16"}


def test_a_part_that_matches_nothing_is_an_error_with_the_preset_and_near_matches() -> None:
    layers = [layer for layer in Flux2Transformer.read(KLEIN_4B).linears if not layer.name.startswith("norm_out")]
    with pytest.raises(
        RecipeError, match=r"precision\.transformer\.preset modelopt-flux2: .*'\*norm_out\*' matches no"
    ):
        precision_plan("transformer", layers, ComponentPrecision(default="nvfp4", preset="modelopt-flux2"))


def test_the_fused_name_of_the_added_projections_is_an_error_in_a_recipe() -> None:
    with pytest.raises(RecipeError, match=r"'\*to_added_qkv\*' matches no layer"):
        plan_of(DEV, default="nvfp4", exclude=("*to_added_qkv*",))
