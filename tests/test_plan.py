"""The precision plan: keep, rules, default, fusion groups, patterns that match nothing."""

from __future__ import annotations

from typing import Any

import pytest

from fluxc.base.errors import RecipeError
from fluxc.formats.registry import FORMATS
from fluxc.models.base import Linear
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.quantize.plan import LayerPlan, precision_plan
from fluxc.recipe.structs import ComponentPrecision, Rule
from test_flux2_tables import KLEIN_4B


def plan_of(**precision: Any) -> dict[str, LayerPlan]:
    plan = precision_plan("transformer", Flux2Transformer.read(KLEIN_4B).linears, ComponentPrecision(**precision))
    return {entry.layer.name: entry for entry in plan}


def test_default_applies_to_every_layer() -> None:
    assert {entry.format for entry in plan_of(default="nvfp4").values()} == {"nvfp4"}


def test_keep_wins_over_rules_and_first_rule_wins() -> None:
    plan = plan_of(
        default="nvfp4",
        exclude=("*.0.ff.linear_out",),
        rules=(Rule(match="*.ff.linear_out", format="fp8"), Rule(match="*.ff.*", format="bf16")),
    )
    assert plan["transformer_blocks.0.ff.linear_out"].format == "bf16"
    assert plan["transformer_blocks.1.ff.linear_out"].format == "fp8"
    assert plan["transformer_blocks.1.ff.linear_in"].format == "bf16"
    assert plan["transformer_blocks.1.ff_context.linear_in"].format == "nvfp4"
    assert plan["transformer_blocks.1.ff.linear_out"].rule == "rule '*.ff.linear_out'"


def test_a_rule_for_one_member_holds_for_the_fusion_group_and_says_so() -> None:
    plan = plan_of(default="nvfp4", exclude=("transformer_blocks.0.attn.to_q",))
    assert [plan[f"transformer_blocks.0.attn.to_{part}"].format for part in "qkv"] == ["bf16"] * 3
    assert "widened" not in plan["transformer_blocks.0.attn.to_q"].rule
    assert "widened to the fusion group" in plan["transformer_blocks.0.attn.to_k"].rule
    assert plan["transformer_blocks.1.attn.to_q"].format == "nvfp4"


def test_regular_expressions_match_whole_names() -> None:
    plan = plan_of(default="nvfp4", exclude=(r"re:transformer_blocks\.[01]\.attn\.to_out\.0",))
    kept = [name for name, entry in plan.items() if entry.format == "bf16"]
    assert kept == ["transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.to_out.0"]


@pytest.mark.parametrize(
    ("pattern", "suggestion"),
    [
        ("x_embeder", "x_embedder"),
        ("*to_added_qkv*", None),
        ("norm_out", "norm_out.linear"),
        ("*.atn.to_out.0", "attn.to_out.0"),
        ("re:single.*to_qkv_mlp", "to_qkv_mlp_proj"),
        ("*modulaton*", "did you mean '*modulation*'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_near_matches(pattern: str, suggestion: str | None) -> None:
    with pytest.raises(RecipeError, match="matches no layer") as raised:
        plan_of(default="nvfp4", exclude=(pattern,))
    assert pattern in str(raised.value)
    assert "precision.transformer.exclude[0]" in str(raised.value)
    if suggestion:
        assert suggestion in str(raised.value)


@pytest.mark.parametrize("pattern", ["re:(", "re:a{99999999999}", "re:[[a]", "re:*"])
def test_a_bad_regular_expression_is_an_error(pattern: str) -> None:
    with pytest.raises(RecipeError, match="not a regular expression"):
        plan_of(exclude=(pattern,))


def test_every_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(RecipeError) as raised:
        plan_of(exclude=("x_embeder", "proj_out", "prj_out"), rules=(Rule(match="nothing", format="fp8"),))
    for field in ("exclude[0]", "exclude[2]", "rules[0].match"):
        assert f"precision.transformer.{field}: the pattern" in str(raised.value)


def test_a_layer_whose_width_does_not_fit_the_block_is_an_error_that_says_what_to_keep() -> None:
    with pytest.raises(RecipeError, match=r"odd has 24 inputs.*add 'odd' to precision\.transformer\.exclude"):
        precision_plan("transformer", [Linear("odd", 8, 24)], ComponentPrecision(default="nvfp4"))


def test_bytes_of_each_format() -> None:
    layer = Linear("layer", 64, 32)
    after = {
        f: precision_plan("transformer", [layer], ComponentPrecision(default=f))[0].bytes_after
        for f in (*FORMATS, "bf16")
    }
    nvfp4 = 64 * 16 + 64 * 2 + 8
    others = {"fp8": 64 * 32 + 8, "mxfp4": 64 * 16 + 64, "bf16": 64 * 32 * 2}
    assert after == {"nvfp4": nvfp4, "nvfp4-w4a16": nvfp4 - 4, **others}


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_kept_layer_counts_two_bytes_a_value_whatever_it_has_in_the_checkpoint(itemsize: int) -> None:
    values = 64 * 32
    plan = precision_plan("transformer", [Linear("layer", 64, 32)], ComponentPrecision(), {"layer": values * itemsize})
    assert (plan[0].source_bytes, plan[0].bytes_after) == (values * itemsize, values * 2)
