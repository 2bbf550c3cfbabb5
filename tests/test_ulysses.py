"""Ulysses on a CPU: N ranks' graphs against the whole graph, N processes against one, and what happens when one is lost."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from PIL import Image

import fluxrt
from conftest import NANO, compile_into, copy_checkpoint, exported
from fluxc.base.errors import BuildError, RecipeError
from fluxc.fidelity.metrics import psnr
from fluxc.graph import LINEAR_DOMAIN
from fluxc.graph.compose import compose_body
from fluxc.graph.ulysses import COLLECTIVE_DOMAIN, Exchange, hide_padding, shard, split_at_exchanges
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.recipe.load import load_recipe
from fluxc.targets.sharding import shards_of
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.choose import choose
from fluxrt.group import Group, PeerError
from fluxrt.manifest import dimension_size
from fluxrt.pipeline import Pipeline
from fluxrt.ranked import RankedPipeline, RankError
from fluxrt.request import Request
from fluxrt.sharding import Shard
from quick import QUICK
from ranks import groups, on_every_rank

CONFIG: dict[str, Any] = json.loads((NANO / "transformer" / "config.json").read_text())
SMALL = CONFIG | {"num_layers": 1, "num_single_layers": 2}
MODEL = Flux2Transformer.read(SMALL)
TEXT, BRANCHES = 32, 2
PROMPTS = ("a large red circle at the left on a white background", "a small blue ring at the top on a black background")
RECIPE = NANO.parent.parent / "recipes" / "flux2-nano.yaml"


# The graphs.


class World:
    """What ranks in threads exchange: a barrier before and after every collective."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.given = threading.Barrier(ranks, timeout=60), [np.empty(0)] * ranks
        self.me = threading.local()
        self.exchanged = 0


def all_to_all(world: World) -> type[OpRun]:
    class DistCollective(OpRun):
        op_domain = COLLECTIVE_DOMAIN

        def _run(self, x: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
            assert attributes["collective_operation"] == "all_to_all"
            assert attributes["nb_rank"] == len(world.given) == len(x)
            world.given[world.me.rank] = x
            world.barrier.wait()
            got = np.stack([given[world.me.rank] for given in world.given])
            world.exchanged += x.nbytes if world.me.rank == 0 else 0
            world.barrier.wait()
            return (got,)

    return DistCollective


def evaluate(
    model: onnx.ModelProto, feeds: dict[str, np.ndarray], weights: dict[str, np.ndarray], world: World | None = None
) -> dict[str, np.ndarray]:
    """A neutral graph in ONNX's reference evaluator."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.graph.node[:]
    for node in model.graph.node:
        if node.domain == LINEAR_DOMAIN:
            turned = f"{node.output[0]}/turned"
            plain.graph.node.append(helper.make_node("Transpose", [node.input[1]], [turned], perm=[1, 0]))
            node = helper.make_node("MatMul", [node.input[0], turned], list(node.output))
        plain.graph.node.append(node)
    plain.opset_import.append(helper.make_opsetid(COLLECTIVE_DOMAIN, 1))
    evaluator = ReferenceEvaluator(plain, new_ops=[all_to_all(world)] if world else [])
    given = {value.name: weights.get(value.name, feeds.get(value.name)) for value in model.graph.input}
    return dict(zip([value.name for value in model.graph.output], evaluator.run(None, given), strict=True))


def random_weights(*models: onnx.ModelProto) -> dict[str, np.ndarray]:
    generator, weights = np.random.default_rng(0), {}
    for value in (value for model in models for value in model.graph.input if "." in value.name):
        shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        values = generator.standard_normal(shape) / (math.sqrt(shape[-1]) if len(shape) > 1 else 4)
        weights.setdefault(value.name, (values + (len(shape) == 1)).astype(np.float32))
    return weights


def traced_part(ranks: int) -> dict[str, onnx.ModelProto]:
    return exported("transformer", SMALL, TEXT // ranks, cfg_batch=True, part=True)


@pytest.fixture(scope="module")
def whole() -> dict[str, onnx.ModelProto]:
    pieces = exported("transformer", SMALL, TEXT, cfg_batch=True)
    return pieces | {"body": compose_body(pieces, SMALL["num_layers"], SMALL["num_single_layers"], TEXT)}


def of_one_rank(ranks: int, padded: bool) -> dict[str, onnx.ModelProto]:
    pieces = traced_part(ranks)
    body = compose_body(pieces, SMALL["num_layers"], SMALL["num_single_layers"], TEXT // ranks)
    signal = hide_padding(pieces["signal"]) if padded else pieces["signal"]
    return pieces | {"body": shard(body, MODEL, ranks, padded), "signal": signal}


def feeds_of(tokens: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)

    def random(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    return {
        "latents": random(1, tokens, CONFIG["in_channels"]),
        "text": random(BRANCHES, TEXT, CONFIG["joint_attention_dim"]),
        "previous_signal": random(1, tokens, 128),
        "sigma": np.float32(0.7),
        "next_sigma": np.float32(0.6),
        "guidance": np.float32(1.5),
        "columns": np.int64(6),
    }


@pytest.mark.parametrize(("ranks", "tokens"), [(2, 36), (4, 35), (2, 7)])
def test_n_ranks_compute_what_one_does(whole: dict[str, onnx.ModelProto], ranks: int, tokens: int) -> None:
    """Prologue, body, signal and epilogue of N ranks in ONNX's reference evaluator, a barrier at every collective."""
    weights = random_weights(*(whole[name] for name in ("prologue", "body", "epilogue")))
    expected = feeds_of(tokens)
    for name in ("prologue", "body", "epilogue", "signal"):
        expected |= evaluate(whole[name], expected, weights)
    part = of_one_rank(ranks, padded=tokens % ranks > 0)
    world, results = World(ranks), [dict[str, np.ndarray]()] * ranks

    def run(rank: int) -> None:
        world.me.rank = rank
        held = Shard(rank, ranks, tokens, TEXT // ranks)
        feeds = feeds_of(tokens)
        feeds["text_shard"] = held.text_parts(feeds["text"])[rank]
        feeds |= {name: held.image(feeds[name]) for name in ("latents", "previous_signal")}
        feeds |= {"first_token": np.int64(held.first_token), "first_text": np.int64(held.first_text)}
        feeds |= {"keys": held.keys(), "image_tokens": held.is_token()}
        for name in ("prologue", "body", "epilogue", "signal"):
            feeds |= evaluate(part[name], feeds, weights, world)
        results[rank] = feeds

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = Shard(0, ranks, tokens, TEXT // ranks)
    for name in ("residual", "next_latents"):
        ours = held.whole([result[name] for result in results])
        assert np.abs(ours - expected[name]).max() < 3e-6 * np.abs(expected[name]).max()
    np.testing.assert_allclose(sum(r["change"] for r in results), expected["change"], rtol=1e-5)
    # docs/multi-gpu.md: four activations of width D a block, for this rank's tokens.
    blocks = SMALL["num_layers"] + SMALL["num_single_layers"]
    assert world.exchanged == blocks * 4 * BRANCHES * (held.tokens + TEXT // ranks) * 128 * 4
    # What `plan` says, and what predictions of the time of exchanges are made from.
    assert shards_of(ranks, (64, 64), tokens, MODEL, TEXT, BRANCHES, 4).exchanged_bytes == world.exchanged


def test_the_cut_body_is_the_same_nodes_and_every_exchange_is_described() -> None:
    body = of_one_rank(4, padded=True)["body"]
    parts = split_at_exchanges(body)
    graphs = [part for part in parts if not isinstance(part, Exchange)]
    exchanges = [part for part in parts if isinstance(part, Exchange)]
    blocks = SMALL["num_layers"] + SMALL["num_single_layers"]
    assert len(exchanges) == 2 * blocks == len(graphs) - 1
    kept = [node.op_type for graph in graphs for node in graph.graph.node]
    assert kept == [node.op_type for node in body.graph.node if node.op_type != "DistCollective"]
    for number, exchange in enumerate(exchanges):
        shape = [d.dim_param or d.dim_value for d in exchange.sends.type.tensor_type.shape.dim]
        heads = CONFIG["num_attention_heads"] // 4
        tokens = [f"tokens + {TEXT // 4}", CONFIG["attention_head_dim"]]
        assert shape == ([4, 3, "batch", heads, *tokens] if number % 2 == 0 else [4, "batch", heads, *tokens])
    for graph in graphs:
        onnx.checker.check_model(onnx.shape_inference.infer_shapes(graph), full_check=False)


def test_heads_and_masks_that_cannot_be_divided_are_refused(whole: dict[str, onnx.ModelProto]) -> None:
    with pytest.raises(BuildError, match="4 heads cannot be divided among 3 ranks"):
        shard(whole["single_block"], Flux2Transformer.read(CONFIG), 3)
    masked = onnx.ModelProto()
    masked.CopyFrom(whole["single_block"])
    next(node for node in masked.graph.node if node.op_type == "Attention").input.append("mask")
    with pytest.raises(BuildError, match="has a mask"):
        shard(masked, Flux2Transformer.read(CONFIG), 2)


@pytest.mark.parametrize(("ranks", "total"), [(1, 5), (2, 7), (4, 64), (4, 49), (4, 5), (8, 3)])
def test_a_shard_is_what_slicing_by_hand_gives(ranks: int, total: int) -> None:
    tokens, text = np.arange(1.0, total + 1).reshape(1, total, 1), 2
    shards = [Shard(rank, ranks, total, text) for rank in range(ranks)]
    parts = [held.image(tokens) for held in shards]
    assert {part.shape for part in parts} == {(1, math.ceil(total / ranks), 1)}
    assert np.array_equal(shards[0].whole(parts), tokens)
    sequence = [value for part in parts for value in [9.0] * text + part.ravel().tolist()]
    assert [at for at, value in enumerate(sequence) if value] == shards[0].keys().tolist()
    assert sum(held.is_token().sum() for held in shards) == total


# Groups.


def test_collectives_of_three_ranks() -> None:
    def work(group: Group) -> list[Any]:
        me = group.rank
        return [
            group.all_to_all(np.arange(3, dtype=np.float32)[:, None] + 10 * me),
            group.gather(np.array([me], np.int64)),
            group.scatter(np.arange(6, dtype=np.float32).reshape(3, 2) if me == 0 else None, (2,)),
            group.sum(np.array([0.1 * me], np.float32)),
            group.broadcast(b"together" if me == 0 else None)[:8],
        ]

    for me, (exchanged, gathered, scattered, summed, agreed) in enumerate(on_every_rank(3, work)):
        assert exchanged.ravel().tolist() == [me, 10 + me, 20 + me]
        assert [int(part[0]) for part in gathered] == [0, 1, 2]
        assert scattered.tolist() == [2 * me, 2 * me + 1]
        assert summed.tolist() == [float(np.float32(0.1)) + float(np.float32(0.2))]
        assert agreed == b"together"


def test_a_thousand_exchanges_never_mix() -> None:
    """Ranks that run ahead must not overwrite what another still reads."""

    def work(group: Group) -> bool:
        generator = np.random.default_rng(group.rank)
        for turn in range(1000):
            if generator.random() < 0.02:
                time.sleep(0.001)
            got = group.all_to_all(np.full((3, 50), 3 * turn + group.rank, np.float32))
            if not (got == (3 * turn + np.arange(3))[:, None]).all():
                return False
        return True

    assert on_every_rank(3, work) == [True] * 3


def test_a_rank_that_is_gone_late_or_elsewhere_is_named() -> None:
    here, there = groups(2, timeout=0.2)
    with pytest.raises(PeerError, match=r"rank 1 did not come to exchange 0 within 0\.2 s"):
        here.sum(np.zeros(1))
    there._peers[0].close()
    with pytest.raises(PeerError, match="rank 1 is gone"):
        here.sum(np.zeros(1))


# Processes.


@pytest.fixture(scope="module")
def bundle(workshop: Path) -> Bundle:
    """flux2-nano for one, two and four processes, at 64 and at 49 image tokens, with a step cache of 4 in 10 steps."""
    targets = (
        "targets=[{kind: onnxruntime, compute: exact}, {kind: onnxruntime, compute: exact, gpus: 2}, "
        "{kind: onnxruntime, compute: exact, gpus: 4}, "
        "{kind: onnxruntime, activations: nvfp4}, {kind: onnxruntime, activations: nvfp4, gpus: 2}]"
    )
    changes = (
        "sizes=[[64, 64], [56, 56]]",
        "sampling.steps=10",
        "calibration.steps=3",
        "step_cache={skip: 4, mode: dynamic, on_mismatch: allow, prompts: prompts/flux2-nano-calibration.txt, frontier: []}",
    )
    return open_bundle(compile_into(workshop / "ranks", *QUICK, *changes, targets))


def latents_of(bundle: Bundle, target: str, **request: Any) -> tuple[np.ndarray, list[list[int]]]:
    """The final fp32 latents of one image, and what every rank skipped."""

    def work(group: Group | None) -> tuple[np.ndarray, list[int]]:
        pipeline = Pipeline(bundle, target=target, threads=1, group=group)
        result = pipeline.generate(Request(PROMPTS[0], seed=5, **request))
        return pipeline.latents(), list(result.skipped[0])

    ranks = bundle.target(target).gpus
    found = on_every_rank(ranks, work) if ranks > 1 else [work(None)]
    assert all(np.array_equal(latents, found[0][0]) for latents, _ in found)
    return found[0][0], [skipped for _, skipped in found]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "request_",
    [{}, {"step_cache": False}, {"size": (56, 56)}, {"guidance": 1.0}, {"steps": 4}],
    ids=["step cache", "every step", "odd tokens", "no guidance", "4 steps"],
)
def test_images_of_n_ranks_are_those_of_one(bundle: Bundle, ranks: int, request_: dict[str, Any]) -> None:
    """At 60 dB and better in fp32, with the same steps skipped by the rule on every rank."""
    whole, (skipped,) = latents_of(bundle, "onnxruntime-exact", **request_)
    ours, theirs = latents_of(bundle, f"onnxruntime-exact-{ranks}gpus", **request_)
    assert ours.shape == whole.shape
    assert theirs == [skipped] * ranks
    if "step_cache" in request_:
        assert skipped == []
    elif "steps" not in request_:
        assert len(skipped) >= 2
    grid = (7, 7) if "size" in request_ else (8, 8)
    pipeline = Pipeline(bundle, target="onnxruntime-exact")
    images = [pipeline.decode(latents, grid)[0] for latents in (ours, whole)]
    assert psnr(*images) >= 60
    assert np.abs(ours - whole).max() < 1e-3


def test_rounded_inputs_are_the_same_codes_on_a_rank(bundle: Bundle) -> None:
    """A block of 16 values lies in one token, and the scale is static: a rank rounds its tokens as one process does."""
    whole, _ = latents_of(bundle, "onnxruntime-nvfp4", step_cache=False, steps=1)
    ours, _ = latents_of(bundle, "onnxruntime-nvfp4-2gpus", step_cache=False, steps=1)
    # A code that fell the other way moves its token by a hundredth and more; rounding of fp32 sums alone does not.
    moved = np.abs(ours - whole).max(axis=(0, 2))
    assert np.median(moved) < 1e-3
    pipeline = Pipeline(bundle, target="onnxruntime-exact")
    # Which codes are so near to a tie depends on the processor.
    assert psnr(*(pipeline.decode(latents, (8, 8))[0] for latents in (ours, whole))) >= 40


def test_the_build_held_n_processes_against_one(bundle: Bundle) -> None:
    report = json.loads((bundle.root / "report" / "report.json").read_text())
    assert report["ranks"].keys() == {"onnxruntime-exact-2gpus", "onnxruntime-exact-4gpus", "onnxruntime-nvfp4-2gpus"}
    assert report["ranks"]["onnxruntime-exact-4gpus"]["against"] == "onnxruntime-exact"
    assert report["ranks"]["onnxruntime-exact-4gpus"]["image_psnr_db_worst"] > 55
    assert report["not_run"] == []
    assert "onnxruntime-exact-4gpus" in (bundle.root / "report" / "index.html").read_text()


def test_the_command_line_generates_with_processes(bundle: Bundle, tmp_path: Path) -> None:
    """The same PNG to one step of 255, and the same steps skipped."""
    written = {}
    for arguments in ((), ("--gpus", "4"), ("--target", "onnxruntime-exact-2gpus")):
        out = tmp_path / f"{len(written)}.png"
        command = [sys.executable, "-m", "fluxrt", "generate", str(bundle.root), "--out", str(out), *arguments]
        done = subprocess.run(
            [*command, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        images = [np.asarray(Image.open(tmp_path / f"{out.stem}-{n}.png"), int) for n in range(2)]
        written[arguments] = (
            images,
            [line.partition(": ")[2] for line in done.stderr.splitlines() if "skip" in line],
        )
    (first, skipped), *others = written.values()
    for images, also in others:
        assert [line.partition(": ")[2] for line in also] == [line.partition(": ")[2] for line in skipped] != []
        assert max(np.abs(a - b).max() for a, b in zip(images, first, strict=True)) <= 1


def test_ranks_serve_many_requests_and_refuse_what_one_refuses(bundle: Bundle) -> None:
    whole = Pipeline(bundle, target="onnxruntime-exact")
    with fluxrt.load(bundle.root, gpus=2, threads=1) as pipeline:
        assert isinstance(pipeline, RankedPipeline)
        with pytest.raises(fluxrt.RequestError, match="size 128x128"):
            pipeline.generate(Request(PROMPTS[0], size=(128, 128)))
        noise = np.random.default_rng(3).standard_normal((1, 64, 32)).astype(np.float32)
        seen = []
        for request in ({"seed": 3}, {"latents": noise, "steps": 3}, {"size": (56, 56), "steps": 2}):
            ours = pipeline.generate(Request(PROMPTS[0], **request), lambda done, total: seen.append((done, total)))
            theirs = whole.generate(Request(PROMPTS[0], **request))
            assert np.abs(np.asarray(ours.images[0], int) - np.asarray(theirs.images[0], int)).max() <= 1
            assert ours.skipped == theirs.skipped
            assert ours.seconds.keys() == theirs.seconds.keys()
        assert seen == [*((n, 10) for n in range(1, 11)), (1, 3), (2, 3), (3, 3), (1, 2), (2, 2)]
    with pytest.raises(RankError, match="ended"):
        pipeline.generate(Request(PROMPTS[0]))


def test_a_target_is_found_by_its_gpus_or_refused(bundle: Bundle) -> None:
    assert choose(bundle, gpus=2)[0].name == "onnxruntime-exact-2gpus"
    with pytest.raises(
        fluxrt.RequestError, match="no target of this bundle is for 3 GPUs; it has onnxruntime-exact for 1"
    ):
        fluxrt.load(bundle.root, gpus=3)
    with pytest.raises(fluxrt.RequestError, match="'onnxruntime-exact-2gpus' is for 2 GPUs, not 4"):
        fluxrt.load(bundle.root, gpus=4, target="onnxruntime-exact-2gpus")
    with pytest.raises(fluxrt.RequestError, match="--gpus 2"):
        Pipeline(bundle, target="onnxruntime-exact-2gpus")


def test_eight_ranks_of_a_random_model_with_eight_heads(tmp_path: Path) -> None:
    """A transformer of other weights, 8 heads of 16, on 8 ranks, 49 tokens among them: the last rank holds none."""
    import torch
    from diffusers import Flux2Transformer2DModel

    checkpoint = copy_checkpoint(tmp_path / "random")
    torch.manual_seed(0)
    shape = {"num_attention_heads": 8, "attention_head_dim": 16, "axes_dims_rope": [4, 4, 4, 4]}
    config = CONFIG | shape | {"num_layers": 1, "num_single_layers": 1}
    model = Flux2Transformer2DModel.from_config(config).to(torch.bfloat16)
    for file in (checkpoint / "transformer").iterdir():
        file.unlink()
    model.save_pretrained(checkpoint / "transformer")
    targets = "targets=[{kind: onnxruntime, compute: exact}, {kind: onnxruntime, compute: exact, gpus: 8}]"
    changes = (f"model.source={checkpoint}", "sizes=[[56, 56]]", "precision.transformer={default: bf16}", targets)
    bundle = open_bundle(compile_into(tmp_path / "bundle", *QUICK, *changes))
    whole, _ = latents_of(bundle, "onnxruntime-exact")
    ours, _ = latents_of(bundle, "onnxruntime-exact-8gpus")
    assert ours.shape == (1, 49, 32)
    assert np.abs(ours - whole).max() < 1e-4 * np.abs(whole).max()


def test_what_a_step_exchanges_is_what_the_docs_say(bundle: Bundle) -> None:
    target = bundle.target("onnxruntime-exact-4gpus")
    sizes = {"batch": 2, "tokens": 13}
    exchanged = [part for part in target.sharding.body if not isinstance(part, str)]
    assert len(exchanged) == 2 * (CONFIG["num_layers"] + CONFIG["num_single_layers"])
    total = sum(4 * math.prod(dimension_size(d, sizes) for d in part.shape) for part in exchanged)
    blocks = CONFIG["num_layers"] + CONFIG["num_single_layers"]
    assert total == blocks * 4 * 2 * (13 + TEXT // 4) * 128 * 4


# What goes wrong.


@contextmanager
def started(bundle: Bundle) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """`fluxrt generate` on two ranks, in the middle of its steps, and its ranks' processes; all are ended after.

    A command in the background of a script inherits that SIGINT is ignored, so it is set here.
    """
    command = [sys.executable, "-m", "fluxrt", "generate", str(bundle.root), "--gpus", "2", "--steps", "5000"]
    out = str(bundle.root.parent / "never.png")
    process = subprocess.Popen(
        [*command, "--no-step-cache", "--prompt", PROMPTS[0], "--out", out],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    ranks: list[int] = []
    try:
        until = time.monotonic() + 120
        # Once both wait for each other in turn they have used some CPU time after loading.
        while not (len(ranks) == 2 and all(ticks(rank) > 150 for rank in ranks)):
            assert time.monotonic() < until, "the ranks did not start"
            assert process.poll() is None
            time.sleep(0.05)
            ranks = children(process.pid)
        yield process, ranks
    finally:
        for pid in (process.pid, *ranks):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return sorted(int(child) for child in listed.read_text().split()) if listed.exists() else []


def ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("sent", "said"),
    [(signal.SIGKILL, "was ended by SIGKILL at step"), (signal.SIGSTOP, "gave no sign of life for 5 s at step")],
)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_ends_the_command(bundle: Bundle, sent: signal.Signals, said: str, victim: int) -> None:
    """Within 10 seconds, by name, with no process and no shared memory left."""
    before = set(Path("/dev/shm").iterdir())
    with started(bundle) as (process, ranks):
        os.kill(ranks[victim], sent)
        _, told = process.communicate(timeout=10)
        assert process.returncode == 1
        assert f"rank {victim} of 2 (process {ranks[victim]}) {said}" in told
        assert not any(is_alive(rank) for rank in ranks)
    assert set(Path("/dev/shm").iterdir()) <= before
    assert not (bundle.root.parent / "never.png").exists()


HOLDS = """\
import ctypes
from fluxrt import sharding
put = sharding.ShardedRank.put_shard
def held(self, backend):
    with self._group.together("a call of this test", {seconds}):
        # PyDLL keeps Python's lock, so that no thread sends a sign of life.
        ctypes.PyDLL(None).sleep(3)
    put(self, backend)
sharding.ShardedRank.put_shard = held
"""


@pytest.mark.parametrize("seconds", [60.0, 1.0])
def test_ranks_that_announce_it_may_be_quiet(
    bundle: Bundle, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as they said and no longer: joining a communicator stops every thread of a rank."""
    (tmp_path / "sitecustomize.py").write_text(HOLDS.format(seconds=seconds))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("fluxrt.ranked.STALL", 1.0)
    with fluxrt.load(bundle.root, gpus=2, threads=1) as pipeline:
        if seconds == 1.0:
            with pytest.raises(RankError, match=r"rank \d of 2 .* waited longer than 1 s for a call of this test"):
                pipeline.generate(Request(PROMPTS[0], steps=1))
        else:
            assert pipeline.generate(Request(PROMPTS[0], steps=1)).images


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_their_command(bundle: Bundle, sent: signal.Signals) -> None:
    with started(bundle) as (process, ranks):
        process.send_signal(sent)
        process.communicate(timeout=10)
        until = time.monotonic() + 5
        while time.monotonic() < until and any(is_alive(rank) for rank in ranks):
            time.sleep(0.05)
        assert not any(is_alive(rank) for rank in ranks)
    assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL)


def test_a_rank_that_cannot_load_says_why(bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(bundle.root, tmp_path / "copy"))
    graph = copy / open_bundle(copy).target("onnxruntime-exact-2gpus").graphs["body-1"].file
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(data)
    with (
        fluxrt.load(copy, gpus=2) as pipeline,
        pytest.raises(RankError, match=r"rank \d of 2 .*its SHA-256 is not the one in bundle.json"),
    ):
        pipeline.generate(Request(PROMPTS[0]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["targets=[{kind: onnxruntime}, {kind: onnxruntime, gpus: 3}]"],
            r"among 3 GPUs the 4 attention heads cannot be shared equally, the 32 text tokens cannot",
        ),
        (["targets=[{kind: onnxruntime}, {kind: onnxruntime, gpus: 8}]"], "can be sharded for 1, 2, 4, or"),
        (
            ["targets=[{kind: tensorrt_rtx, gpus: 2}]", "sizes=[[56, 56]]"],
            "the 49 image tokens of 56x56 cannot be shared",
        ),
        (
            ["targets=[{kind: tensorrt_rtx, gpus: 4}]"],
            "of 4 attention heads each would have one, .* for 1, 2, or take other",
        ),
    ],
)
def test_what_n_gpus_cannot_share_is_refused_before_a_build(tmp_path: Path, changes: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        compile_into(tmp_path / "bundle", *QUICK, *changes)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("{kind: onnxruntime, gpus: 0}", "must be at least 1"),
        ("{kind: onnxruntime, device: cuda, gpus: 2}", "has no collectives for device: cuda"),
        ("{kind: onnxruntime, gpus: 2}", "add the same target without gpus"),
    ],
)
def test_targets_that_make_no_sense_are_refused(target: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(RECIPE, [f"targets=[{target}]"])
