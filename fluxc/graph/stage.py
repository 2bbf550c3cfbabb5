"""The export stage: a component's neutral graphs as .onnx files, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxc.base.progress import Report
from fluxc.families.base import Family
from fluxc.models.flux2_transformer import Flux2Transformer

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class ExportInputs:
    """What a component's graphs depend on.

    `config` is the component's; `family` says how the text encoder is run. `text_length` counts tokens, of a `part` of an
    image those of one rank. With `composed` the graphs are whole, otherwise one for each kind of block. With `tiles` the VAE
    gets the graph that blends them.
    """

    component: str
    config: dict[str, Any]
    text_length: int = 0
    cfg_batch: bool = False
    family: Family | None = None
    dtype: str = "float32"
    composed: bool = False
    part: bool = False
    tiles: bool = False

    @property
    def title(self) -> str:
        """What is shown while it runs."""
        if self.composed:
            return f"trace {self.component}"
        return f"trace {self.component} in {self.dtype}{' for one rank' if self.part else ''}"


def run(inputs: ExportInputs, folder: Path, report: Report) -> None:
    """Write NAME.onnx for each graph into `folder`."""
    for name, model in _export(inputs).items():
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))


def load(folder: Path) -> Path:
    """The folder with the graphs."""
    return folder


def _export(inputs: ExportInputs) -> dict[str, onnx.ModelProto]:
    import torch

    from fluxc.graph import compose, export, image_tiles

    config, dtype = inputs.config, getattr(torch, inputs.dtype)
    if inputs.component == "transformer":
        pieces = export.trace_transformer(config, inputs.text_length, inputs.cfg_batch, dtype, part=inputs.part)
        if not inputs.composed:
            return pieces
        shape = Flux2Transformer.read(config)
        body = compose.compose_body(pieces, shape.num_layers, shape.num_single_layers, inputs.text_length)
        return {name: pieces[name] for name in ("prologue", "signal", "epilogue")} | {"body": body}
    if inputs.component == "text_encoder":
        assert inputs.family is not None
        # Rows of padding on the left are all alike and are seen by no other: one of them is enough.
        alike = inputs.composed and inputs.family.prompts.padding == "left"
        pieces = export.trace_text_encoder(config, inputs.text_length, inputs.family, dtype, any_length=alike)
        if not inputs.composed:
            return pieces
        length = inputs.text_length if alike else None
        return {"text_encoder": compose.compose_text_encoder(pieces, inputs.family.text_layers, length)}
    decoder = export.trace_vae_decoder(config, dtype)
    if not inputs.tiles:
        return {"vae_decoder": decoder}
    return {"vae_decoder": image_tiles.of_a_tile(decoder), "vae_blend": image_tiles.trace_vae_blend()}
