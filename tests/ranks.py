"""N ranks inside one process, a thread each: what a test needs to look into them."""

from __future__ import annotations

import mmap
import socket
import threading
from collections.abc import Callable
from typing import Any

from fluxrt.group import Group

HALF = 1 << 24


def groups(ranks: int, timeout: float = 60.0) -> list[Group]:
    """The groups of every rank, connected as those of processes are."""
    ends: list[dict[int, socket.socket]] = [{} for _ in range(ranks)]
    for one in range(ranks):
        for other in range(one + 1, ranks):
            ends[one][other], ends[other][one] = socket.socketpair()
    memory = mmap.mmap(-1, 2 * ranks * HALF)
    return [Group(rank, peers, memory, HALF, timeout) for rank, peers in enumerate(ends)]


def on_every_rank(ranks: int, work: Callable[[Group], Any]) -> list[Any]:
    """What `work` returns on every rank, all at the same time; the first error of any."""
    results: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def run(group: Group) -> None:
        try:
            results[group.rank] = work(group)
        except BaseException as error:
            errors.append(error)
            for peer in group._peers.values():
                peer.close()

    threads = [threading.Thread(target=run, args=(group,)) for group in groups(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
