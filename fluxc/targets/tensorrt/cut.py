"""Cuts an image into plans and programs: one plan for each kind of block, programs that run them with each block's weights.

Blocks are of one kind when their lowered graphs are the same to the byte; a block with another format, or another fusion
group, is another kind. With `weights: baked`, the blocks of the transformer are compiled into segments with their weights
inside instead, as large as the memory for building allows.

Every plan has one output. TensorRT orders several by their addresses, so that two builds of the same graph would differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import msgspec
import onnx

from fluxc.base.errors import BuildError
from fluxc.base.safetensors import TensorRef
from fluxc.formats.registry import multiplied_in
from fluxc.graph.attention import attention_apart, attention_in_tiles
from fluxc.graph.bind import argument_names, bind
from fluxc.graph.compose import (
    ENCODED,
    Composition,
    compose_steps,
    compose_text_join,
    compose_text_layer,
    layer_prefix,
    one_output_each,
)
from fluxc.graph.ulysses import COLLECTIVE, ranks_of
from fluxc.quantize.plan import LayerPlan
from fluxc.targets.tensorrt.audit import Expected
from fluxc.targets.tensorrt.builder import Profile
from fluxc.targets.tensorrt.lower import Lowered, fix_shapes, lower_tensorrt
from fluxc.targets.tensorrt.nodes import port_dtype
from fluxrt.manifest import Call, Plan, Port, Program

# What building a plan takes in memory, as a multiple of the weights baked into it (measured: 8.5 GB for 2.77 GB).
MEMORY_A_BYTE = 3.2
ROWS = ("images", "batch")
"""Dimensions that count several for several images."""


@dataclass(frozen=True)
class PlanGraph:
    """A plan to be built: its graph, what it must turn out to be, its profiles, and its manifest entry without a file."""

    name: str
    model: onnx.ModelProto
    expected: Expected
    profiles: tuple[Profile, ...]
    entry: Plan
    baked: bool = False


@dataclass(frozen=True)
class Component:
    """What the cut needs to know of a component: tensors of its weights files, precision plan, and the weights' entry.

    `bodies` are the plans of bodies beside `body`, by name; blocks that are the same in several are one plan.
    """

    name: str
    weights: Mapping[str, TensorRef]
    plan: list[LayerPlan]
    entry: str
    bodies: Mapping[str, list[LayerPlan]] = field(default_factory=dict)


@dataclass
class Cut:
    """Plans by name, programs by stage, and by component the tensors they take."""

    plans: dict[str, PlanGraph] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)
    tensors: dict[str, set[str]] = field(default_factory=dict)


class Cutter:
    """Turns neutral graphs into a Cut.

    `requests` are the sizes to serve, each what every dimension counts, by the names of fluxrt.sharding.sizes_of and
    fluxrt.tiles.tile_sizes; each becomes an optimization profile, or with `whole_range` one profile spans those of as many
    images. A profile for several images is also for fewer, down to the next smaller number. A graph that only one request
    reaches is fixed to it. Graphs are to be written to `folder`, those with baked weights beside the weights under a name with
    `target` in it.
    """

    def __init__(
        self,
        requests: list[dict[str, int]],
        whole_range: bool,
        target: str,
        folder: str,
    ) -> None:
        self._requests, self._whole_range = requests, whole_range
        self._target, self._folder = target, folder
        self._kinds: dict[bytes, str] = {}
        self.cut = Cut()

    def transformer(
        self,
        pieces: dict[str, onnx.ModelProto],
        component: Component,
        text_length: int,
        segment_bytes: int | None,
    ) -> None:
        """prologue, signal if there is one, bodies and epilogue; with `segment_bytes`, the blocks' weights are baked, at most
        that many a segment."""
        steps = compose_steps(pieces, text_length)
        results = tuple(value.name for value in steps["prologue"].graph.output)
        self._program("prologue", component, self._calls("prologue", steps["prologue"], component), results)
        if "signal" in pieces:
            self._program("signal", component, self._calls("signal", pieces["signal"], component), ("signal", "change"))
        if segment_bytes is None:
            self._bound_body("body", steps, component)
            for name, plan in component.bodies.items():
                self._bound_body(name, steps, replace(component, plan=plan))
        else:
            self._baked_body(steps, component, segment_bytes)
        epilogue = [self._call("epilogue", steps["epilogue"], component)]
        self._program("epilogue", component, epilogue, ("next_latents",))

    def _bound_body(self, program: str, steps: dict[str, onnx.ModelProto], component: Component) -> None:
        """A body of blocks whose weights are bound; plans that `body` does not have are called after this one."""
        at, after = "joined", "joined_after"
        calls = []
        for kind, prefix in _blocks(component):
            wired = {"joined": at, "joined_out": after}
            variant = program.removeprefix("body")
            calls.append(self._call(kind.removesuffix("_block"), steps[kind], component, prefix, wired, variant))
            at, after = after, at
        self._finish_body(program, steps, component, calls, at)

    def _baked_body(self, steps: dict[str, onnx.ModelProto], component: Component, segment_bytes: int) -> None:
        """The body of segments of blocks with their weights inside."""
        at, after = "joined", "joined_after"
        calls = []
        for number, segment in enumerate(_segments(_blocks(component), component, segment_bytes)):
            name = f"blocks-{number}"
            self._add(name, _composed(steps, segment), component, "", baked=True)
            calls.append(Call(name, "", {"joined": at, "joined_out": after}))
            at, after = after, at
        self._finish_body("body", steps, component, calls, at)

    def _finish_body(
        self, program: str, steps: dict[str, onnx.ModelProto], component: Component, calls: list[Call], joined: str
    ) -> None:
        residual = self._call("residual", steps["residual"], component, "", {"joined": joined})
        self._program(program, component, [*calls, residual], ("residual",))

    def text_encoder(self, pieces: dict[str, onnx.ModelProto], component: Component, taken: tuple[int, ...]) -> None:
        """text_encoder: the embedding, the layers, and the hidden states after the layers `taken`, side by side."""
        calls = self._calls("text_stem", pieces["text_stem"], component, {"hidden": "text_before"})
        layer = compose_text_layer(pieces)
        at, free = "text_before", ["text_after", "text_before"]
        for number in range(taken[-1]):
            to = f"taken_{taken.index(number + 1)}" if number + 1 in taken else free[0]
            wired = {"hidden": at, "hidden_out": to}
            prefix = layer_prefix(pieces["text_stem"], number)
            calls.append(self._call("text_layer", layer, component, prefix, wired))
            at, free = to, (free[::-1] if to == free[0] else free)
        calls.append(self._call("text_join", compose_text_join(pieces, len(taken)), component))
        self._program("text_encoder", component, calls, (ENCODED,))

    def vae_decoder(self, model: onnx.ModelProto, component: Component, tiles: int) -> None:
        """vae_decoder, of an image or a tile: one plan, its attention over `tiles` of queries."""
        decoder = self._call("vae_decoder", attention_apart(attention_in_tiles(model, tiles)), component)
        self._program("vae_decoder", component, [decoder], (model.graph.output[0].name,))

    def vae_blend(self, model: onnx.ModelProto, component: Component) -> None:
        """vae_blend: one plan, without weights."""
        self._program("vae_blend", component, [self._call("vae_blend", model, component)], ("image",))

    def _program(self, stage: str, component: Component, calls: list[Call], outputs: tuple[str, ...]) -> None:
        self.cut.programs[stage] = Program(component.entry, tuple(calls), outputs)

    def _calls(
        self, kind: str, neutral: onnx.ModelProto, component: Component, buffers: dict[str, str] | None = None
    ) -> list[Call]:
        """A call for each output of `neutral`, in an order in which they can run."""
        pieces = one_output_each(neutral)
        return [self._call(f"{kind}_{name}", piece, component, "", buffers) for name, piece in pieces.items()]

    def _call(
        self,
        kind: str,
        neutral: onnx.ModelProto,
        component: Component,
        prefix: str = "",
        buffers: dict[str, str] | None = None,
        variant: str = "",
    ) -> Call:
        name = self._add(kind, neutral, component, prefix, variant=variant)
        ports = {value.name for value in (*neutral.graph.input, *neutral.graph.output)}
        wired = {port: buffer for port, buffer in (buffers or {}).items() if port != buffer and port in ports}
        return Call(name, prefix, wired)

    def _add(
        self,
        kind: str,
        neutral: onnx.ModelProto,
        component: Component,
        prefix: str,
        *,
        baked: bool = False,
        variant: str = "",
    ) -> str:
        """The name of the plan that computes `neutral` with the weights after `prefix`; of its kind if there is one, otherwise
        called after kind and `variant`."""
        arguments = argument_names(neutral)
        stored = {n.removeprefix(prefix): ref for n, ref in component.weights.items() if n.startswith(prefix)}
        planned = without_prefix(component.plan, prefix)
        lowered = lower_tensorrt(neutral, arguments, stored, planned, baked)
        taken = self.cut.tensors.setdefault(component.name, set())
        key = kind.encode() + lowered.model.SerializeToString(deterministic=True)
        if baked:
            taken |= bind(lowered.model, arguments, dict(component.weights))
        else:
            taken |= {prefix + tensor for tensor in lowered.tensors}
        # The tensors of a port may differ between blocks that are otherwise alike; they are in the key by the ports' names.
        if key in self._kinds:
            return self._kinds[key]
        stem = f"{kind}{variant}"
        number = sum(1 for name in self._kinds.values() if name.rpartition("-")[0] == stem or name == stem)
        name = f"{stem}-{number + 1}" if number else stem
        self._kinds[key] = name
        # External data must lie beside or below the graph that points to it.
        folder = f"{component.name}/{self._target}-" if baked else f"{self._folder}/"
        self.cut.plans[name] = self._plan_graph(name, f"{folder}{name}.onnx", lowered, planned, baked)
        return name

    def _plan_graph(
        self, name: str, source: str, lowered: Lowered, planned: Mapping[str, LayerPlan], baked: bool
    ) -> PlanGraph:
        profiles = self._profiles(lowered.model)
        if len(profiles) == 1 and all(least == greatest for least, _, greatest in profiles[0].values()):
            fix_shapes(lowered.model, {symbol: size for symbol, (size, _, _) in profiles[0].items()})
            profiles = ()
        groups: dict[str, list[str]] = {}
        for gemm in lowered.gemms:
            if baked and gemm in planned and planned[gemm].layer.group:
                groups.setdefault(str(planned[gemm].layer.group), []).append(gemm)
        linears = {f"{layer}.weight" for layer in planned}
        apart = {f"{name}.weight" for name, entry in planned.items() if multiplied_in(entry.format) != entry.format}
        matrices = {port.name for port in lowered.weights if linears.intersection(port.tensors)}
        graph = lowered.model.graph
        weights = {port.name for port in lowered.weights}
        collectives = [node for node in graph.node if node.op_type == COLLECTIVE]
        expected = Expected(
            gemms=lowered.gemms,
            groups=tuple(tuple(group) for group in groups.values()),
            attentions=tuple(node.name for node in graph.node if node.op_type == "Attention"),
            matrices=tuple(sorted(matrices)),
            vectors=tuple(sorted(weights - matrices)),
            collectives=tuple(node.name for node in collectives),
            ranks=ranks_of(collectives[0]) if collectives else 1,
            dequantized=tuple(sorted(port.name for port in lowered.weights if apart.intersection(port.tensors))),
        )
        return PlanGraph(
            name=name,
            model=lowered.model,
            expected=expected,
            profiles=profiles,
            entry=Plan(
                source=source,
                file=None,
                inputs=tuple(_port(value) for value in graph.input if value.name not in weights),
                outputs=tuple(_port(value) for value in graph.output),
                weights=tuple(lowered.weights),
                profiles=tuple(dict(profile) for profile in profiles),
                expected=msgspec.to_builtins(expected),
            ),
            baked=baked,
        )

    def _profiles(self, model: onnx.ModelProto) -> tuple[Profile, ...]:
        """The profiles a graph needs: of the requests only what its own dimensions count, each once."""
        symbols = {
            dimension.dim_param.partition(" + ")[0]
            for value in model.graph.input
            for dimension in value.type.tensor_type.shape.dim
            if dimension.dim_param
        }
        unknown = symbols - set(self._requests[0])
        if unknown:
            raise BuildError(f"a graph counts {', '.join(sorted(unknown))}, which no size gives a number")
        if not symbols:
            return ()
        groups: dict[int, list[dict[str, int]]] = {}
        for request in self._requests:
            groups.setdefault(request.get("images", 1), []).append(request)
        found: dict[tuple[tuple[str, tuple[int, int, int]], ...], None] = {}
        for images, requests in groups.items():
            fewest = 1 + max((number for number in groups if number < images), default=0)
            for together in [requests] if self._whole_range else [[request] for request in requests]:
                spans = []
                for symbol in sorted(symbols):
                    greatest = [request[symbol] for request in together]
                    least = [size // images * fewest for size in greatest] if symbol in ROWS else greatest
                    spans.append((symbol, (min(least), greatest[0], max(greatest))))
                found[tuple(spans)] = None
        return tuple(dict(spans) for spans in found)


def without_prefix(plan: Iterable[LayerPlan], prefix: str) -> dict[str, LayerPlan]:
    """The entries of layers whose names start with `prefix`, as if they and their groups were named without it."""
    found = {}
    for entry in plan:
        if entry.layer.name.startswith(prefix):
            group = entry.layer.group.removeprefix(prefix) if entry.layer.group else None
            layer = replace(entry.layer, name=entry.layer.name.removeprefix(prefix), group=group)
            found[layer.name] = replace(entry, layer=layer)
    return found


def _blocks(component: Component) -> list[tuple[str, str]]:
    """(kind, prefix) of every block, in order."""
    prefixes: dict[str, str] = {}
    for entry in component.plan:
        stem, _, rest = entry.layer.name.partition(".")
        if stem in ("transformer_blocks", "single_transformer_blocks"):
            kind = "double_block" if stem == "transformer_blocks" else "single_block"
            prefixes[f"{stem}.{rest.partition('.')[0]}."] = kind
    return [(kind, prefix) for prefix, kind in prefixes.items()]


def _segments(blocks: list[tuple[str, str]], component: Component, limit: int) -> list[list[tuple[str, str]]]:
    """Blocks in order, in groups whose tensors come to at most `limit` bytes; BuildError if one alone does not fit."""
    segments: list[list[tuple[str, str]]] = [[]]
    size = 0
    for kind, prefix in blocks:
        nbytes = sum(ref.nbytes for name, ref in component.weights.items() if name.startswith(prefix))
        if nbytes > limit:
            raise BuildError(
                f"{prefix}: its weights ({nbytes / 2**30:.2f} GiB) cannot be baked in the memory the recipe gives, which is "
                f"enough for {limit / 2**30:.2f} GiB; raise the target's memory_gib, or use weights: bound"
            )
        if segments[-1] and size + nbytes > limit:
            segments.append([])
            size = 0
        segments[-1].append((kind, prefix))
        size += nbytes
    return segments


def _composed(steps: dict[str, onnx.ModelProto], segment: list[tuple[str, str]]) -> onnx.ModelProto:
    """joined -> joined_out through the blocks of a segment."""
    composition = Composition()
    at = "joined"
    for kind, prefix in segment:
        step = steps[kind]
        composition.arguments(value for value in step.graph.input if "." not in value.name)
        names = argument_names(step)
        (at,) = composition.inline(step, {name: name for name in names} | {"joined": at}, prefix)
    out = steps[segment[-1][0]].graph.output[0]
    composition.node("Identity", [at], out.name)
    return composition.finish([out])


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return Port(value.name, port_dtype(tensor.elem_type), shape)
