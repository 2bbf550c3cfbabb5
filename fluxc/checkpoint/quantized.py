"""Layers that a checkpoint holds quantized already, in ModelOpt's HF layout: found by their tensors, held against its config.

A quantized Linear has, beside `weight`:

1. nvfp4: `weight` U8 [out, in/2], `weight_scale` F8_E4M3 [out, in/16], `weight_scale_2` and `input_scale` F32.
2. fp8: `weight` F8_E4M3 [out, in], `weight_scale` and `input_scale` F32.
3. Either may have `pre_quant_scale` [in] (AWQ), by which inputs are multiplied before they are rounded.
4. With it or without, `svdquant_lora_a` [rank, in] and `svdquant_lora_b` [out, rank] (SVDQuant): with x the inputs after 3,
   not rounded, (x a^T) b^T is added to the output (SVDQuantLinear.forward in modelopt 0.47).

Scalars may have the shape [] or [1]; they are handed on as []. Block scales are row-major, never swizzled.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from fluxc.base.errors import CheckpointError
from fluxc.base.json_object import as_struct
from fluxc.base.safetensors import FLOATS, TensorRef
from fluxc.checkpoint.source import Component
from fluxc.formats.base import Format
from fluxc.formats.registry import FORMATS
from fluxc.models.base import Linear, Shape

OPTIONAL = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")


CALIBRATED = ": export it with calibrated inputs"


@dataclass(frozen=True)
class SourceLayer:
    """A Linear as the checkpoint holds it quantized: format and tensors by part (`weight`, `weight_scale`, ...)."""

    format: str
    tensors: dict[str, TensorRef]

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors.values())

    @property
    def low_rank(self) -> int:
        """The rank of SVDQuant's factors, 0 without."""
        return self.tensors["svdquant_lora_a"].shape[0] if "svdquant_lora_a" in self.tensors else 0

    def merges_with(self, other: SourceLayer) -> bool:
        """Whether an engine can merge both Linears and round their common input once: equal scalars and pre_quant_scale."""
        shared = ("pre_quant_scale", *FORMATS[self.format].scalars)
        return self.format == other.format and all(self._bytes(part) == other._bytes(part) for part in shared)

    def _bytes(self, part: str) -> bytes | None:
        return self.tensors[part].bytes_view().tobytes() if part in self.tensors else None


def quantized_layers(component: Component, layers: list[Linear]) -> dict[str, SourceLayer]:
    """Those of `layers` that the component holds quantized, by name; empty for a checkpoint that is not quantized.

    Raises CheckpointError naming the layer whose tensors are incomplete, of odd shape, or not what the config says of it.
    """
    found = {}
    for layer in layers:
        weight = component.tensors.get(f"{layer.name}.weight")
        if weight is None:
            continue
        if weight.dtype in FLOATS:
            _refuse_unused_parts(component, layer.name, weight)
        elif (format := format_of(component.tensors, layer.name)) is not None:
            found[layer.name] = _read_layer(component, layer, format)
        else:
            known = ", ".join(f"{f.algorithm} ({f.parts(f.block, f.block)['weight'][0]})" for f in FORMATS.values())
            raise _wrong(component, layer.name, f"its weight is {weight.dtype}; fluxc reads {known}")
    _check_config(component, layers, found)
    return found


def parts_beside_weights() -> list[str]:
    """Every tensor that some format, or a method on top of one, keeps beside a weight."""
    own = [part for format in FORMATS.values() for part in format.parts(format.block, format.block)]
    return [part for part in dict.fromkeys((*own, *OPTIONAL)) if part != "weight"]


def format_of(tensors: Mapping[str, TensorRef], layer: str) -> Format | None:
    """The format whose tensors `layer` has, by their dtypes, or at least by its weight's; None where there is none.

    Of several that have these dtypes, one of whose parts none is missing.
    """
    refs = {part: tensors.get(f"{layer}.{part}") for part in ("weight", *parts_beside_weights())}
    dtypes = {part: ref.dtype for part, ref in refs.items() if ref is not None}
    for known in (dtypes, {"weight": dtypes["weight"]}):
        able = [format for format in FORMATS.values() if format.recognises(known)]
        if able:
            whole = [format for format in able if format.parts(format.block, format.block).keys() <= dtypes.keys()]
            return (whole or able)[0]
    return None


def as_stored(expected: dict[str, Shape], quantized: dict[str, SourceLayer]) -> dict[str, Shape]:
    """`expected` with the tensors of every quantized layer, which are checked already, in place of its weight."""
    table = dict(expected)
    for name, layer in quantized.items():
        if f"{name}.weight" in table:
            table |= {f"{name}.{part}": ref.shape for part, ref in layer.tensors.items()}
    return table


def unmergeable(layers: list[Linear], quantized: Mapping[str, SourceLayer]) -> set[str]:
    """The fusion groups whose members an engine cannot merge as the checkpoint quantized them."""
    members: dict[str, list[SourceLayer | None]] = {}
    for layer in layers:
        if layer.group:
            members.setdefault(layer.group, []).append(quantized.get(layer.name))
    apart = set()
    for group, parts in members.items():
        first = parts[0]
        if any((part is None) != (first is None) or (first and part and not first.merges_with(part)) for part in parts):
            apart.add(group)
    return apart


def _read_layer(component: Component, layer: Linear, format: Format) -> SourceLayer:
    refs = {part: component.tensors.get(f"{layer.name}.{part}") for part in ("weight", *parts_beside_weights())}
    tensors = {part: ref for part, ref in refs.items() if ref is not None}
    rows, columns = layer.out_features, layer.in_features
    own = format.parts(rows, columns)
    shapes: dict[str, Shape] = {part: shape for part, (_, shape) in own.items()} | {"pre_quant_scale": (columns,)}
    kinds = dict.fromkeys(OPTIONAL, FLOATS) | {part: (dtype,) for part, (dtype, _) in own.items() if part != "weight"}
    rank = next(iter(tensors["svdquant_lora_a"].shape), 0) if "svdquant_lora_a" in tensors else 0
    shapes |= {"svdquant_lora_a": (rank, columns), "svdquant_lora_b": (rows, rank)}
    for part, ref in refs.items():
        if ref is None:
            if part in shapes and part not in OPTIONAL:
                advice = CALIBRATED if part == "input_scale" else ""
                raise _wrong(component, layer.name, f"{format.name}, but it has no {part}{advice}")
            continue
        if part not in shapes:
            raise _wrong(component, layer.name, f"{format.name}, which has no {part}")
        if ref.shape != shapes[part]:
            hint = "; a swizzled or padded one cannot be used" if part == "weight_scale" and ref.shape else ""
            raise _wrong(component, layer.name, f"{part} is {list(ref.shape)}, expected {list(shapes[part])}{hint}")
        if part in kinds and ref.dtype not in kinds[part]:
            raise _wrong(component, layer.name, f"{part} is {ref.dtype}, expected {' or '.join(kinds[part])}")
    if ("svdquant_lora_a" in tensors) != ("svdquant_lora_b" in tensors):
        raise _wrong(component, layer.name, "it has one of svdquant_lora_a and svdquant_lora_b, and needs both")
    for part in format.scalars:
        value = float(tensors[part].bytes_view().copy().view("<f4")[0])
        if not 0 < value < float("inf"):
            raise _wrong(component, layer.name, f"{part} is {value}; a scale is a positive, finite number")
    return SourceLayer(format.name, tensors)


def _refuse_unused_parts(component: Component, name: str, weight: TensorRef) -> None:
    unused = [part for part in parts_beside_weights() if f"{name}.{part}" in component.tensors]
    if unused:
        raise _wrong(component, name, f"its weight is {weight.dtype}, not quantized, yet it has {', '.join(unused)}")


class _LayerConfig(msgspec.Struct):
    quant_algo: str | None = None


class _Config(msgspec.Struct):
    """The fields that say which layers are quantized, and how."""

    quant_method: str = "modelopt"
    quant_algo: str | None = None
    ignore: list[str] | None = None
    exclude_modules: list[str] | None = None
    quantized_layers: dict[str, _LayerConfig] = {}


def _check_config(component: Component, layers: list[Linear], found: dict[str, SourceLayer]) -> None:
    if component.quantization is None:
        if found:
            name = next(iter(found))
            raise _wrong(
                component,
                name,
                "it is quantized, but neither config.json nor hf_quant_config.json says how; add the one",
            )
        return
    config = as_struct(_Config, component.quantization, component.quantization_file)
    if config.quant_method != "modelopt":
        raise CheckpointError(
            f"{component.folder}: quantized by {config.quant_method!r}; fluxc reads what ModelOpt exports, "
            "or a checkpoint that is not quantized"
        )
    for layer in layers:
        if f"{layer.name}.weight" not in component.tensors:
            continue
        said = _format_said(component, config, layer.name)
        actual = found[layer.name].format if layer.name in found else None
        if said != actual:
            if said and actual and (missing := _missing(component, layer.name, FORMATS[said])):
                raise _wrong(component, layer.name, f"{said}, but it has no {missing[0]}{CALIBRATED}")
            dtype = component.tensors[f"{layer.name}.weight"].dtype
            raise _wrong(
                component,
                layer.name,
                f"its config says {said or 'not quantized'}, but its weight is {dtype} ({actual or 'plain'})",
            )


def _missing(component: Component, layer: str, format: Format) -> list[str]:
    """The parts of `format` that `layer` lacks, where it has everything else in the format's dtypes."""
    own = format.parts(format.block, format.block)
    refs = {part: component.tensors.get(f"{layer}.{part}") for part in own}
    fits = all(ref is None or ref.dtype == own[part][0] for part, ref in refs.items())
    return [part for part, ref in refs.items() if ref is None] if fits else []


def _format_said(component: Component, config: _Config, name: str) -> str | None:
    """The format that the config gives layer `name`, None for not quantized."""
    algorithm = config.quant_algo
    ignored = config.ignore or config.exclude_modules or []
    if any(fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for pattern in ignored):
        return None
    if algorithm == "MIXED_PRECISION":
        entry = config.quantized_layers.get(name)
        if entry is None:
            return None
        algorithm = entry.quant_algo
    algorithms = {
        word: format.name for format in FORMATS.values() for word in (format.algorithm, *format.variants.values())
    }
    if algorithm not in algorithms:
        raise CheckpointError(
            f"{component.folder}: quantization algorithm {algorithm!r} of {name} is not one fluxc reads: "
            f"{', '.join(algorithms)}, MIXED_PRECISION"
        )
    return algorithms[algorithm]


def _wrong(component: Component, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{component.folder}: layer {name}: {what}. Use the folder as ModelOpt exported it (export_hf_checkpoint), "
        "or a checkpoint that is not quantized"
    )
