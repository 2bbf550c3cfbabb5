"""The bundle's manifest, `bundle.json`: the types of all it says, reading and writing it, and its digest.

Types are checked where it is read; what its files hold is checked by fluxrt.bundle.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import msgspec

from fluxrt.errors import BundleError
from fluxrt.stepprecision import BODY, StepPrecision, bodies_of

FORMAT = "fluxc-bundle"
FORMAT_VERSION = 10
READABLE = (6, 7, 8, 9, 10)
"""Format versions that are read: 9 is 10 with one body for all steps, 8 is 9 with graphs that take weights as they are stored
alone, 7 is 8 for one image at a time, 6 is 7 without evidence, levels of `fidelity`, and what the model was run on."""
MANIFEST = "bundle.json"
NO_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no JSON, no UTF-8, or nested too deep."""


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 of one file of the bundle."""

    size: int
    sha256: str


class Port(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output of a graph; a dimension is a number, or the name of what it counts."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


_DIMENSION = re.compile(r"(?:(\d+)\*)?([a-z_]+)(?: \+ (\d+))?")


def dimension_size(dimension: int | str, sizes: Mapping[str, int]) -> int:
    """A dimension of a Port as a number: it is one, or what it counts, times and plus numbers ("16*rows", "tokens + 512")."""
    if isinstance(dimension, int):
        return dimension
    found = _DIMENSION.fullmatch(dimension)
    if found is None or found[2] not in sizes:
        raise BundleError(
            f"the dimension {dimension!r} is not one of {', '.join(sizes)}, times or plus a number; rebuild"
        )
    return int(found[1] or 1) * sizes[found[2]] + int(found[3] or 0)


class Unfold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Inputs of a graph that the runtime makes of a layer's stored weight when it loads it (fluxrt.unfold), in this form.

    The weight is [out, in] of `values` (e2m1, e4m3, bfloat16, float16, float32), each to be multiplied by the product of the
    tensors `scales`, named by part ("weight_scale"): one number, one a row, or one for `block` values of a row. With `rows`
    (first, last + 1) only those are unfolded.
    """

    layer: str
    form: Literal["int8", "float32"]
    shape: tuple[int, int]
    values: Literal["e2m1", "e4m3", "bfloat16", "float16", "float32"]
    scales: tuple[str, ...] = ()
    block: int = 0
    rows: tuple[int, int] | msgspec.UnsetType = msgspec.UNSET

    @property
    def part(self) -> tuple[int, int]:
        """The rows that are unfolded, first and last + 1."""
        return (0, self.shape[0]) if isinstance(self.rows, msgspec.UnsetType) else self.rows

    @property
    def tensors(self) -> tuple[str, ...]:
        """The stored tensors it is made of, the weight first."""
        return tuple(f"{self.layer}.{part}" for part in ("weight", *self.scales))


class Faster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file of a graph that computes the same faster and in more memory, and what is unfolded for it."""

    file: str
    unfold: tuple[Unfold, ...]


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph file and what goes in and out of it; `weights` is the file its initializers point into.

    `unfold` are further inputs, which the runtime makes of weights. `unsigned` is the file for a CPU whose products of int8
    rows would saturate: it takes them as uint8. `faster` is there for a machine with more memory.
    """

    file: str
    weights: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    unfold: tuple[Unfold, ...] | msgspec.UnsetType = msgspec.UNSET
    unsigned: str | msgspec.UnsetType = msgspec.UNSET
    faster: Faster | msgspec.UnsetType = msgspec.UNSET

    def with_files(self, named: Callable[[str], str]) -> Graph:
        """The same with other names of its files."""
        graph = msgspec.structs.replace(self, file=named(self.file))
        if not isinstance(self.unsigned, msgspec.UnsetType):
            graph = msgspec.structs.replace(graph, unsigned=named(self.unsigned))
        if not isinstance(self.faster, msgspec.UnsetType):
            faster = msgspec.structs.replace(self.faster, file=named(self.faster.file))
            graph = msgspec.structs.replace(graph, faster=faster)
        return graph

    @property
    def unfolded(self) -> tuple[Unfold, ...]:
        """`unfold`, where nothing is unfolded none."""
        return () if isinstance(self.unfold, msgspec.UnsetType) else self.unfold

    @property
    def faster_variant(self) -> Graph | None:
        """The graph with the file of `faster`; None where there is none."""
        if isinstance(self.faster, msgspec.UnsetType):
            return None
        return msgspec.structs.replace(self, file=self.faster.file, unfold=self.faster.unfold)

    @property
    def unsigned_variant(self) -> Graph | None:
        """The graph with the file of `unsigned`; None where there is none."""
        return (
            None if isinstance(self.unsigned, msgspec.UnsetType) else msgspec.structs.replace(self, file=self.unsigned)
        )


class WeightPort(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input of a plan that holds weights: `tensors` of the weights file, named after the call's prefix, laid end to end."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A TensorRT plan: code without weights, run once for every call that names it.

    `file` is None until it is built, from the ONNX file `source`. `profiles` are its optimization profiles in order: what a
    dimension counts, to its least, best and greatest value. Without any, every shape is fixed. `expected` is what the audit
    of the built plan holds it against.
    """

    source: str
    file: str | None
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: tuple[WeightPort, ...]
    profiles: tuple[dict[str, tuple[int, int, int]], ...]
    expected: dict[str, Any] = {}


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run of a plan: `prefix` comes before the names of its weights' tensors, `buffers` names the buffer of a port where
    it is not called like the port."""

    plan: str
    prefix: str = ""
    buffers: dict[str, str] = {}


class Program(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stage of an image comes to: calls in order, the weights file their tensors are in, the buffers with results."""

    weights: str
    calls: tuple[Call, ...]
    outputs: tuple[str, ...]


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """TensorRT plans and the programs (text_encoder, prologue, body, epilogue, vae_decoder, vae_blend) that run them.

    `library` is tensorrt or tensorrt_rtx, `version` the one the plans were built with, `compute_capabilities` the GPUs they
    run on ("12.0"); `gpu` and `driver` are recorded when the plans were built on the GPU itself. `audit` says by plan what
    was found in it.
    """

    library: str
    version: str | None
    compute_capabilities: tuple[str, ...]
    plans: dict[str, Plan]
    programs: dict[str, Program]
    gpu: str | None = None
    driver: str | None = None
    audit: dict[str, Any] = {}

    @property
    def unfinished(self) -> list[str]:
        """The plans that are still to be built on the GPU they are for."""
        return [name for name, plan in self.plans.items() if plan.file is None]


class Exchange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An all-to-all: part i of the buffer `sends` goes to rank i, part i of `receives` came from it; dimension 0 counts
    ranks."""

    sends: str
    receives: str
    dtype: str
    shape: tuple[int | str, ...]


class Sharding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a target divides an image among `ranks`: every rank has `text_tokens` of the text, and an equal shard of the image.

    With `padded` any number of image tokens is padded to a multiple of `ranks`. `body` is what the stage of that name
    comes to where collectives are not part of a graph: graphs, and exchanges between them; `others` the same of other bodies.
    """

    ranks: int
    text_tokens: int
    padded: bool = False
    body: tuple[str | Exchange, ...] = ()
    others: dict[str, tuple[str | Exchange, ...]] | msgspec.UnsetType = msgspec.UNSET

    @property
    def bodies(self) -> dict[str, tuple[str | Exchange, ...]]:
        """What each body comes to, by its name."""
        return {BODY: self.body} | ({} if isinstance(self.others, msgspec.UnsetType) else self.others)


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """One way of running the bundle. Each kind has a struct of its own with what its backend needs; `kind` says which.

    What is asked of a target of any kind is answered here as for one GPU that computes in the layers' formats; a kind that
    answers otherwise has a field or a property of that name.
    """

    name: str

    @property
    def kind(self) -> str:
        """The word for its kind, as in a recipe."""
        return kind_name(type(self))

    @property
    def device(self) -> str:
        """Where it runs: cpu or cuda."""
        return "cuda"

    @property
    def activations(self) -> str:
        """How the inputs of quantized layers are rounded: as an FP4 GPU does it (nvfp4), or not at all (none)."""
        return "nvfp4"

    @property
    def computed_in(self) -> str:
        """What products of quantized layers are computed in, where that is less than their format or fp32; or empty."""
        return ""

    @property
    def sharding(self) -> Sharding | None:
        """How an image is divided among several processes, one a rank."""
        return None

    @property
    def tokens(self) -> tuple[int, int] | None:
        """The range of image tokens any size may have, where it is not limited to the sizes listed under `sampling`."""
        return None

    @property
    def parts(self) -> tuple[Graph | Plan, ...]:
        """Its graphs or plans."""
        return ()

    @property
    def bodies(self) -> tuple[str, ...]:
        """The bodies that a step may run, `body` first."""
        return (BODY,)

    @property
    def hardware(self) -> str | None:
        """What it runs on, in words, where `device` does not say it."""
        return None

    @property
    def extra(self) -> str | None:
        """The extra of fluxrt with what it needs, where fluxrt alone does not run it on a CPU."""
        return None

    @property
    def audited(self) -> bool | None:
        """Whether what was built was read back; None where there is nothing to read."""
        return None

    @property
    def gpus(self) -> int:
        """How many GPUs, or on a CPU processes, it takes, where the target itself decides that."""
        return self.sharding.ranks if self.sharding else 1

    def runs_on(self, gpus: int) -> bool:
        """Whether it can generate with so many GPUs, or on a CPU processes."""
        return self.gpus == gpus

    def reads(self, name: str) -> bool:
        """Whether a graph or plan has an input of this name; a model without embedded guidance reads none, for example."""
        return any(port.name == name for part in self.parts for port in part.inputs)

    def input(self, name: str) -> Port:
        """The first input of this name; BundleError if there is none."""
        for part in self.parts:
            for port in part.inputs:
                if port.name == name:
                    return port
        raise BundleError(f"no graph of target {self.name!r} has an input {name!r}; rebuild the bundle")


class OnnxRuntimeTarget(Target, frozen=True, tag="onnxruntime"):
    """Graphs by name, for ONNX Runtime on `device`. `activations` are "none", or rounded as an FP4 GPU does it ("nvfp4").

    With `sharding` several processes run it, one a rank, and what its graphs count as "tokens" are those of one rank.
    """

    activations: str
    graphs: dict[str, Graph]
    device: str = "cpu"
    sharding: Sharding | None = None

    @property
    def computed_in(self) -> str:
        """int8, where a graph takes int8 rows."""
        return "int8" if any(one.form == "int8" for graph in self.graphs.values() for one in graph.unfolded) else ""

    @property
    def parts(self) -> tuple[Graph | Plan, ...]:
        """The graphs."""
        return tuple(self.graphs.values())

    @property
    def bodies(self) -> tuple[str, ...]:
        """The graphs of that name, or what is made of graphs and exchanges."""
        return tuple(self.sharding.bodies) if self.sharding else _bodies_among(self.graphs)


def _bodies_among(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name.partition("-")[0] == BODY)


class TensorRTTarget(Target, frozen=True, tag="tensorrt"):
    """An engine for TensorRT. `tokens` is the range any size may have, None where the sizes are those under `sampling`.

    With `sharding` there is a process for each GPU, and what its plans count as "tokens" are those of one rank.
    """

    engine: Engine
    tokens: tuple[int, int] | None = None
    sharding: Sharding | None = None

    @property
    def parts(self) -> tuple[Graph | Plan, ...]:
        """The plans."""
        return tuple(self.engine.plans.values())

    @property
    def bodies(self) -> tuple[str, ...]:
        """The programs of that name."""
        return _bodies_among(self.engine.programs)


class TensorRTRtxTarget(TensorRTTarget, frozen=True, tag="tensorrt_rtx"):
    """An engine for TensorRT-RTX."""


class VisualGenTarget(Target, frozen=True, tag="visual_gen"):
    """A folder that TensorRT-LLM's VisualGen loads: where it is, what its settings are written for, and by number of GPUs
    (as text) the file with them. Prompts are padded to `text_length` tokens."""

    folder: str
    schema: str
    configs: dict[str, str]
    text_length: int

    def runs_on(self, gpus: int) -> bool:
        """Whether there are settings for so many GPUs."""
        return str(gpus) in self.configs


def kind_name(struct: type[Target]) -> str:
    """What `kind` is in an entry that `struct` is for."""
    return str(struct.__struct_config__.tag)


TARGETS: dict[str, type[Target]] = {
    kind_name(struct): struct for struct in (OnnxRuntimeTarget, TensorRTRtxTarget, TensorRTTarget, VisualGenTarget)
}
"""The structs of manifest entries by kind; fluxrt.backends.registry adds those of further kinds."""

AnyTarget = TypeVar("AnyTarget", bound=Target)


def struct_of(kind: str, base: type[AnyTarget]) -> type[AnyTarget]:
    """The struct of entries of `kind`, which is `base` or made from it."""
    struct = TARGETS[kind]
    assert issubclass(struct, base)
    return struct


def read_target(entry: Any) -> Target:
    """A manifest's entry as the struct of its kind; msgspec.ValidationError says what is wrong with it.

    An entry of a kind that is not known here is kept as it is: nothing runs it, and the bundle's other targets are of use.
    """
    import fluxrt.backends.registry  # noqa: F401 - registers further kinds

    head = msgspec.convert(entry, _AnyKind)
    return msgspec.convert(entry, TARGETS.get(head.kind) or _unknown_kind(head.kind, entry))


def _unknown_kind(kind: str, entry: dict[str, Any]) -> type[Target]:
    """A struct for this entry; its fields have names of our own, so that none of them hides what Target answers."""
    fields = {f"field_{at}": key for at, key in enumerate(entry) if key not in ("kind", "name")}
    typed = [(field, Any) for field in fields]
    try:
        made: Any = msgspec.defstruct("UnknownTarget", typed, bases=(Target,), frozen=True, tag=kind, rename=fields)
    except ValueError as error:
        raise msgspec.ValidationError(str(error)) from error
    struct: type[Target] = made
    return struct


class _AnyKind(msgspec.Struct):
    """The two fields every entry has."""

    kind: str
    name: str


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One Linear of a component: shape [out, in], format, the rule that decided it, and its fusion group if any."""

    component: str
    name: str
    shape: tuple[int, int]
    format: str
    rule: str
    group: str | None
    bytes_before: int
    bytes_after: int


class Prompting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a prompt becomes tokens: `prefix + prompt + suffix`, encoded, padded with `pad_id` to `length`.

    Where these are not set, prompts are padded on the right, nothing is `removed` from a prompt before, and the tokenizer adds
    special tokens of its own.
    """

    tokenizer: str
    prefix: str
    suffix: str
    length: int
    pad_id: int
    padding: Literal["left", "right"] | msgspec.UnsetType = msgspec.UNSET
    removed: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    special_tokens: bool | msgspec.UnsetType = msgspec.UNSET


class Tiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Images are decoded in tiles of `size` (rows, columns) tokens, which overlap by at least `overlap` (rows, columns)."""

    size: tuple[int, int]
    overlap: tuple[int, int]

    def __post_init__(self) -> None:
        if not all(0 <= overlap < size for overlap, size in zip(self.overlap, self.size, strict=True)):
            raise ValueError(f"tiles of {list(self.size)} tokens cannot overlap by {list(self.overlap)}")


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the step loop needs: sizes in pixels [height, width], pixels a token, channels, schedule and defaults.

    `batches` are the numbers of images that were compiled for, 1 alone where it is not set. With `range`, the least and the
    greatest [height, width], any size between them can be generated. Where `tiles` is set, the graphs
    `vae_decoder` and `vae_blend` decode an image tile by tile (fluxrt.tiles).
    """

    sizes: tuple[tuple[int, int], ...]
    pixels_per_token: int
    latent_channels: int
    schedule: str
    steps: int
    guidance: float
    cfg_batch: bool
    batches: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET
    range: tuple[tuple[int, int], tuple[int, int]] | msgspec.UnsetType = msgspec.UNSET
    tiles: Tiles | msgspec.UnsetType = msgspec.UNSET

    def in_range(self, size: tuple[int, int]) -> bool:
        """Whether `size` lies in `range`, in whole tokens."""
        if isinstance(self.range, msgspec.UnsetType):
            return False
        sides = zip(self.range[0], size, self.range[1], strict=True)
        return all(low <= side <= high and side % self.pixels_per_token == 0 for low, side, high in sides)

    @property
    def compiled_batches(self) -> tuple[int, ...]:
        """`batches`, where they are not set 1."""
        return (1,) if self.batches is msgspec.UNSET else self.batches

    @property
    def tiled(self) -> Tiles | None:
        """The tiles; None where images are decoded whole."""
        return None if isinstance(self.tiles, msgspec.UnsetType) else self.tiles


class CacheRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When the dynamic step cache skips, see fluxrt.stepcache.

    `coefficients` of the polynomial, highest degree first; `first` and `last` steps are always computed, and no more than
    `max_consecutive_skips` are skipped in a row. A negative value of the polynomial counts as `zero` (ours), as it is
    (`signed`, the authors' rule) or with its sign taken off (`absolute`, VisualGen's).
    """

    coefficients: tuple[float, ...]
    threshold: float
    first: int = 1
    last: int = 1
    max_consecutive_skips: int | None = None
    negative: Literal["zero", "signed", "absolute"] = "zero"


class StepCache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which steps reuse the last residual: by `rule` (dynamic) or those in `schedule` (static), for `steps` steps at `size`.

    `on_mismatch` is what happens to requests of another size or number of steps, which the rule decides if anything does.
    `visual_gen` is the rule for TensorRT-LLM's VisualGen, fitted to residuals of the latents. `fit` says how well the
    polynomials fit, and how thresholds were found.
    """

    mode: Literal["dynamic", "static"]
    rule: CacheRule
    schedule: tuple[int, ...]
    steps: int
    size: tuple[int, int]
    on_mismatch: Literal["refuse", "warn", "allow"]
    visual_gen: CacheRule
    fit: dict[str, Any]


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the bundle came from. `built_at` is the one field outside the manifest's digest."""

    source: str
    checkpoint: dict[str, dict[str, str]]
    tools: dict[str, str]
    built_at: str
    computed: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    """What the model ran on, and in which type, by what it was run for: calibration, step cache, reference."""
    measured: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    """How many prompts and steps that was, at which size, where the recipe may leave it open: calibration, reference."""
    commits: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    """The commit of each repository of the hub that the checkpoint was read from, by hub id."""


class RecordedImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image generated at build time, and the request it answered."""

    file: str
    target: str
    prompt: str
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]


class RankFidelity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Images of a target of `ranks` processes beside those of the target `against`, which runs in one."""

    ranks: int
    against: str
    image_psnr_db: float | None
    image_psnr_db_worst: float | None


class DeviceGpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One GPU of a machine; `id` is made from its UUID."""

    name: str
    compute_capability: str
    memory_bytes: int
    id: str


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The GPUs of a machine in order, [from][to] which can read each other's memory, and the driver with the CUDA it has."""

    gpus: tuple[DeviceGpu, ...]
    peers: tuple[tuple[bool, ...], ...]
    driver: str
    cuda: str


class CheckFound(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a check of `fluxc gpu-check` ended, why it did not pass, and what it measured."""

    status: str
    why: str
    figures: dict[str, Any]


class OnTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one machine's GPUs did with the bundle whose digest, without such entries, was `bundle`: tiers by target.

    `seal` is that of the file of `fluxc gpu-check`, which the report holds; `versions` are those of the libraries.
    """

    tiers: dict[str, str]
    seal: str
    bundle: str
    device: Device
    versions: dict[str, str]
    checks: dict[str, CheckFound]

    @property
    def gpu(self) -> str:
        """The name of its first GPU."""
        return self.device.gpus[0].name if self.device.gpus else "no GPU"


class NotCompared(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a build did not compare with the reference: whose (a target's name, or "step cache"), what, and why."""

    target: str
    what: str
    why: str


class Fidelity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How near to `reference` each target computes, by its name; docs/bundle-format.md names the figures.

    `level` is what the build compared: none, stages or images.
    """

    reference: str
    targets: dict[str, dict[str, Any]]
    ranks: dict[str, RankFidelity]
    step_cache: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    on_target: tuple[OnTarget, ...] | msgspec.UnsetType = msgspec.UNSET
    level: Literal["none", "stages", "images"] | msgspec.UnsetType = msgspec.UNSET
    not_compared: tuple[NotCompared, ...] | msgspec.UnsetType = msgspec.UNSET
    tiling: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    """Of images that are decoded in tiles, the reference's own decoded so, against the same decoded whole."""


class StageErrors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the stages of a target are from a recorded prompt's: relative errors (Euclidean norms), and of the velocity at
    each recorded sigma the cosine too. Null where a backend does not give a stage's results, or they are not finite."""

    text_error: float | None
    prologue_error: float | None
    step_error: tuple[float | None, ...]
    step_cosine: tuple[float | None, ...]
    decode_error: float | None


class StageBound(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The largest relative error that a stage may have, and in words what it is derived from."""

    error: float
    of: str


class EvidenceTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What evidence is held to on a target: `bounds` by figure of StageErrors (of `step_error` for every sigma), and by prompt
    what the build measured, nothing where the target did not run there."""

    bounds: dict[str, StageBound]
    measured: tuple[StageErrors, ...] = ()


class EvidencePrompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recorded prompt: its safetensors file, and by stage the SHA-256 of the bytes of each tensor that is recorded of it."""

    file: str
    prompt: str
    seed: int
    stages: dict[str, dict[str, str]]


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Recorded inputs of every stage and what `fidelity.reference` made of them, to be replayed on any target.

    `sigmas` are those at which velocities are recorded, of a generation with so many `steps`.
    """

    size: tuple[int, int]
    steps: int
    guidance: float
    sigmas: tuple[float, ...]
    prompts: tuple[EvidencePrompt, ...]
    targets: dict[str, EvidenceTarget]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything `bundle.json` says; docs/bundle-format.md explains it field by field."""

    format: str
    format_version: int
    name: str
    digest: str
    family: str
    recipe: dict[str, Any]
    provenance: Provenance
    components: dict[str, str]
    precision: tuple[Layer, ...]
    prompting: Prompting
    sampling: Sampling
    targets: tuple[Target, ...]
    fidelity: Fidelity
    images: tuple[RecordedImage, ...]
    files: dict[str, File]
    step_cache: StepCache | None = None
    evidence: Evidence | msgspec.UnsetType = msgspec.UNSET
    step_precision: StepPrecision | msgspec.UnsetType = msgspec.UNSET

    def bodies(self, target: Target, steps: int) -> list[str]:
        """The body of each step of a generation of `steps` with one of its targets."""
        precision = None if isinstance(self.step_precision, msgspec.UnsetType) else self.step_precision
        return bodies_of(precision, steps, target.bodies)

    @property
    def recorded(self) -> Evidence | None:
        """The evidence; None in a bundle that has none."""
        return None if isinstance(self.evidence, msgspec.UnsetType) else self.evidence


def decode_manifest(raw: bytes) -> Manifest:
    """The manifest as a struct, its targets by their kinds; msgspec.MsgspecError says what is wrong with it."""
    plain = msgspec.json.decode(raw)
    entries = plain.get("targets") if isinstance(plain, dict) else None
    if not isinstance(entries, list):
        return msgspec.convert(plain, Manifest)
    manifest = msgspec.convert(plain | {"targets": []}, Manifest)
    targets = []
    for at, entry in enumerate(entries):
        try:
            targets.append(read_target(entry))
        except msgspec.ValidationError as error:
            raise msgspec.ValidationError(f"targets[{at}]: {error}") from error
    return msgspec.structs.replace(manifest, targets=tuple(targets))


def manifest_digest(manifest: Manifest) -> str:
    """SHA-256 of the manifest's canonical JSON without its own digest and without `provenance.built_at`."""
    plain = msgspec.to_builtins(manifest)
    plain.pop("digest")
    plain["provenance"].pop("built_at")
    return hashlib.sha256(msgspec.json.encode(plain, order="deterministic")).hexdigest()


def encode_manifest(manifest: Manifest) -> bytes:
    """`manifest` as readable JSON with its digest filled in."""
    sealed = msgspec.structs.replace(manifest, digest=manifest_digest(manifest))
    return msgspec.json.format(msgspec.json.encode(sealed, order="deterministic"), indent=1) + b"\n"
