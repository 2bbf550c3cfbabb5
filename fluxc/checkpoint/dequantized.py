"""Modules with plain weights from a component that diffusers and transformers do not load: quantized, or under other names.

A layer's plain weight is (Q + b a) * p: Q its dequantized values, b a SVDQuant's factors, p AWQ's pre_quant_scale, which
multiplies its inputs, column by column.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fluxc.base.loading import loading
from fluxc.base.safetensors import TensorRef
from fluxc.checkpoint.quantized import FLOATS, format_of, parts_beside_weights
from fluxc.checkpoint.source import Component
from fluxc.formats.base import Format
from fluxc.models.text_encoder import TextEncoder

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
}


class PlainTensors(Mapping[str, torch.Tensor]):
    """A component's weights as its model has them, read in `dtype` from its files whenever they are asked for."""

    def __init__(self, component: Component, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._stored = component.tensors
        self._names = {name: name for name in self._stored if not self._is_part(name)}
        if "lm_head.weight" not in self._names and "model.embed_tokens.weight" in self._names:
            # Tied in the checkpoint, but loaders look every parameter up by its own name.
            self._names["lm_head.weight"] = "model.embed_tokens.weight"

    def __getitem__(self, name: str) -> torch.Tensor:
        ref = self._stored[self._names[name]]
        if ref.dtype == "I64":
            return read(ref)
        format = None if ref.dtype in FLOATS else format_of(self._stored, ref.name.removesuffix(".weight"))
        if format is None:
            return read(ref).to(self._dtype)
        parts = {
            part: read(self._stored[full])
            for part in parts_beside_weights()
            if (full := self._beside(ref.name, part)) in self._stored
        }
        return plain_weight(format, {"weight": read(ref), **parts}).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _is_part(self, name: str) -> bool:
        layer, _, part = name.rpartition(".")
        return part in parts_beside_weights() and f"{layer}.weight" in self._stored

    @staticmethod
    def _beside(weight: str, part: str) -> str:
        return f"{weight.removesuffix('weight')}{part}"


def read(ref: TensorRef) -> torch.Tensor:
    """The tensor as it is stored."""
    return torch.from_numpy(ref.bytes_view().copy()).view(DTYPES[ref.dtype]).reshape(ref.shape)


def plain_weight(format: Format, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """fp32 [out, in] of a layer quantized in `format`: its tensors by part, as stored."""
    plain = format.dequantize(parts)
    if "svdquant_lora_a" in parts:
        plain = plain + parts["svdquant_lora_b"].float() @ parts["svdquant_lora_a"].float()
    if "pre_quant_scale" in parts:
        plain = plain * parts["pre_quant_scale"].float()
    return plain


def weights_bytes(component: Component) -> int:
    """Bytes of the component's plain weights in 16 bits."""
    parts = parts_beside_weights()
    return sum(
        2 * math.prod(ref.shape) * (2 if ref.dtype == "U8" else 1)
        for name, ref in component.tensors.items()
        if name.rpartition(".")[2] not in parts
    )


def empty_model(component: Component) -> Any:
    """The component's model by its config, its parameters without data (on the meta device); CheckpointError if it has none."""
    import accelerate
    import diffusers
    import transformers

    library = diffusers if component.library == "diffusers" else transformers
    model_class = getattr(library, component.class_name)
    where, config = component.folder / "config.json", component.config
    with (
        loading(where, f"{component.library} cannot make the model"),
        accelerate.init_empty_weights(include_buffers=False),
    ):
        if library is diffusers:
            model = model_class.from_config(config)
        else:
            model = model_class(model_class.config_class.from_dict(config))
    return model.eval()


def empty_text_encoder(component: Component, kind: type[TextEncoder], layers: int) -> Any:
    """The first `layers` layers of a text encoder, without a head, their parameters without data (on the meta device).

    The module's names are those of the checkpoint's tensors. It is called as the component's own class is, and gives what the
    class without a head gives. CheckpointError if the config makes none.
    """
    import accelerate
    import transformers

    model_class = getattr(transformers, kind.model_class)
    config = kind.of_text(kind.with_layers(component.config, layers), component.folder)
    with (
        loading(component.folder / "config.json", "transformers cannot make the model"),
        accelerate.init_empty_weights(include_buffers=False),
    ):
        model = model_class(model_class.config_class.from_dict(config))
    return _Under(kind.prefix, model).eval()


class _Under(torch.nn.Module):
    """A module whose names begin with `prefix`."""

    def __init__(self, prefix: str, module: torch.nn.Module) -> None:
        super().__init__()
        add_under(self, prefix, module)
        self._path = prefix.rstrip(".")

    def forward(self, **arguments: Any) -> Any:
        return self.get_submodule(self._path)(**arguments)


def add_under(module: torch.nn.Module, prefix: str, part: torch.nn.Module) -> None:
    """Make `part` a submodule of `module`, its names beginning with `prefix` as in the checkpoint."""
    first, *names = prefix.rstrip(".").split(".")
    for name in reversed(names):
        part = torch.nn.ModuleDict({name: part})
    module.add_module(first, part)


def load_plain(component: Component, dtype: torch.dtype) -> Any:
    """The component's model with plain weights in `dtype`; every parameter must be found, and no tensor be left over."""
    model = empty_model(component)
    tensors = PlainTensors(component, dtype)
    with loading(component.place):
        # The batches that a norm counted in training are no weights, and files leave them out.
        counted = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
        model.load_state_dict({**counted, **tensors}, strict=True, assign=True)
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()
    return model.requires_grad_(False)
