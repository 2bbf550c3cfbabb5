"""One rank's process: started by RankedPipeline with everything it needs to know as JSON in its first argument."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from fluxrt.channel import Channel
from fluxrt.errors import FluxError, RequestError
from fluxrt.group import Group, PeerError
from fluxrt.memory import Memory
from fluxrt.texts import TEXT_CACHE

HEARTBEAT = 0.5
"""Seconds between signs of life."""


@dataclass(frozen=True)
class Start:
    """Which rank this is; file descriptors of the command's channel, the common memory and the other ranks; the
    bundle's folder and what to load of it."""

    rank: int
    control: int
    memory: int
    half: int
    peers: dict[int, int]
    timeout: float
    root: str
    target: str
    threads: int
    holding: Memory = "auto"
    text_cache: int = TEXT_CACHE

    def to_json(self) -> str:
        return msgspec.json.encode(asdict(self)).decode()


def main(argument: str) -> int:
    """Load the bundle, then generate what the command asks for until it closes its end."""
    # The command ends its ranks itself when it is interrupted.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start = msgspec.json.decode(argument, type=Start)
    control = Channel(socket.socket(fileno=start.control))
    threading.Thread(target=_beat, args=(control,), daemon=True).start()
    try:
        pipeline = _load(start, control)
        control.send({"kind": "ready"})
        while (message := control.receive()) is not None:
            control.send(_answer(pipeline, message, control))
    except PeerError as error:
        return _report(control, "peer", error)
    except FluxError as error:
        return _report(control, "error", error)
    return 0


def _load(start: Start, control: Channel) -> Any:
    from fluxrt.bundle import Bundle
    from fluxrt.manifest import decode_manifest
    from fluxrt.pipeline import Pipeline

    # The manifest as the command read it, so that all ranks have the same.
    message = control.receive()
    if message is None:
        raise SystemExit(1)
    bundle = Bundle(Path(start.root), decode_manifest(message["manifest"]))

    peers = {rank: socket.socket(fileno=fd) for rank, fd in start.peers.items()}
    memory = mmap.mmap(start.memory, 2 * (len(peers) + 1) * start.half)

    def announce(what: str, seconds: float) -> None:
        control.send({"kind": "quiet", "what": what, "seconds": seconds})

    group = Group(start.rank, peers, memory, start.half, start.timeout, announce)
    return Pipeline(
        bundle,
        target=start.target,
        threads=start.threads,
        group=group,
        memory=start.holding,
        text_cache=start.text_cache,
    )


def _answer(pipeline: Any, message: dict[str, Any], control: Channel) -> dict[str, Any]:
    """Do one stage of a request: `memory` chooses how the model is held, `images` makes images at once, from their texts on;
    where components take turns they are `texts`, then for images at once `steps`, then for each image `decode`.

    Every rank refuses a request that the bundle cannot serve, before any exchange.
    """
    from fluxrt.request import decode_request

    def on_step(done: int, total: int) -> None:
        control.send({"kind": "step", "done": done, "total": total})

    answer: dict[str, Any] = {"kind": "done"}
    seconds = {"text": 0.0, "steps": 0.0, "decode": 0.0}
    try:
        if message["stage"] == "memory":
            answer["staged"], answer["why"] = pipeline.choose_memory(
                pipeline.resolve(decode_request(message["request"]))
            )
        elif message["stage"] == "images":
            result = pipeline.generate(decode_request(message["request"]), on_step)
            seconds, answer["skipped"] = result.seconds, result.skipped
            answer["images"] = [_plain(image) for image in result.images]
        elif message["stage"] == "texts":
            request = decode_request(message["request"])
            pipeline.encode_texts(request, pipeline.resolve(request), seconds)
        elif message["stage"] == "steps":
            numbers = range(*message["images"])
            answer["skipped"] = [pipeline.denoise_images(numbers, seconds, on_step)] * len(numbers)
        else:
            image = pipeline.decode_next(seconds)
            answer["images"] = [] if image is None else [_plain(image)]
    except RequestError as error:
        return {"kind": "refused", "text": str(error)}
    return answer | {"seconds": seconds, "backend_notes": pipeline.notes}


def _plain(image: Any) -> dict[str, Any]:
    return {"size": image.size, "data": image.tobytes()}


def _report(control: Channel, kind: str, error: FluxError) -> int:
    control.send({"kind": kind, "text": str(error)})
    return 1


def _beat(control: Channel) -> None:
    """Signs of life; a rank whose command is gone ends, whatever it is doing."""
    while True:
        try:
            control.send({"kind": "alive"})
        except OSError:
            os._exit(1)
        time.sleep(HEARTBEAT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
