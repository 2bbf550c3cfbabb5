"""Generates with a sharded target: one process a rank, watched, so that a rank that dies or hangs ends all of them at once.

Nothing has a name that could be left behind: the memory the ranks share is a file without one, and every process ends when
the command's end of its channel closes.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import msgspec

import fluxrt
from fluxrt.bundle import Bundle, Target, dimension_size
from fluxrt.channel import Channel
from fluxrt.errors import BackendError, RequestError
from fluxrt.rank import Start
from fluxrt.result import Result
from fluxrt.sharding import Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fluxrt.request import Request

STALL = 5.0
"""Seconds without a sign of life, and without a moment of CPU time, after which a rank is taken for hung."""
GRACE = 1.0
LOG_CHARACTERS = 2000
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}


class RankError(BackendError):
    """A rank failed, died or hung; all ranks are ended."""


class _Rank:
    """A rank as the command sees it."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], channel: Channel, log: IO[bytes]) -> None:
        self.number, self.process, self.channel, self.log = number, process, channel, log
        self.heard = time.monotonic()
        self._used, self._moved = -1, self.heard

    def is_hung(self) -> bool:
        """Whether neither a sign of life came nor the process used the CPU for too long."""
        now, used = time.monotonic(), _cpu_ticks(self.process.pid)
        if used != self._used:
            self._used, self._moved = used, now
        return now - self.heard > STALL and now - self._moved > STALL

    def tail(self) -> str:
        """The end of its log."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - LOG_CHARACTERS))
        return self.log.read().decode(errors="replace").strip()


class RankedPipeline:
    """A bundle ready to generate with a sharded target, on as many GPUs, or on a CPU in as many processes, as it has ranks.

    `threads` are those of each rank, by default the CPU's, divided among them. A rank that others wait for longer than
    `timeout` seconds ends them all. Close it, or use it in a `with` statement; ranks end with it.
    """

    def __init__(self, bundle: Bundle, target: Target, *, threads: int | None = None, timeout: float = 600.0) -> None:
        self.bundle, self.target = bundle, target
        self.notes: list[str] = []
        self._progress = ""
        self._ranks: list[_Rank] = []
        self._logs = ExitStack()
        self._finalizer = weakref.finalize(self, _end, self._ranks, self._logs)
        half = -(-_largest_exchange(bundle, target) // 64) * 64
        try:
            with _common_memory(2 * target.gpus * half) as memory:
                self._start(memory.fileno(), half, threads or max(1, _cores() // target.gpus), timeout)
            self._send({"manifest": msgspec.json.encode(bundle.manifest)})
            self._wait("ready")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RankedPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, request: Request, on_step: Callable[[int, int], None] | None = None) -> Result:
        """One image a prompt, as Pipeline does; RankError, naming the rank, where one fails."""
        from PIL import Image

        try:
            self._send({"request": request.encode()})
            done = self._wait("done", on_step)[0]
        except RequestError:
            raise
        except BaseException:
            # Ranks in the middle of an image would answer the next request with it.
            self.close()
            raise
        self.notes = done["backend_notes"]
        images = [Image.frombytes("RGB", tuple(image["size"]), image["data"]) for image in done["images"]]
        return Result(images, done["seconds"], [tuple(steps) for steps in done["skipped"]], done["notes"])

    def close(self) -> None:
        """End the ranks."""
        self._finalizer()
        self._ranks = []

    def _start(self, memory: int, half: int, threads: int, timeout: float) -> None:
        gpus = self.target.gpus
        ends: list[dict[int, socket.socket]] = [{} for _ in range(gpus)]
        for one in range(gpus):
            for other in range(one + 1, gpus):
                ends[one][other], ends[other][one] = socket.socketpair()
        path = os.pathsep.join([str(Path(fluxrt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        for number, peers in enumerate(ends):
            ours, theirs = socket.socketpair()
            log = self._logs.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - open for as long as its rank
            start = Start(
                rank=number,
                control=theirs.fileno(),
                memory=memory,
                half=half,
                peers={rank: end.fileno() for rank, end in peers.items()},
                timeout=timeout,
                root=str(self.bundle.root.resolve()),
                target=self.target.name,
                threads=threads,
            )
            process = subprocess.Popen(
                [sys.executable, "-m", "fluxrt.rank", start.to_json()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[start.control, memory, *start.peers.values()],
                env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
            )
            theirs.close()
            # A message that stops halfway is a rank that hangs.
            ours.settimeout(STALL)
            self._ranks.append(_Rank(number, process, Channel(ours), log))
        for peers in ends:
            for end in peers.values():
                end.close()

    def _send(self, message: dict[str, Any]) -> None:
        for rank in self._ranks:
            try:
                rank.channel.send(message)
            except OSError:
                self._fail(rank, None)

    def _wait(self, kind: str, on_step: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
        """Every rank's message of this kind, in order of rank."""
        if not self._ranks:
            raise RankError("the ranks of this pipeline are ended; load the bundle again")
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank in self._ranks:
                selector.register(rank.channel, selectors.EVENT_READ, rank)
            while len(answers) < len(self._ranks):
                for key, _ in selector.select(timeout=0.25):
                    rank = key.data
                    message = self._receive(rank)
                    if message["kind"] in (kind, "refused"):
                        answers[rank.number] = message
                    elif message["kind"] == "step" and rank.number == 0:
                        self._progress = f"at step {message['done']} of {message['total']}"
                        if on_step:
                            on_step(message["done"], message["total"])
                for rank in self._ranks:
                    if rank.is_hung():
                        self._fail(rank, f"gave no sign of life for {STALL:g} s")
        refused = [message["text"] for message in answers.values() if message["kind"] == "refused"]
        if refused:
            raise RequestError(refused[0])
        return [answers[rank.number] for rank in self._ranks]

    def _receive(self, rank: _Rank) -> dict[str, Any]:
        try:
            message = rank.channel.receive()
        except TimeoutError:
            self._fail(rank, "stopped in the middle of a message")
        rank.heard = time.monotonic()
        if message is None:
            self._fail(rank, None)
        if message["kind"] == "peer":
            self._fail(rank, message["text"], is_witness=True)
        if message["kind"] == "error":
            self._fail(rank, message["text"])
        return message

    def _fail(self, rank: _Rank, why: str | None, is_witness: bool = False) -> NoReturn:
        """End all ranks and raise RankError about the one to blame: who merely missed another is not."""
        if why is None or is_witness:
            until = time.monotonic() + GRACE
            while time.monotonic() < until and not (killed := self._killed()):
                time.sleep(0.02)
            if killed:
                rank, is_witness = killed[0], False
            why = why if is_witness else _how_it_ended(rank.process.poll())
        ranks, log = len(self._ranks), rank.tail()
        self.close()
        raise RankError(
            f"rank {rank.number} of {ranks} (process {rank.process.pid}) {'says: ' if is_witness else ''}{why} "
            f"{self._progress or 'before the first step'}; all ranks were ended. "
            + (f"Its log ends with:\n{log}" if log else "Its log is empty.")
        )

    def _killed(self) -> list[_Rank]:
        """Ranks that ended without saying why."""
        return [rank for rank in self._ranks if rank.process.poll() not in (None, 0) and rank.process.returncode != 1]


def _end(ranks: list[_Rank], logs: ExitStack) -> None:
    for rank in ranks:
        rank.channel.close()
    for rank in ranks:
        rank.process.kill()
        rank.process.wait()
    logs.close()


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "closed its channel"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _largest_exchange(bundle: Bundle, target: Target) -> int:
    """Bytes of the largest array that ranks give one another at once."""
    assert target.sharding is not None
    sampling, sharding = bundle.manifest.sampling, target.sharding
    pixels = sampling.pixels_per_token
    totals = [height // pixels * (width // pixels) for height, width in sampling.sizes]
    totals += [target.tokens[1]] if target.tokens else []
    tokens = max(Shard(0, sharding.ranks, total, sharding.text_tokens).tokens for total in totals)
    sizes = {"branches": 2 if sampling.cfg_batch else 1, "tokens": tokens}

    def nbytes(shape: tuple[int | str, ...], dtype: str) -> int:
        count = BYTES[dtype]
        for dimension in shape:
            count *= dimension_size(dimension, sizes)
        return count

    exchanged = [nbytes(part.shape, part.dtype) for part in sharding.body if not isinstance(part, str)]
    text = sharding.ranks * nbytes(target.input("text_shard").shape, "float32")
    return max([4096, text, 4 * tokens * sampling.latent_channels, *exchanged])


@contextmanager
def _common_memory(nbytes: int) -> Iterator[IO[bytes]]:
    """A file of `nbytes` zeros without a name, in memory where the system can."""
    with ExitStack() as stack:
        if hasattr(os, "memfd_create"):
            file: IO[bytes] = stack.enter_context(os.fdopen(os.memfd_create("fluxrt"), "r+b"))
        else:
            file = stack.enter_context(tempfile.TemporaryFile())
        file.truncate(nbytes)
        yield file


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_ticks(pid: int) -> int:
    """CPU time a process has used, in ticks; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])
