"""The layouts that one file of weights may have, read under diffusers' names: no tensor is copied.

1. diffusers' own layout is read as it is. A prefix of ComfyUI's (PREFIXES) is taken off; of a file that holds several models,
   the names with the prefix are taken.
2. Black Forest Labs' transformer: modules are renamed (WHOLE, DOUBLE, SINGLE); the `scale` of a norm is its weight. The rows of
   `qkv` are those of query, key and value, a third each, so each of them is a range of the file's bytes.
3. Their final modulation gives shift, then scale; diffusers' scale, then shift. So its rows begin in the middle.
4. Their VAE: modules are renamed, the levels of the decoder counted from the other end. The projections of its attention are
   convolutions of 1x1, diffusers' Linears of the same bytes.
5. A name that no rule knows stays as it is, and is found as one that the model does not have.

Their names are those of https://github.com/black-forest-labs/flux2; the tests hold every rule against diffusers' converters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from fluxc.base.errors import CheckpointError
from fluxc.base.safetensors import FLOATS, TensorRef

PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("first_stage_model.", "vae."),
}
WHOLE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DOUBLE = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SWAPPED = "norm_out.linear"
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(?:block_(\d+)\.(.+)|attn_1\.(\w+))")
FOREIGN = {
    "transformer": re.compile(r"double_blocks\.|single_blocks\.|img_in\."),
    "vae": re.compile(r"(encoder|decoder)\.(mid|down|up)\."),
}
"""By component, how names begin that diffusers' layout does not have."""


def read_layout(component: str, refs: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors `refs` of one file, under diffusers' names for `component`.

    CheckpointError for a file of Black Forest Labs' layout whose weights are quantized.
    """
    prefix = next((p for p in PREFIXES.get(component, ()) if any(name.startswith(p) for name in refs)), "")
    plain = {name.removeprefix(prefix): ref for name, ref in refs.items() if name.startswith(prefix)}
    if component not in FOREIGN or not any(FOREIGN[component].match(name) for name in plain):
        return {name: replace(ref, name=name) for name, ref in plain.items()}
    _check_not_quantized(plain)
    found: dict[str, TensorRef] = {}
    levels = 1 + max((int(level[2]) for name in plain if (level := LEVEL.match(name)) and "up" in level[1]), default=0)
    for name, ref in plain.items():
        renamed = _of_vae(name, ref, levels) if component == "vae" else _of_transformer(name, ref)
        for twice in renamed.keys() & found:
            raise CheckpointError(f"{ref.file}: it holds {twice!r} twice, once as {name!r}; use the file as published")
        found |= renamed
    return dict(sorted(found.items()))


def _check_not_quantized(refs: Mapping[str, TensorRef]) -> None:
    for name, ref in refs.items():
        if ref.dtype not in FLOATS and not name.endswith("num_batches_tracked"):
            raise CheckpointError(
                f"{ref.file}: its weights are quantized (tensor {name!r} is {ref.dtype}); fluxc reads quantized weights from a "
                "folder that ModelOpt exported (export_hf_checkpoint). Give the file of the weights in bf16: the recipe's "
                "`precision` says how they are quantized"
            )


def _of_transformer(name: str, ref: TensorRef) -> dict[str, TensorRef]:
    module, _, part = name.rpartition(".")
    part = "weight" if part == "scale" else part
    block = BLOCK.fullmatch(module)
    if block is None:
        renamed = WHOLE.get(module)
        is_swapped = renamed == SWAPPED and _rows(ref) % 2 == 0
        return _named(ref, f"{renamed}.{part}" if renamed else name, begins_at=ref.nbytes // 2 if is_swapped else 0)
    kind, number, inner = block.groups()
    blocks = "transformer_blocks" if kind == "double" else "single_transformer_blocks"
    if kind == "double" and inner in FUSED and _rows(ref) and _rows(ref) % 3 == 0:
        return _thirds(ref, [f"{blocks}.{number}.{third}.{part}" for third in FUSED[inner]])
    renamed = (DOUBLE if kind == "double" else SINGLE).get(inner)
    return _named(ref, f"{blocks}.{number}.{renamed}.{part}" if renamed else name)


def _of_vae(name: str, ref: TensorRef, levels: int) -> dict[str, TensorRef]:
    module, _, part = name.rpartition(".")
    module = module.replace("nin_shortcut", "conv_shortcut")
    if level := LEVEL.fullmatch(module):
        side, number, inner = level.groups()
        at = int(number) if side == "encoder.down" else levels - 1 - int(number)
        inner = re.sub(r"^block\.", "resnets.", inner)
        inner = re.sub(r"^(down|up)sample\.", r"\1samplers.0.", inner)
        return _named(ref, f"{side}_blocks.{at}.{inner}.{part}")
    if middle := MIDDLE.fullmatch(module):
        side, number, inner, attention = middle.groups()
        if attention is None:
            return _named(ref, f"{side}.mid_block.resnets.{int(number) - 1}.{inner}.{part}")
        shape = ref.shape[:2] if ref.shape[2:] == (1, 1) else ref.shape
        renamed = ATTENTION.get(attention, attention)
        return _named(replace(ref, shape=shape), f"{side}.mid_block.attentions.0.{renamed}.{part}")
    module = re.sub(r"\.norm_out$", ".conv_norm_out", module)
    module = re.sub(r"^(encoder\.(?=quant_conv)|decoder\.(?=post_quant_conv))", "", module)
    return _named(ref, f"{module}.{part}")


def _rows(ref: TensorRef) -> int:
    return ref.shape[0] if ref.shape else 0


def _named(ref: TensorRef, name: str, begins_at: int = 0) -> dict[str, TensorRef]:
    return {name: replace(ref, name=name, begins_at=begins_at)}


def _thirds(ref: TensorRef, names: list[str]) -> dict[str, TensorRef]:
    """The rows of a matrix as three of a third of them each."""
    shape, size = (ref.shape[0] // 3, *ref.shape[1:]), ref.nbytes // 3
    return {
        name: replace(ref, name=name, shape=shape, offset=ref.offset + number * size, nbytes=size)
        for number, name in enumerate(names)
    }
