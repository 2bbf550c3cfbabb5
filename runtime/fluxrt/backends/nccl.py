"""NCCL communicators for the collectives inside TensorRT's plans, through nccl4py."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from fluxrt.errors import BackendError
from fluxrt.install import install_extra

if TYPE_CHECKING:
    from fluxrt.group import Group

UNIQUE_ID_BYTES = 128
CONNECTING = 120.0
"""Seconds in which NCCL must have connected every rank's GPU."""


class Communicator:
    """The NCCL communicator of this rank; every rank of `group` makes one at the same time, its GPU's context current.

    `capsule` is what TensorRT's contexts take.
    """

    def __init__(self, group: Group) -> None:
        # nccl4py has classes of its own for a library that is missing and for every result of NCCL's.
        try:
            from nccl import core

            mine = bytes(core.get_unique_id()) if group.rank == 0 else None
        except Exception as error:
            raise BackendError(
                f"a sharded target needs NCCL, which cannot be used here ({error}); run `{install_extra('fluxrt', 'nccl')}`"
            ) from error
        unique = core.UniqueId.from_bytes(group.broadcast(mine)[:UNIQUE_ID_BYTES])
        try:
            with group.together("NCCL to connect the GPUs", CONNECTING):
                self._communicator = core.Communicator.init(nranks=group.ranks, rank=group.rank, unique_id=unique)
        except Exception as error:
            raise BackendError(
                f"rank {group.rank}: NCCL does not connect {group.ranks} GPUs: {error}; NCCL_DEBUG=INFO makes it say more"
            ) from error
        self.capsule = _capsule(int(self._communicator.ptr))

    def close(self) -> None:
        """Leave the group; waits for nobody."""
        self._communicator.abort()


def _capsule(pointer: int) -> Any:
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(pointer, None, None)
