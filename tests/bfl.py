"""Weights of a transformer or a VAE in Black Forest Labs' layout, from those in diffusers', for tests."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TRANSFORMER = [
    (r"^x_embedder\.", "img_in."),
    (r"^context_embedder\.", "txt_in."),
    (r"^time_guidance_embed\.timestep_embedder\.linear_1\.", "time_in.in_layer."),
    (r"^time_guidance_embed\.timestep_embedder\.linear_2\.", "time_in.out_layer."),
    (r"^time_guidance_embed\.guidance_embedder\.linear_1\.", "guidance_in.in_layer."),
    (r"^time_guidance_embed\.guidance_embedder\.linear_2\.", "guidance_in.out_layer."),
    (r"_modulation(_img|_txt)?\.linear\.", r"_modulation\1.lin."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj\.", r"single_blocks.\1.linear1."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out\.", r"single_blocks.\1.linear2."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
    (r"^transformer_blocks\.(\d+)\.", r"double_blocks.\1."),
    (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"\.ff\.linear_in\.", ".img_mlp.0."),
    (r"\.ff\.linear_out\.", ".img_mlp.2."),
    (r"\.ff_context\.linear_in\.", ".txt_mlp.0."),
    (r"\.ff_context\.linear_out\.", ".txt_mlp.2."),
]
FUSED = {"img_attn": ("to_q", "to_k", "to_v"), "txt_attn": ("add_q_proj", "add_k_proj", "add_v_proj")}


def transformer_in_bfl(source: Path) -> dict[str, torch.Tensor]:
    """The transformer of the file `source`: q, k, v in one matrix, the final modulation's shift before its scale."""
    tensors = load_file(source)
    found = {}
    for stream, parts in FUSED.items():
        for block in sorted({name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")}):
            names = [f"transformer_blocks.{block}.attn.{part}.weight" for part in parts]
            found[f"double_blocks.{block}.{stream}.qkv.weight"] = torch.cat([tensors.pop(name) for name in names])
    for name, tensor in tensors.items():
        if name.startswith("norm_out."):
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        for pattern, words in TRANSFORMER:
            name = re.sub(pattern, words, name)
        found[name] = tensor
    return found


def vae_in_bfl(source: Path, quant_inside: bool = True) -> dict[str, torch.Tensor]:
    """The VAE of the file `source`: its attention as convolutions, the decoder's levels from the finest on.

    `quant_inside`: the two convolutions around the latents belong to encoder and decoder, as in flux2-vae.safetensors.
    """
    tensors = load_file(source)
    levels = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    found = {}
    for name, tensor in tensors.items():
        if name == "bn.num_batches_tracked":
            continue
        if ".attentions.0." in name and name.endswith("weight") and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        name = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda at: f"decoder.up.{levels - 1 - int(at[1])}", name)
        name = re.sub(r"^encoder\.down_blocks\.", "encoder.down.", name)
        name = re.sub(r"^((?:en|de)coder\.(?:up|down)\.\d+)\.resnets\.", r"\1.block.", name)
        name = re.sub(r"\.(up|down)samplers\.0\.", r".\1sample.", name)
        name = re.sub(r"\.mid_block\.resnets\.(\d)\.", lambda at: f".mid.block_{int(at[1]) + 1}.", name)
        name = re.sub(r"\.mid_block\.attentions\.0\.", ".mid.attn_1.", name)
        name = re.sub(r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out.", name)
        name = re.sub(r"\.attn_1\.to_([qkv])\.", r".attn_1.\1.", name)
        name = name.replace(".group_norm.", ".norm.").replace("conv_shortcut", "nin_shortcut")
        name = name.replace("conv_norm_out", "norm_out")
        if quant_inside:
            name = re.sub(r"^quant_conv", "encoder.quant_conv", name)
            name = re.sub(r"^post_quant_conv", "decoder.post_quant_conv", name)
        found[name] = tensor.contiguous()
    return found


def write(file: Path, tensors: dict[str, torch.Tensor], prefix: str = "") -> Path:
    """`file` with these tensors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{prefix}{name}": tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file
