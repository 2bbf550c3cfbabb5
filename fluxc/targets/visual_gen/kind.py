"""The kind `visual_gen`: a folder that TensorRT-LLM's VisualGen loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fluxc.base.cache import Made
from fluxc.base.errors import RecipeError
from fluxc.checkpoint.components import INDEX, small_files, without_machine
from fluxc.checkpoint.identify import pixels_per_token
from fluxc.checkpoint.source import HF_QUANT_CONFIG
from fluxc.graph.stage import ExportInputs
from fluxc.quantize.plan import LayerPlan
from fluxc.quantize.source import kept_tensors
from fluxc.recipe.targets import VisualGenTarget
from fluxc.targets.base import TargetContext, TargetKind, TargetWork
from fluxc.targets.parts import Weights
from fluxc.targets.visual_gen import stage
from fluxc.targets.visual_gen.folder import SCHEMA, check_built_in, check_visual_gen, is_split
from fluxrt import manifest as format


class VisualGen(TargetKind[VisualGenTarget, format.VisualGenTarget]):
    """See TargetKind."""

    options = VisualGenTarget

    def check(self, field: str, target: VisualGenTarget, context: TargetContext) -> None:
        """Refuse formats, numbers of GPUs and text encoders that VisualGen does not take, and what it computes otherwise."""
        source = context.source
        heads = context.source.transformer.num_attention_heads
        plan, length = source.stored_plan("transformer"), context.recipe.text.length
        check_visual_gen(field, target.gpu_counts, plan, heads, length, context.tokens)
        if source.quantized.get("text_encoder"):
            raise RecipeError(
                f"{field}: VisualGen takes a bf16 text encoder, this checkpoint's is quantized; start from one that "
                "is not, or leave this target out"
            )
        pixels = pixels_per_token(source.checkpoint)
        check_built_in(field, context.recipe, source.family, source.cfg_batch, pixels)

    def exports(self, target: VisualGenTarget, context: TargetContext) -> dict[str, ExportInputs]:
        """None: VisualGen has code of its own."""
        return {}

    def work(
        self,
        target: VisualGenTarget,
        context: TargetContext,
        exports: Mapping[str, Made],
        weights: Mapping[str, Weights],
        step_cache: format.StepCache | None,
    ) -> TargetWork:
        """The folder's own files, and links to the bundle's."""
        source, recipe = context.source, context.recipe
        is_bf16 = all(entry.format == "bf16" for entry in source.plans.get("text_encoder", []))
        encoder = source.checkpoint.components["text_encoder"]
        inputs = stage.VisualGenInputs(
            target=target,
            config=context.source.checkpoint.components["transformer"].config,
            plan=source.stored_plan("transformer"),
            weights=weights["transformer"],
            contents=weights["transformer"].files,
            linked=_linked_files(context, weights, is_bf16),
            sizes=recipe.listed_sizes,
            text_length=recipe.text.length,
            steps=recipe.sampling.steps,
            guidance=recipe.sampling.guidance,
            step_cache=step_cache,
            min_r2=recipe.step_cache.min_r2 if recipe.step_cache else 0.0,
            text_encoder=None
            if is_bf16
            else stage.TextEncoder(
                without_machine(source.family.text_encoder.with_layers(encoder.config, source.text_layers_kept)),
                kept_tensors(source, "text_encoder"),
                encoder.weight_files,
            ),
        )
        return TargetWork(inputs, stage.run)

    def place(self, entry: format.VisualGenTarget, folder: Path, staging: Path) -> format.VisualGenTarget:
        """The folder, checked where it then is."""
        from fluxc.targets.visual_gen.place import place_folder

        place_folder(entry, folder, staging)
        return entry

    def apart(self, component: str, plan: list[LayerPlan]) -> list[str]:
        """What VisualGen wants under other names; everything else it reads from the same files as everyone."""
        if component != "transformer":
            return []
        return [f"{entry.layer.name}.weight" for entry in plan if is_split(entry.layer.name)]

    def describe(self, target: VisualGenTarget) -> str:
        """What it is for and how far it is checked."""
        counts = ", ".join(map(str, target.gpu_counts))
        return (
            f"a folder that TensorRT-LLM's VisualGen loads ({SCHEMA}), with settings for {counts} GPUs; checked field by field "
            "and tensor by tensor here, run where tensorrt-llm is installed"
        )


def _linked_files(context: TargetContext, weights: Mapping[str, Weights], with_text_encoder: bool) -> list[str]:
    """The files of a bundle, by path, that VisualGen reads as they are."""
    files = ["model_index.json"]
    for name, component in context.source.checkpoint.components.items():
        if name == "transformer" or (name == "text_encoder" and not with_text_encoder):
            continue
        files += [f"{name}/{file.name}" for file in small_files(component) if file.name != HF_QUANT_CONFIG]
        if name in weights:
            files += [f"{name}/{file.name}" for file in weights[name].files]
            files += [weights[name].entry] if weights[name].entry.endswith(INDEX) else []
    return list(dict.fromkeys(files))
