"""The torch modules that are traced: thin wrappers that cut diffusers' model where the step is cut.

Attribute names repeat the checkpoint's, so parameter names in a trace are tensor names in the weights file. A model in bf16
computes in bf16 between the wrappers' ends; what a step carries on in full (latents, sigma, the residual, rotary tables) is
fp32 at them either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fluxc.checkpoint.dequantized import add_under


class _Prologue(nn.Module):
    """latents [N, S, C], text [B, L, T], sigma () -> hidden, text_hidden, modulation, rope.

    hidden [B, S, D], text_hidden [B, L, D], temb [1, D], modulation_* [1, 6D or 3D], rope_cos and rope_sin [L + S, head_dim].
    `columns` () int64 is the number of token columns; `guidance` () enters where the model embeds it. N images have B rows:
    one each, or with `cfg_batch` one or two, those of an image side by side.
    """

    def __init__(self, transformer: Any, cfg_batch: bool) -> None:
        super().__init__()
        self.cfg_batch = cfg_batch
        self.time_guidance_embed = transformer.time_guidance_embed
        self.double_stream_modulation_img = transformer.double_stream_modulation_img
        self.double_stream_modulation_txt = transformer.double_stream_modulation_txt
        self.single_stream_modulation = transformer.single_stream_modulation
        self.x_embedder = transformer.x_embedder
        self.context_embedder = transformer.context_embedder
        self.pos_embed = transformer.pos_embed

    def _compute(
        self,
        latents: torch.Tensor,
        text: torch.Tensor,
        sigma: torch.Tensor,
        columns: torch.Tensor,
        guidance: torch.Tensor | None,
        first_token: torch.Tensor | None = None,
        first_text: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        # diffusers rounds sigma to the model's dtype before the sinusoids; in bf16 neighbouring steps would become one.
        embed, dtype = self.time_guidance_embed, self.x_embedder.weight.dtype
        temb = embed.timestep_embedder(embed.time_proj(sigma.reshape(1) * 1000).to(dtype))
        if guidance is not None:
            temb = temb + embed.guidance_embedder(embed.time_proj(guidance.reshape(1) * 1000).to(dtype))
        hidden = self.x_embedder(latents.to(dtype))
        if self.cfg_batch:
            row = torch.arange(text.shape[0], device=latents.device)
            hidden = hidden.index_select(0, row * latents.shape[0] // text.shape[0])
        index = torch.arange(latents.shape[1], device=latents.device)
        index = index if first_token is None else index + first_token
        nothing = torch.zeros_like(index)
        image_ids = torch.stack([nothing, index // columns, index % columns, nothing], dim=1)
        place = torch.arange(text.shape[1], device=latents.device)
        place = place if first_text is None else place + first_text
        zero = torch.zeros_like(place)
        text_ids = torch.stack([zero, zero, zero, place], dim=1)
        rope_cos, rope_sin = self.pos_embed(torch.cat([text_ids, image_ids]))
        return (
            hidden,
            self.context_embedder(text),
            temb,
            self.double_stream_modulation_img(temb),
            self.double_stream_modulation_txt(temb),
            self.single_stream_modulation(temb),
            rope_cos,
            rope_sin,
        )


class Prologue(_Prologue):
    """The prologue of a whole image."""

    def forward(self, latents, text, sigma, columns, guidance=None):
        return self._compute(latents, text, sigma, columns, guidance)


class PartPrologue(_Prologue):
    """The prologue of a part of an image's tokens; `first_token` and `first_text` () int64 are where the part begins."""

    def forward(self, latents, text, sigma, columns, first_token, first_text, guidance=None):
        return self._compute(latents, text, sigma, columns, guidance, first_token, first_text)


class Signal(nn.Module):
    """hidden [B, S, D], modulation [1, 6D or 3D], previous_signal [1, S, D] -> signal fp32 [1, S, D], change fp32 [2].

    The signal is the modulated input of the first block's image stream, what TeaCache watches: it is the same for all
    guidance branches. `change` is (sum of |signal - previous_signal|, sum of |previous_signal|); ranks add theirs up before
    they divide.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, hidden, modulation, previous_signal):
        width = hidden.shape[-1]
        shift, scale = modulation[:, None, :width].float(), modulation[:, None, width : 2 * width].float()
        signal = nn.functional.layer_norm(hidden[:1].float(), (width,), eps=self.eps) * (1 + scale) + shift
        # A row at a time: one long fp32 sum over a large image would lose small terms.
        moved, before = (signal - previous_signal).abs().sum(-1).sum(), previous_signal.abs().sum(-1).sum()
        return signal, torch.stack([moved, before])


class DoubleBlock(nn.Module):
    """One double-stream block: image and text tokens keep their own weights and meet in attention."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden, text_hidden, modulation_img, modulation_txt, rope_cos, rope_sin):
        text_hidden, hidden = self.block(
            hidden, text_hidden, modulation_img, modulation_txt, image_rotary_emb=(rope_cos, rope_sin)
        )
        return hidden, text_hidden


class SingleBlock(nn.Module):
    """One single-stream block on [text tokens, image tokens]."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, joined, modulation_single, rope_cos, rope_sin):
        return self.block(joined, None, modulation_single, image_rotary_emb=(rope_cos, rope_sin))


class Epilogue(nn.Module):
    """latents [N, S, C], hidden, residual, temb, sigma, next_sigma -> next_latents: output layers, guidance, Euler step.

    Where an image has two rows (conditional, empty prompt) their velocities are combined by `guidance`; with one, that is the
    identity.
    """

    def __init__(self, transformer: Any, cfg_batch: bool) -> None:
        super().__init__()
        self.norm_out = transformer.norm_out
        self.proj_out = transformer.proj_out
        self.cfg_batch = cfg_batch

    def forward(self, latents, hidden, residual, temb, sigma, next_sigma, guidance=None):
        velocity = self.proj_out(self.norm_out((hidden.float() + residual).to(hidden.dtype), temb)).float()
        if self.cfg_batch:
            branches = velocity.shape[0] // latents.shape[0]
            row = torch.arange(latents.shape[0], device=latents.device) * branches
            conditional, empty = velocity.index_select(0, row), velocity.index_select(0, row + (branches - 1))
            velocity = empty + guidance * (conditional - empty)
        return latents + (next_sigma - sigma) * velocity


class TextStem(nn.Module):
    """input_ids, attention_mask int64 [B, L] -> hidden [B, L, D], attends bool [B, 1, L, L], cos and sin [1, L, head_dim].

    A token attends to itself and to earlier tokens that are not padding. `prefix` is what the embedding's name begins with.
    """

    def __init__(self, model: Any, prefix: str) -> None:
        super().__init__()
        add_under(self, prefix, nn.ModuleDict({"embed_tokens": model.embed_tokens, "rotary_emb": model.rotary_emb}))
        self.path = prefix.rstrip(".")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, place = self._embedded(input_ids)
        causal = place[:, None] >= place[None, :]
        attends = causal[None, None] & attention_mask.bool()[:, None, None, :]
        return hidden, attends, *self._rotary(hidden, place)

    def _embedded(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.get_submodule(f"{self.path}.embed_tokens")(input_ids)
        return hidden, torch.arange(input_ids.shape[1], device=input_ids.device)

    def _rotary(self, hidden: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.get_submodule(f"{self.path}.rotary_emb")(hidden, place[None])
        return cos, sin


class LeftPaddedTextStem(TextStem):
    """The same for padding on the left: hidden, attends, cos and sin, and seen [B, L, 1] in the type of hidden.

    Nothing precedes the padding, so a row of padding attends to nothing. The softmax of nothing is NaN in one engine and an
    average in another; torch's attention gives zero. Such a row attends to itself here, and `seen`, 0 for it and 1 for a token,
    takes away what comes of that.
    """

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, place = self._embedded(input_ids)
        causal, itself = place[:, None] >= place[None, :], place[:, None] == place[None, :]
        attends = causal[None, None] & (attention_mask.bool()[:, None, None, :] | itself[None, None])
        return hidden, attends, *self._rotary(hidden, place), attention_mask[:, :, None].to(hidden.dtype)


class TextLayer(nn.Module):
    """One decoder layer: hidden, attends, cos, sin, and `seen` where padding is on the left -> hidden."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden, attends, cos, sin, seen=None):
        if seen is None:
            return self._run(hidden, attends, cos, sin)
        projection = self.layer.get_submodule("self_attn.o_proj")
        handle = projection.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * seen,))
        try:
            return self._run(hidden, attends, cos, sin)
        finally:
            handle.remove()

    def _run(self, hidden, attends, cos, sin):
        output = self.layer(hidden, attention_mask=attends, position_embeddings=(cos, sin))
        return output[0] if isinstance(output, tuple) else output


class VaeDecoder(nn.Module):
    """latent_grid [1, rows, columns, C] (as the step loop leaves them) -> image [1, height, width, 3] in 0..1."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.bn = vae.bn
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.eps = vae.config.batch_norm_eps

    def forward(self, latent_grid: torch.Tensor) -> torch.Tensor:
        std = torch.sqrt(self.bn.running_var.float() + self.eps)
        latents = (latent_grid * std + self.bn.running_mean.float()).permute(0, 3, 1, 2)
        batch, channels, rows, columns = latents.shape
        latents = latents.reshape(batch, channels // 4, 2, 2, rows, columns).permute(0, 1, 4, 2, 5, 3)
        latents = latents.reshape(batch, channels // 4, rows * 2, columns * 2).to(self.decoder.conv_in.weight.dtype)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return (self.decoder(latents).float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
