"""AutoencoderKLFlux2 by its config: every tensor of its checkpoint, and how many pixels a token covers.

Names and shapes as in diffusers 0.42 (autoencoder_kl_flux2.py, vae.py): an encoder and a decoder of residual blocks with one
attention in the middle, two 1x1 convolutions around the latents, and BatchNorm statistics of the patchified latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from fluxc.models.base import Shape
from fluxc.models.config import Factor, Layers, Size, read_config

Channels = Annotated[tuple[Size, ...], msgspec.Meta(min_length=1, max_length=16)]


class Flux2VAE(msgspec.Struct, frozen=True):
    """The fields of the config that decide about tensors and sizes, with diffusers' defaults."""

    class_name: ClassVar[str] = "AutoencoderKLFlux2"

    block_out_channels: Channels = (128, 256, 512, 512)
    decoder_block_out_channels: Channels | None = None
    layers_per_block: Layers = 2
    in_channels: Size = 3
    out_channels: Size = 3
    latent_channels: Size = 32
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    norm_num_groups: Size = 32
    act_fn: str = "silu"
    batch_norm_eps: Factor = 1e-4
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    patch_size: tuple[Size, Size] = (2, 2)

    def __post_init__(self) -> None:
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != len(self.block_out_channels):
                raise ValueError(
                    f"{name} names {len(getattr(self, name))} blocks, and block_out_channels has {len(self.block_out_channels)}"
                )
        for width in (*self.block_out_channels, *(self.decoder_block_out_channels or ())):
            if width % self.norm_num_groups:
                raise ValueError(f"norm_num_groups is {self.norm_num_groups}, which does not divide {width} channels")

    @classmethod
    def read(cls, config: dict[str, Any], where: Path = Path()) -> Flux2VAE:
        """From config.json's fields; CheckpointError naming `where` and the field that does not fit."""
        return read_config(cls, config, where)

    @property
    def pixels_per_token(self) -> int:
        """Pixels a side of one image token: the downscaling times the patch."""
        return int(2 ** (len(self.block_out_channels) - 1) * self.patch_size[0])

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder's blocks, the last block's, which is as large as the image, first."""
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def values_per_latent(self) -> int:
        """Values of the decoder's largest activation for one position of its latents.

        Each block but the first works on four times the positions of the one before, whose channels it begins with.
        """
        widths = self.decoder_widths[::-1]
        return max(max(widths[max(at - 1, 0)], widths[at]) * 4**at for at in range(len(widths)))

    @property
    def tensors(self) -> dict[str, Shape]:
        """Every tensor of the checkpoint and its shape."""
        latents, patch = self.latent_channels, self.patch_size[0] * self.patch_size[1]
        found = {**dict(self._encoder()), **dict(self._decoder())}
        if self.use_quant_conv:
            found |= dict(_conv("quant_conv", 2 * latents, 2 * latents, 1))
        if self.use_post_quant_conv:
            found |= dict(_conv("post_quant_conv", latents, latents, 1))
        statistics = (latents * patch,)
        return found | {"bn.running_mean": statistics, "bn.running_var": statistics, "bn.num_batches_tracked": ()}

    def _encoder(self) -> Iterator[tuple[str, Shape]]:
        widths = self.block_out_channels
        yield from _conv("encoder.conv_in", self.in_channels, widths[0])
        before = widths[0]
        for number, width in enumerate(widths):
            block = f"encoder.down_blocks.{number}"
            for layer in range(self.layers_per_block):
                yield from _resnet(f"{block}.resnets.{layer}", before if layer == 0 else width, width)
            if number < len(widths) - 1:
                yield from _conv(f"{block}.downsamplers.0.conv", width, width)
            before = width
        yield from self._middle("encoder.mid_block", before)
        yield from _norm("encoder.conv_norm_out", before)
        yield from _conv("encoder.conv_out", before, 2 * self.latent_channels)

    def _decoder(self) -> Iterator[tuple[str, Shape]]:
        widths = self.decoder_widths[::-1]
        yield from _conv("decoder.conv_in", self.latent_channels, widths[0])
        before = widths[0]
        for number, width in enumerate(widths):
            block = f"decoder.up_blocks.{number}"
            for layer in range(self.layers_per_block + 1):
                yield from _resnet(f"{block}.resnets.{layer}", before if layer == 0 else width, width)
            if number < len(widths) - 1:
                yield from _conv(f"{block}.upsamplers.0.conv", width, width)
            before = width
        yield from self._middle("decoder.mid_block", widths[0])
        yield from _norm("decoder.conv_norm_out", before)
        yield from _conv("decoder.conv_out", before, self.out_channels)

    def _middle(self, name: str, width: int) -> Iterator[tuple[str, Shape]]:
        if self.mid_block_add_attention:
            attention = f"{name}.attentions.0"
            yield from _norm(f"{attention}.group_norm", width)
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                yield f"{attention}.{part}.weight", (width, width)
                yield f"{attention}.{part}.bias", (width,)
        for number in range(2):
            yield from _resnet(f"{name}.resnets.{number}", width, width)


def _conv(name: str, inputs: int, outputs: int, side: int = 3) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs, side, side)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _resnet(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{name}.norm1", inputs)
    yield from _conv(f"{name}.conv1", inputs, outputs)
    yield from _norm(f"{name}.norm2", outputs)
    yield from _conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{name}.conv_shortcut", inputs, outputs, 1)
