"""Which buffers a target's programs need, and where they and the weights lie in the GPU's memory: plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fluxrt.errors import BundleError, RequestError
from fluxrt.manifest import dimension_size
from fluxrt.weights import STORED_AS, StoredTensor, size_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fluxrt.manifest import Call, Engine, Plan, Port, Program, WeightPort

ALIGNMENT = 256
Sizes = dict[str, int]


@dataclass(frozen=True)
class Buffer:
    """A dense tensor in the GPU's memory that programs read and write by name."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return size_of(self.dtype, self.shape)


def resolve(shape: Iterable[int | str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """`shape` in numbers."""
    return tuple(dimension_size(dimension, sizes) for dimension in shape)


def buffer_of(call: Call, port: Port | str) -> str:
    """The buffer that a port of a call is bound to."""
    name = port if isinstance(port, str) else port.name
    return call.buffers.get(name, name)


def plan_buffers(engine: Engine, sizes: Sizes, stages: Iterable[str] | None = None) -> dict[str, Buffer]:
    """Every buffer of the programs of `stages`, by default of all, for these sizes.

    BundleError when two ports want one buffer to be different tensors.
    """
    buffers: dict[str, Buffer] = {}
    for stage in engine.programs if stages is None else stages:
        for call in engine.programs[stage].calls:
            plan = engine.plans[call.plan]
            for port in (*plan.inputs, *plan.outputs):
                name = buffer_of(call, port)
                wanted = Buffer(port.dtype, resolve(port.shape, sizes))
                if buffers.setdefault(name, wanted) != wanted:
                    raise BundleError(
                        f"{stage}: plan {call.plan} wants buffer {name!r} as {wanted.dtype} {list(wanted.shape)}, another as "
                        f"{buffers[name].dtype} {list(buffers[name].shape)}; the bundle is wrong, rebuild it"
                    )
    return buffers


def profile_for(name: str, plan: Plan, sizes: Sizes) -> int:
    """The optimization profile of `plan` that these sizes fit; RequestError says what was compiled."""
    if not plan.profiles:
        return 0
    for number, profile in enumerate(plan.profiles):
        if all(least <= sizes[symbol] <= greatest for symbol, (least, _, greatest) in profile.items()):
            return number
    wanted = {symbol: sizes[symbol] for symbol in plan.profiles[0]}
    compiled = "; ".join(
        ", ".join(
            f"{symbol} {low}" if low == high else f"{symbol} {low} to {high}" for symbol, (low, _, high) in p.items()
        )
        for p in plan.profiles
    )
    raise RequestError(
        f"{', '.join(f'{symbol} {size}' for symbol, size in wanted.items())} was not compiled: plan {name} has {compiled}; "
        "ask for a size of the bundle, or add it to sizes in the recipe and rebuild"
    )


def check_sizes(engine: Engine, sizes: Sizes) -> None:
    """Refuse sizes that some plan has no profile for."""
    for name, plan in engine.plans.items():
        profile_for(name, plan, sizes)


@dataclass(frozen=True)
class Piece:
    """Bytes of one tensor that go to `offset` of an arena."""

    offset: int
    name: str


@dataclass(frozen=True)
class Arena:
    """Where the weights of a program lie: pieces to copy, and by call number and port the offset of its tensors."""

    nbytes: int
    pieces: tuple[Piece, ...]
    offsets: dict[tuple[int, str], int]


def plan_arena(program: Program, engine: Engine, stored: Mapping[str, StoredTensor]) -> Arena:
    """Lay the tensors of every call's weights out, those of one port end to end, each port aligned; equal ports share.

    Raises BundleError naming a tensor that is missing or has another size than its port.
    """
    pieces: list[Piece] = []
    offsets: dict[tuple[int, str], int] = {}
    seen: dict[tuple[str, ...], int] = {}
    end = 0
    for number, call in enumerate(program.calls):
        for port in engine.plans[call.plan].weights:
            names = tuple(call.prefix + tensor for tensor in port.tensors)
            if names not in seen:
                _check(port, names, stored)
                seen[names] = end = -(-end // ALIGNMENT) * ALIGNMENT
                for name in names:
                    pieces.append(Piece(end, name))
                    end += stored[name].nbytes
            offsets[number, port.name] = seen[names]
    return Arena(end, tuple(pieces), offsets)


def _check(port: WeightPort, names: tuple[str, ...], stored: Mapping[str, StoredTensor]) -> None:
    for name in names:
        if name not in stored:
            raise BundleError(f"the weights file has no tensor {name!r}, which a plan needs; rebuild the bundle")
        if stored[name].dtype != STORED_AS[port.dtype]:
            raise BundleError(
                f"tensor {name!r} is {stored[name].dtype}, a plan takes {STORED_AS[port.dtype]}; rebuild the bundle"
            )
    nbytes, wanted = sum(stored[name].nbytes for name in names), size_of(port.dtype, port.shape)
    if nbytes != wanted:
        raise BundleError(
            f"{', '.join(names)} come to {nbytes} bytes, a plan takes {port.dtype} {list(port.shape)}, {wanted} bytes; "
            "rebuild the bundle"
        )
