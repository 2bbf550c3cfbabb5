"""The step cache on flux2-nano: a bundle's against its own full run, and the method against diffusers' caches, in one run.

    fluxc build recipes/flux2-nano-50-steps.yaml
    python benchmarks/step_cache.py artifacts/flux2-nano-50-steps
    fluxc build recipes/flux2-nano-dev-50-steps.yaml
    python benchmarks/step_cache.py artifacts/flux2-nano-dev-50-steps --diffusers-images 0     # the first table alone

First table: the bundle in fluxrt with every step, with its step cache, by its rule, and with fewer steps, in turn image by
image. Second table: diffusers' pipeline in fp32 with its First-Block Cache, MagCache and TaylorSeer beside our
schedule and rule put into the same pipeline, each set so that the blocks do about the same work as ours. PSNR is against the
full run of the same engine; the oracle reads colours and place from the images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "models" / "flux2-nano"
CHECKPOINTS = {"Flux2KleinPipeline": NANO, "Flux2Pipeline": NANO.with_name("flux2-nano-dev")}
"""By a bundle's family."""
sys.path[:0] = [str(NANO), str(ROOT / "tests")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=64, help="unseen prompts for the bundle (default 64)")
    parser.add_argument(
        "--diffusers-images", type=int, default=16, help="unseen prompts for the second table (0: none)"
    )
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {cores()} cores, Python {platform.python_version()}\n")
    print(table(bundle_rows(options.bundle, options.images)), flush=True)
    if options.diffusers_images:
        print(table(diffusers_rows(options.bundle, options.diffusers_images)))


def cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


def specs(count: int) -> list[Any]:
    from pictures import split_specs

    return split_specs()[1][:count]


def figures(
    name: str, computed: str, images: list[np.ndarray], full: list[np.ndarray], seconds: list[float], base: float
) -> list[str]:
    """A row: quality against the full run, oracle agreement, median seconds an image and the ratio to the full run."""
    from fluxc.fidelity.metrics import psnr, ssim
    from oracle import follows

    quality = ["", "", "", ""]
    if images is not full:
        psnrs = [psnr(ours, theirs) for ours, theirs in zip(images, full, strict=True)]
        ssims = [ssim(ours, theirs) for ours, theirs in zip(images, full, strict=True)]
        quality = [
            f"{np.mean(psnrs):.1f}",
            f"{np.percentile(psnrs, 5):.1f}",
            f"{min(psnrs):.1f}",
            f"{min(ssims):.5f}",
        ]
    right = sum(follows(image, spec) for image, spec in zip(images, specs(len(images)), strict=True))
    took = statistics.median(seconds)
    return [name, computed, *quality, f"{right}/{len(images)}", f"{took:.3f}", f"{base / took:.2f}x"]


HEADINGS = [
    "",
    "blocks' work",
    "PSNR, mean",
    "5th percentile",
    "worst",
    "SSIM, worst",
    "oracle",
    "s an image",
    "faster",
]


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[at]) for row in [HEADINGS, *rows]) for at in range(len(HEADINGS))]
    lines = [HEADINGS, ["-" * width for width in widths], *rows]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def bundle_rows(path: Path, count: int) -> list[list[str]]:
    """The bundle's own runtime: whole images, text encoding and decoding included."""
    import fluxrt

    pipeline = fluxrt.load(path)
    cache = pipeline.bundle.manifest.step_cache
    steps, skips = cache.steps, len(cache.schedule)
    requests: dict[str, dict[str, Any]] = {
        "every step": {"step_cache": False},
        f"this bundle ({cache.mode})": {},
        "its rule": {"threshold": cache.rule.threshold},
        f"{steps - skips} steps": {"steps": steps - skips, "step_cache": False},
        "34 steps": {"steps": 34, "step_cache": False},
    }
    images: dict[str, list[np.ndarray]] = {name: [] for name in requests}
    seconds: dict[str, list[float]] = {name: [] for name in requests}
    computed: dict[str, list[int]] = {name: [] for name in requests}
    pipeline.generate(fluxrt.Request("a red circle"))
    for number, spec in enumerate(specs(count)):
        for name, request in requests.items():
            began = time.perf_counter()
            generated = _float_image(pipeline, spec.caption(number % 3), number, request)
            seconds[name].append(time.perf_counter() - began)
            images[name].append(generated[0])
            computed[name].append(generated[1])
    full = images["every step"]
    base = statistics.median(seconds["every step"])
    return [
        figures(name, f"{np.mean(computed[name]) / steps:.3f}", images[name], full, seconds[name], base)
        for name in requests
    ]


def _float_image(pipeline: Any, prompt: str, seed: int, request: dict[str, Any]) -> tuple[np.ndarray, int]:
    """An image without the rounding to 8 bits, as Pipeline.generate makes it, and how many steps ran the body."""
    from fluxrt.pipeline import starting_noise
    from fluxrt.schedule import SCHEDULES
    from fluxrt.stepcache import decisions_for

    manifest = pipeline.bundle.manifest
    sampling, steps = manifest.sampling, request.get("steps", manifest.sampling.steps)
    grid = pipeline.grid(None)
    tokens = grid[0] * grid[1]
    enabled, threshold = request.get("step_cache"), request.get("threshold")
    decisions, _ = decisions_for(manifest.step_cache, steps, sampling.sizes[0], enabled, threshold)
    noise = starting_noise(seed, tokens, sampling.latent_channels)[None]
    words = pipeline.tokenize(pipeline.branches(prompt, sampling.guidance))
    pipeline.begin(noise, grid, sampling.guidance, words)
    skipped = list(pipeline.denoise(SCHEDULES[sampling.schedule](tokens, steps), decisions))
    return pipeline.decode(pipeline.backend.get("latents"), grid)[0], steps - sum(skipped)


class Work:
    """Multiplications done by the Linears of the blocks: what a cache saves."""

    def __init__(self, transformer: Any) -> None:
        from torch import nn

        self.done = 0
        for stack in (transformer.transformer_blocks, transformer.single_transformer_blocks):
            for module in stack.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(self._count)

    def _count(self, module: Any, inputs: Any, output: Any) -> None:
        self.done += output.numel() * module.in_features

    def take(self) -> int:
        done, self.done = self.done, 0
        return done


class Skipper:
    """Our step cache in diffusers' transformer: blocks hand on what they get, the last residual is put in after them."""

    def __init__(self, transformer: Any, steps: int, decide: Callable[[], Any]) -> None:
        self.model, self.steps, self.decide = transformer, steps, decide
        self.originals: list[tuple[Any, Any]] = []
        self.handles: list[Any] = []

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        import torch

        for block in self.model.transformer_blocks:
            self._replace(block, lambda kwargs: (kwargs["encoder_hidden_states"], kwargs["hidden_states"]))
        for block in self.model.single_transformer_blocks:
            self._replace(block, lambda kwargs: kwargs["hidden_states"])
        eps = self.model.config.eps

        def on_first(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
            hidden = self.hidden = kwargs["hidden_states"]
            step, branch = divmod(self.calls, 2)
            if branch == 0:
                width = hidden.shape[-1]
                modulation = kwargs["temb_mod_img"].reshape(1, 1, -1)
                plain = torch.nn.functional.layer_norm(hidden, (width,), eps=eps)
                signal = plain * (1 + modulation[..., width : 2 * width]) + modulation[..., :width]
                change = None
                if self.signal is not None:
                    change = float((signal - self.signal).abs().mean() / self.signal.abs().mean())
                self.signal = signal
                self.skips = self.decisions.skip(step, change)

        def on_output(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            branch = self.calls % 2
            self.calls += 1
            if not self.skips:
                self.residuals[branch] = args[0] - self.hidden
            return (self.hidden + self.residuals[branch], *args[1:])

        self.handles = [
            self.model.transformer_blocks[0].register_forward_pre_hook(on_first, with_kwargs=True),
            self.model.norm_out.register_forward_pre_hook(on_output),
        ]
        try:
            yield
        finally:
            for handle in self.handles:
                handle.remove()
            for block, forward in self.originals:
                block.forward = forward

    def begin(self) -> None:
        self.calls, self.signal, self.skips = 0, None, False
        self.residuals: dict[int, Any] = {}
        self.decisions = self.decide()

    def _replace(self, block: Any, pass_on: Callable[[dict[str, Any]], Any]) -> None:
        original = block.forward
        self.originals.append((block, original))
        block.forward = lambda *args, **kwargs: pass_on(kwargs) if self.skips else original(*args, **kwargs)


class FirstBlock:
    """First-Block Cache by its published rule, where diffusers' own does not run: the first block is always computed, and
    the others are left out, each branch for itself, while what the first adds has changed by less than `threshold`."""

    def __init__(self, transformer: Any, threshold: float) -> None:
        self.model, self.threshold = transformer, threshold

    @contextlib.contextmanager
    def attached(self) -> Iterator[Callable[[], None]]:
        first, *others = [*self.model.transformer_blocks, *self.model.single_transformer_blocks]
        doubles = len(self.model.transformer_blocks)
        originals = [(block, block.forward) for block in (first, *others)]

        def on_first(*args: Any, **kwargs: Any) -> Any:
            text, image = originals[0][1](*args, **kwargs)
            branch = self.calls % 2
            head = image - kwargs["hidden_states"]
            kept = self.heads.get(branch)
            self.skips = kept is not None and float((head - kept).abs().mean() / kept.abs().mean()) < self.threshold
            if not self.skips:
                self.heads[branch] = head
            self.image = image
            return text, image

        def passing(block: Any, forward: Any, pair: bool) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if not self.skips:
                    return forward(*args, **kwargs)
                return (kwargs["encoder_hidden_states"], kwargs["hidden_states"]) if pair else kwargs["hidden_states"]

            return call

        def on_output(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            branch = self.calls % 2
            self.calls += 1
            if not self.skips:
                self.tails[branch] = args[0] - self.image
            return (self.image + self.tails[branch], *args[1:])

        first.forward = on_first
        for number, (block, forward) in enumerate(originals[1:], start=1):
            block.forward = passing(block, forward, number < doubles)
        handle = self.model.norm_out.register_forward_pre_hook(on_output)
        try:
            yield self.begin
        finally:
            handle.remove()
            for block, forward in originals:
                block.forward = forward

    def begin(self) -> None:
        self.calls, self.skips = 0, False
        self.heads: dict[int, Any] = {}
        self.tails: dict[int, Any] = {}


def diffusers_rows(path: Path, count: int) -> list[list[str]]:
    """diffusers' pipeline in fp32 with each method; settings found on three prompts, measured on `count` others."""
    import diffusers
    import torch
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    from fluxc.checkpoint.identify import family_of
    from fluxc.checkpoint.reference import Generation, generate, load_pipeline
    from fluxc.checkpoint.source import open_checkpoint
    from fluxrt.bundle import open_bundle
    from fluxrt.stepcache import Decisions

    manifest = open_bundle(path).manifest
    cache, guidance = manifest.step_cache, manifest.sampling.guidance
    checkpoint = open_checkpoint(str(CHECKPOINTS[manifest.family]), None, ROOT)
    length, layers = manifest.prompting.length, family_of(checkpoint).text_layers
    pipeline = load_pipeline(checkpoint, torch.float32)
    transformer = pipeline.transformer
    work = Work(transformer)
    steps = cache.steps

    def image(prompt: str, seed: int, count: int = steps) -> np.ndarray:
        return generate(pipeline, checkpoint, prompt, Generation((64, 64), count, guidance, seed, length, layers))

    unseen = specs(count)
    captions = [spec.caption(number % 3) for number, spec in enumerate(unseen)]
    tuning = [spec.caption(number % 3) for number, spec in enumerate(specs(count + 3)[count:])]
    work.take()
    for number, prompt in enumerate(tuning):
        image(prompt, 500 + number)
    whole = work.take() / len(tuning)

    @contextlib.contextmanager
    def with_cache(config: Any) -> Iterator[Callable[[], None]]:
        transformer.enable_cache(config)
        try:
            yield lambda: transformer._reset_stateful_cache()
        finally:
            transformer.disable_cache()

    @contextlib.contextmanager
    def ours(decide: Callable[[], Decisions]) -> Iterator[Callable[[], None]]:
        skipper = Skipper(transformer, steps, decide)
        with skipper.attached():
            yield skipper.begin

    @contextlib.contextmanager
    def nothing() -> Iterator[Callable[[], None]]:
        yield lambda: None

    def share(method: Any) -> float:
        with method as begin:
            work.take()
            for number, prompt in enumerate(tuning):
                begin()
                image(prompt, 500 + number)
        return work.take() / len(tuning) / whole

    wanted = share(ours(lambda: Decisions(steps, None, cache.schedule)))

    def tuned(make: Callable[[float], Any], low: float, high: float, method: Callable[[Any], Any] = with_cache) -> Any:
        """`make` at the threshold where its work comes nearest to ours; more threshold is less work."""
        tried = {}
        for _ in range(9):
            middle = (low * high) ** 0.5
            tried[middle] = share(method(make(middle)))
            low, high = (middle, high) if tried[middle] > wanted else (low, middle)
        return make(min(tried, key=lambda threshold: abs(tried[threshold] - wanted)))

    told = io.StringIO()
    with (
        contextlib.redirect_stdout(told),
        with_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps)) as begin,
    ):
        begin()
        image(tuning[0], 500)
    ratios = next(
        json.loads(line)
        for line in told.getvalue().splitlines()
        if line.startswith("[") and line.endswith("]") and "Mag" not in line
    )
    seer = min(
        (TaylorSeerCacheConfig(2, before, None, 1, torch.float32) for before in range(3, steps // 2, 3)),
        key=lambda config: abs(share(with_cache(config)) - wanted),
    )
    name, attach = "First-Block Cache", with_cache
    try:
        share(with_cache(FirstBlockCacheConfig(threshold=0.05)))
        first_block = tuned(lambda t: FirstBlockCacheConfig(threshold=t), 1e-3, 1.0)
    except TypeError as error:
        print(
            f"diffusers {diffusers.__version__}: First-Block Cache does not run on FLUX.2 ({error}); its rule is ours\n"
        )
        name, attach = "First-Block Cache's rule", lambda rule: rule.attached()
        # What failed half attached its hooks.
        transformer = pipeline.transformer = load_pipeline(checkpoint, torch.float32).transformer
        work = Work(transformer)
        first_block = tuned(lambda t: FirstBlock(transformer, t), 1e-3, 1.0, attach)
    mag = tuned(lambda t: MagCacheConfig(t, 3, 0.0, steps, ratios), 1e-4, 1.0)
    methods: dict[str, Callable[[], Any]] = {
        "diffusers, every step": nothing,
        "our schedule": lambda: ours(lambda: Decisions(steps, None, cache.schedule)),
        "our rule": lambda: ours(lambda: Decisions(steps, cache.rule)),
        f"{name} ({first_block.threshold:.3g})": lambda: attach(first_block),
        f"MagCache ({mag.threshold:.3g}, retention 0)": lambda: with_cache(mag),
        f"TaylorSeer (order 1, every 2nd from step {seer.disable_cache_before_step})": lambda: with_cache(seer),
    }
    generated: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    done = dict.fromkeys(methods, 0)
    for number, prompt in enumerate(captions):
        for name, method in methods.items():
            with method() as begin:
                begin()
                work.take()
                began = time.perf_counter()
                generated[name].append(image(prompt, number))
                seconds[name].append(time.perf_counter() - began)
                done[name] += work.take()
    full, base = generated["diffusers, every step"], statistics.median(seconds["diffusers, every step"])
    rows = [
        figures(name, f"{done[name] / count / whole:.3f}", generated[name], full, seconds[name], base)
        for name in methods
    ]
    fewer = steps - len(cache.schedule)
    plain, took = [], []
    for number, prompt in enumerate(captions):
        began = time.perf_counter()
        plain.append(image(prompt, number, fewer))
        took.append(time.perf_counter() - began)
    rows.append(figures(f"simply {fewer} steps", f"{fewer / steps:.3f}", plain, full, took, base))
    return rows


if __name__ == "__main__":
    main()
