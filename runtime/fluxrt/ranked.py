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
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import msgspec

import fluxrt
from fluxrt.bundle import Bundle
from fluxrt.channel import Channel
from fluxrt.checks import check_threads
from fluxrt.cores import usable_cores
from fluxrt.errors import BackendError, RequestError
from fluxrt.manifest import Target, dimension_size
from fluxrt.pipeline import rescue, say_memory
from fluxrt.prompt import load_encoder
from fluxrt.rank import Start
from fluxrt.request import Request
from fluxrt.resolve import resolve
from fluxrt.result import Result
from fluxrt.sharding import Shard, sizes_of
from fluxrt.texts import TEXT_CACHE
from fluxrt.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL.Image import Image

    from fluxrt.memory import Memory
    from fluxrt.prompt import PromptEncoder
    from fluxrt.resolve import Resolved
    from fluxrt.result import OnImage, OnStep

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
        self._quiet: tuple[str, float, float] | None = None

    def be_quiet(self, what: str, seconds: float) -> None:
        """Expect no sign of life for so long, while it waits for `what`; with 0 seconds expect them again."""
        self._quiet = (what, seconds, time.monotonic() + seconds) if seconds else None

    def hangs(self) -> str | None:
        """What shows that it hangs: a wait that was announced and did not end, or no sign of life and no use of the CPU."""
        now, used = time.monotonic(), _cpu_ticks(self.process.pid)
        if used != self._used:
            self._used, self._moved = used, now
        if self._quiet:
            what, seconds, until = self._quiet
            return f"waited longer than {seconds:g} s for {what}" if now > until else None
        if now - self.heard > STALL and now - self._moved > STALL:
            return f"gave no sign of life for {STALL:g} s"
        return None

    def tail(self) -> str:
        """The end of its log."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - LOG_CHARACTERS))
        return self.log.read().decode(errors="replace").strip()


@dataclass
class _Made:
    """What a request has come to so far."""

    images: list[Image] = field(default_factory=list)
    skipped: list[tuple[int, ...]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    given: int = 0

    def add(self, plain: dict[str, Any]) -> None:
        """Add an image as a rank sent it."""
        from PIL import Image

        self.images.append(Image.frombytes("RGB", tuple(plain["size"]), plain["data"]))


class RankedPipeline:
    """A bundle ready to generate with a sharded target, on as many GPUs, or on a CPU in as many processes, as it has ranks.

    `threads` are those of each rank, by default the CPU's, divided among them. A rank that others wait for longer than
    `timeout` seconds ends them all. `memory` and `text_cache` are as of Pipeline; the ranks agree on one way. Any number of
    threads may call `generate`: one is served at a time. Close it, or use it in
    a `with` statement; ranks end with it.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: Target,
        *,
        threads: int | None = None,
        timeout: float = 600.0,
        memory: Memory = "auto",
        text_cache: int = TEXT_CACHE,
    ) -> None:
        self.bundle, self.target = bundle, target
        threads = None if threads is None else check_threads(threads)
        self.notes: list[str] = []
        self._holding: tuple[Memory, int] = (memory, text_cache)
        self._turns = Turns()
        self._encoder: PromptEncoder | None = None
        self._calls_back = False
        self._answers: dict[int, dict[str, Any]] = {}
        self._progress = ""
        self._ranks: list[_Rank] = []
        self._logs = ExitStack()
        self._finalizer = weakref.finalize(self, _end, self._ranks, self._logs)
        half = -(-_largest_exchange(bundle, target) // 64) * 64
        try:
            with _common_memory(2 * target.gpus * half) as common:
                self._start(common.fileno(), half, threads or max(1, usable_cores() // target.gpus), timeout)
            self._send({"manifest": msgspec.json.encode(bundle.manifest)})
            self._wait("ready")
        except BaseException:
            self._end_ranks()
            raise

    def __enter__(self) -> RankedPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def processes(self) -> list[int]:
        """The ids of the ranks' processes, in order; none once they are ended."""
        return [rank.process.pid for rank in self._ranks]

    def __call__(self, prompt: str | list[str], **options: Any) -> Result:
        """`generate` with a Request of this prompt or these prompts, and of its other fields by name."""
        return self.generate(Request(prompt, **options))

    def generate(self, request: Request, on_step: OnStep | None = None, on_image: OnImage | None = None) -> Result:
        """One image a prompt, as Pipeline does; RankError, naming the rank, where one fails.

        What on_step or on_image raise ends the request. The ranks finish its image, and the next request waits for that.
        """
        with self._turns.turn():
            if self._encoder is None:
                self._encoder = load_encoder(self.bundle)
            found = resolve(self.bundle, self.target, request, self._encoder)
            try:
                return self._generate(request, found, on_step, on_image)
            except RequestError:
                raise
            except BaseException:
                # Anything else may have stopped in the middle of a message.
                if not self._calls_back:
                    self._end_ranks()
                raise
            finally:
                self._calls_back = False

    def _generate(self, request: Request, found: Resolved, on_step: OnStep | None, on_image: OnImage | None) -> Result:
        # An image that an earlier request gave up.
        self._collect("done")
        chosen = self._ask("memory", request=request.encode())
        say_memory(chosen["staged"], chosen["why"])
        made = _Made()
        if chosen["staged"]:
            self._generate_in_turns(request, found, made, on_step, on_image)
        else:
            for numbers in found.groups:

                def step(done: int, total: int, before: int = numbers.start * found.steps) -> None:
                    if on_step:
                        on_step(before + done, found.steps * len(found.tokens))

                self._add(made, self._ask("images", step, request=request.of_images(numbers).encode()))
                self._give(made, on_image)
        return Result(made.images, made.seconds, made.skipped, found.notes, self.target.name)

    def _generate_in_turns(
        self, request: Request, found: Resolved, made: _Made, on_step: OnStep | None, on_image: OnImage | None
    ) -> None:
        """As Pipeline does where components take turns: the text of all images, their steps, then all images."""

        def decode() -> None:
            while len(made.images) < len(made.skipped):
                self._add(made, self._ask("decode"))
                self._give(made, on_image)

        self._add(made, self._ask("texts", request=request.encode()))
        try:
            for numbers in found.groups:
                self._add(made, self._ask("steps", on_step, images=[numbers.start, numbers.stop]))
            decode()
        except BaseException:
            self._rescue(decode if on_image else None, made)
            raise

    def _add(self, made: _Made, answer: dict[str, Any]) -> None:
        """Add what a stage came to."""
        self.notes = answer["backend_notes"]
        for what, took in answer["seconds"].items():
            made.seconds[what] = made.seconds.get(what, 0.0) + took
        made.skipped += [tuple(skipped) for skipped in answer.get("skipped", ())]
        for plain in answer.get("images", ()):
            made.add(plain)

    def _give(self, made: _Made, on_image: OnImage | None) -> None:
        """Hand over the images that were not yet."""
        for number in range(made.given, len(made.images)):
            made.given = number + 1
            if on_image:
                self._call_back(on_image, number, made.images[number], made.skipped[number])

    def _rescue(self, decode: Callable[[], None] | None, made: _Made) -> None:
        """After what ended the steps of a request: decode the images that have made theirs, if the ranks can be asked to, or
        say that they are lost."""
        if decode is None or len(made.skipped) == len(made.images):
            return
        # What on_step raised leaves the ranks in good order, in the middle of an image; on_image has refused to take one.
        was_callback = self._calls_back
        was_step = was_callback and not made.images
        if was_step:
            self._calls_back = False
            self._collect("done")
        rescue(decode if was_step else None, len(made.skipped) - len(made.images))
        self._calls_back = was_callback

    def _ask(self, stage: str, on_step: OnStep | None = None, **more: Any) -> dict[str, Any]:
        """Rank 0's answer when every rank has done `stage`."""
        self._send({"stage": stage, **more})
        return self._wait("done", on_step)[0]

    def _call_back(self, call: Callable[..., None], *arguments: Any) -> None:
        """Call something of the caller's: what it raises is not the ranks' fault."""
        self._calls_back = True
        call(*arguments)
        self._calls_back = False

    def close(self) -> None:
        """End the ranks, when the request that is being served has returned."""
        with self._turns.turn():
            self._end_ranks()

    def _end_ranks(self) -> None:
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
                holding=self._holding[0],
                text_cache=self._holding[1],
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
        self._answers, self._progress = {}, ""
        for rank in self._ranks:
            try:
                rank.channel.send(message)
            except OSError:
                self._fail(rank, None)

    def _wait(self, kind: str, on_step: OnStep | None = None) -> list[dict[str, Any]]:
        """Every rank's message of this kind, in order of rank; RequestError where they refused."""
        self._collect(kind, on_step)
        refused = [message["text"] for message in self._answers.values() if message["kind"] == "refused"]
        if refused:
            raise RequestError(refused[0])
        return [self._answers[rank.number] for rank in self._ranks]

    def _collect(self, kind: str, on_step: OnStep | None = None) -> None:
        """Read until every rank has answered what it was last asked."""
        if not self._ranks:
            raise RankError("the ranks of this pipeline are ended; load the bundle again")
        with selectors.DefaultSelector() as selector:
            for rank in self._ranks:
                selector.register(rank.channel, selectors.EVENT_READ, rank)
            while len(self._answers) < len(self._ranks):
                for key, _ in selector.select(timeout=0.25):
                    rank = key.data
                    message = self._receive(rank)
                    if message["kind"] in (kind, "refused"):
                        self._answers[rank.number] = message
                    elif message["kind"] == "step" and rank.number == 0:
                        self._progress = f"at step {message['done']} of {message['total']}"
                        if on_step:
                            self._call_back(on_step, message["done"], message["total"])
                for rank in self._ranks:
                    hangs = rank.hangs()
                    if hangs:
                        self._fail(rank, hangs)

    def _receive(self, rank: _Rank) -> dict[str, Any]:
        try:
            message = rank.channel.receive()
        except TimeoutError:
            self._fail(rank, "stopped in the middle of a message")
        rank.heard = time.monotonic()
        if message is None:
            self._fail(rank, None)
        if message["kind"] == "quiet":
            rank.be_quiet(message["what"], message["seconds"])
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
        self._end_ranks()
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
    images = max(sampling.compiled_batches)
    sizes = sizes_of(2 if sampling.cfg_batch else 1, (1, tokens), images)

    def nbytes(shape: tuple[int | str, ...], dtype: str) -> int:
        count = BYTES[dtype]
        for dimension in shape:
            count *= dimension_size(dimension, sizes)
        return count

    exchanged = [nbytes(part.shape, part.dtype) for part in sharding.body if not isinstance(part, str)]
    text = sharding.ranks * nbytes(target.input("text_shard").shape, "float32")
    return max([4096, text, 4 * images * tokens * sampling.latent_channels, *exchanged])


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


def _cpu_ticks(pid: int) -> int:
    """CPU time a process has used, in ticks; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])
