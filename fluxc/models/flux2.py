"""What a FLUX.2 is, computed from its configs alone: layers and shapes, fusion groups, sampling, text encoding.

Names and shapes as in diffusers' Flux2Transformer2DModel and transformers' Qwen3ForCausalLM; no torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fluxc.base.errors import CheckpointError, RecipeError
from fluxc.checkpoint.source import Checkpoint
from fluxc.models.flux2_vae import Flux2VAE

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """One Linear: its module name, [out, in], and the fusion group an engine would merge it in."""

    name: str
    out_features: int
    in_features: int
    group: str | None = None


@dataclass(frozen=True)
class Family:
    """A kind of FLUX.2 pipeline: the classes it is made of and how it reads prompts."""

    pipeline_class: str
    text_encoder_class: str
    text_layers: tuple[int, ...]
    template_options: dict[str, Any]


FAMILIES = {
    "Flux2KleinPipeline": Family("Flux2KleinPipeline", "Qwen3ForCausalLM", (9, 18, 27), {"enable_thinking": False}),
}


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of `checkpoint`, after checking that its components are of the classes the family is made of."""
    family = FAMILIES.get(checkpoint.pipeline_class)
    if family is None:
        raise CheckpointError(
            f"{checkpoint.root}: pipeline class {checkpoint.pipeline_class!r} is not supported; "
            f"this fluxc compiles {', '.join(FAMILIES)}"
        )
    for name, expected in (
        ("transformer", "Flux2Transformer2DModel"),
        ("text_encoder", family.text_encoder_class),
        ("vae", "AutoencoderKLFlux2"),
        ("scheduler", "FlowMatchEulerDiscreteScheduler"),
    ):
        actual = checkpoint.components[name].class_name
        if actual != expected:
            raise CheckpointError(f"{checkpoint.root}: {name} is a {actual}, expected {expected}")
    scheduler = checkpoint.components["scheduler"].config
    expected_schedule = {
        "use_dynamic_shifting": True,
        "time_shift_type": "exponential",
        "shift_terminal": None,
        "invert_sigmas": False,
        "stochastic_sampling": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
    }
    for key, value in expected_schedule.items():
        if scheduler.get(key, value) != value:
            raise CheckpointError(
                f"{checkpoint.components['scheduler'].folder}: {key} is {scheduler[key]!r}; "
                f"fluxc compiles FLUX.2's own schedule, where it is {value!r}"
            )
    return family


def transformer_linears(config: dict[str, Any]) -> list[Linear]:
    """Every Linear of Flux2Transformer2DModel in forward order."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    width = heads * head_dim
    hidden = int(width * config["mlp_ratio"])
    channels = config["in_channels"]
    out_channels = (config.get("out_channels") or channels) * config.get("patch_size", 1) ** 2
    time = config.get("timestep_guidance_channels", 256)
    layers = [
        Linear("time_guidance_embed.timestep_embedder.linear_1", width, time),
        Linear("time_guidance_embed.timestep_embedder.linear_2", width, width),
    ]
    if config.get("guidance_embeds", True):
        layers += [
            Linear("time_guidance_embed.guidance_embedder.linear_1", width, time),
            Linear("time_guidance_embed.guidance_embedder.linear_2", width, width),
        ]
    layers += [
        Linear("double_stream_modulation_img.linear", 6 * width, width),
        Linear("double_stream_modulation_txt.linear", 6 * width, width),
        Linear("single_stream_modulation.linear", 3 * width, width),
        Linear("x_embedder", width, channels),
        Linear("context_embedder", width, config["joint_attention_dim"]),
    ]
    for number in range(config["num_layers"]):
        block = f"transformer_blocks.{number}"
        image, text = f"{block}.attn.to_qkv", f"{block}.attn.to_added_qkv"
        layers += [Linear(f"{block}.attn.to_{part}", width, width, image) for part in "qkv"]
        layers += [Linear(f"{block}.attn.add_{part}_proj", width, width, text) for part in "qkv"]
        layers += [
            Linear(f"{block}.attn.to_out.0", width, width),
            Linear(f"{block}.attn.to_add_out", width, width),
            Linear(f"{block}.ff.linear_in", 2 * hidden, width),
            Linear(f"{block}.ff.linear_out", width, hidden),
            Linear(f"{block}.ff_context.linear_in", 2 * hidden, width),
            Linear(f"{block}.ff_context.linear_out", width, hidden),
        ]
    for number in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{number}.attn"
        layers += [
            Linear(f"{block}.to_qkv_mlp_proj", 3 * width + 2 * hidden, width),
            Linear(f"{block}.to_out", width, width + hidden),
        ]
    return [*layers, Linear("norm_out.linear", 2 * width, width), Linear("proj_out", out_channels, width)]


def transformer_tensors(config: dict[str, Any]) -> dict[str, Shape]:
    """Every tensor of the transformer's checkpoint and its shape: the Linears' weights and the Q/K norms."""
    head_dim = (config["attention_head_dim"],)
    tensors: dict[str, Shape] = {
        f"{layer.name}.weight": (layer.out_features, layer.in_features) for layer in transformer_linears(config)
    }
    for number in range(config["num_layers"]):
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            tensors[f"transformer_blocks.{number}.attn.{norm}.weight"] = head_dim
    for number in range(config["num_single_layers"]):
        for norm in ("norm_q", "norm_k"):
            tensors[f"single_transformer_blocks.{number}.attn.{norm}.weight"] = head_dim
    return tensors


def text_linears(config: dict[str, Any], layers: int) -> list[Linear]:
    """The Linears of the first `layers` layers of a Qwen3 text encoder, in forward order."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    found = []
    for number in range(layers):
        block = f"model.layers.{number}"
        qkv, gate_up = f"{block}.self_attn.qkv_proj", f"{block}.mlp.gate_up_proj"
        found += [
            Linear(f"{block}.self_attn.q_proj", queries, width, qkv),
            Linear(f"{block}.self_attn.k_proj", keys, width, qkv),
            Linear(f"{block}.self_attn.v_proj", keys, width, qkv),
            Linear(f"{block}.self_attn.o_proj", width, queries),
            Linear(f"{block}.mlp.gate_proj", hidden, width, gate_up),
            Linear(f"{block}.mlp.up_proj", hidden, width, gate_up),
            Linear(f"{block}.mlp.down_proj", width, hidden),
        ]
    return found


def text_tensors(config: dict[str, Any], layers: int) -> dict[str, Shape]:
    """The tensors of the first `layers` layers of a Qwen3 text encoder, with the embedding and the final norm."""
    width = config["hidden_size"]
    head_dim = config.get("head_dim") or width // config["num_attention_heads"]
    tensors: dict[str, Shape] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for layer in text_linears(config, layers):
        tensors[f"{layer.name}.weight"] = (layer.out_features, layer.in_features)
    for number in range(layers):
        block = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{norm}.weight"] = (width,)
        for norm in ("q_norm", "k_norm"):
            tensors[f"{block}.self_attn.{norm}.weight"] = (head_dim,)
    return tensors


def kept_text_layers(family: Family, config: dict[str, Any]) -> int:
    """How many text-encoder layers a bundle stores: one more than the last whose output is taken.

    transformers applies the final norm to the last entry of `hidden_states`; with exactly the taken layers an unmodified
    loader would return a normed last entry without a word, so one further layer is kept and never run.
    """
    last = family.text_layers[-1]
    if config["num_hidden_layers"] <= last:
        raise CheckpointError(
            f"the text encoder has {config['num_hidden_layers']} layers; this family takes the output of layer {last}, "
            f"so it needs at least {last + 1}"
        )
    return last + 1


def vae_of(checkpoint: Checkpoint) -> Flux2VAE:
    """The checkpoint's VAE."""
    component = checkpoint.components["vae"]
    return Flux2VAE.read(component.config, component.folder)


def pixels_per_token(checkpoint: Checkpoint) -> int:
    """Pixels a side of one image token: the VAE's downscaling times its patch."""
    return vae_of(checkpoint).pixels_per_token


def check_sizes(checkpoint: Checkpoint, sizes: tuple[tuple[int, int], ...]) -> None:
    """Refuse sizes that are not whole numbers of tokens."""
    pixels = pixels_per_token(checkpoint)
    for height, width in sizes:
        if height < pixels or width < pixels or height % pixels or width % pixels:
            raise RecipeError(
                f"sizes: {height}x{width} is not possible: this model's tokens are {pixels}x{pixels} pixels, "
                f"so height and width must be multiples of {pixels}"
            )


def uses_guidance_branches(checkpoint: Checkpoint) -> bool:
    """Whether guidance means two passes a step (conditional and empty prompt) instead of an embedded scale."""
    return not checkpoint.components["transformer"].config.get("guidance_embeds", True) and not checkpoint.index.get(
        "is_distilled", False
    )
