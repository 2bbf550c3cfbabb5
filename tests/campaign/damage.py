"""Damaged inputs: manifests, graphs, tokenizers, weights, recipes, configs, prompt files, calibration and trace files.

What lies under a bundle's hashes is hashed again after it was damaged, so that it is read and not merely refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from campaign.cases import ROOT, Canaries, Limits, Outcome, Tally, Workspace, run
from campaign.mutate import of_bytes, of_graph, of_json, of_safetensors, of_text
from fluxc.build.job import Job, check_prompts, open_job
from fluxc.build.requests import calibration_request, trace_request
from fluxc.recipe.load import load_recipe
from fluxrt.bundle import open_bundle
from fluxrt.manifest import MANIFEST, NO_JSON, decode_manifest, manifest_digest

PROMPT = "a large red circle at the left on a white background"
NANO = ROOT / "models" / "flux2-nano"
RECIPE = """\
name: campaign
model: {source: ../checkpoint}
sizes: [[64, 64]]
text: {length: 32}
sampling: {steps: 3, guidance: 1.5}
calibration: {prompts: prompts.txt, seed: 0}
precision:
  transformer:
    default: nvfp4
    exclude: [x_embedder, context_embedder, "time_guidance_embed*", "*modulation*", "norm_out*", proj_out]
  text_encoder: {default: bf16}
targets:
  - {kind: onnxruntime}
  - {kind: onnxruntime, activations: nvfp4}
fidelity: {prompts: prompts.txt, seed: 1000}
gates: {layer_snr_db: 15, step_cosine: 0.98, image_psnr_db: 30}
"""
TRACED = "step_cache={skip: 2, min_r2: -9}"


class Damage:
    """The files that are damaged, and by kind how one is, and what is then run."""

    def __init__(self, bundle: Path, calibration: Path, work: Path) -> None:
        clean = work / "clean"
        shutil.rmtree(clean, ignore_errors=True)
        shutil.copytree(bundle, clean / "bundle")
        ignored = shutil.ignore_patterns(".work", "*.py", "__pycache__", "*.md")
        shutil.copytree(NANO, clean / "checkpoint", ignore=ignored)
        (clean / "recipes").mkdir()
        (clean / "out").mkdir()
        (clean / "recipes" / "recipe.yaml").write_text(RECIPE)
        prompts = [f"a red circle, number {number}" for number in range(8)]
        (clean / "recipes" / "prompts.txt").write_text("# prompts\n" + "\n".join(prompts) + "\n")
        opened = open_bundle(clean / "bundle")
        self.digests = opened.manifest.provenance.checkpoint
        self.prompting = opened.manifest.prompting
        self._write_measurements(clean, calibration)
        self.space = Workspace(clean, work / "place" / "space")
        self.canaries = Canaries(work / "place" / "outside")
        self.log = work / "said.txt"
        self._spared = False
        self.root = self.space.root
        self.kinds: dict[str, Callable[[random.Random], tuple[str, Callable[[], Any]]]] = {
            "manifest": self._manifest,
            "graph": self._graph,
            "tokenizer": self._tokenizer,
            "weights": self._weights,
            "config": self._config,
            "recipe": self._recipe,
            "prompts": self._prompts,
            "calibration": self._calibration,
            "trace": self._trace,
        }

    def case(self, kind: str, number: int | None, seed: int) -> tuple[str, Outcome]:
        """What was damaged, and what it came to; without a number nothing is."""
        rng = random.Random(f"{seed}/{kind}/{number}")
        self._spared = number is None
        said, work = self.kinds[kind](rng)
        before = self.space.listing()
        of_bundle = kind in ("manifest", "graph", "tokenizer")
        reads = (self.root / "bundle",) if of_bundle else None
        # plan and build look whether the cache can be written to, and render a chat template in a temporary folder.
        more = () if of_bundle else (Path(os.environ["FLUXC_CACHE"]), Path(tempfile.gettempdir()))
        outcome = run(work, Limits(reads, (self.root / "out", *more)), self.log)
        left = self.space.differing(before)
        image = self.root / "out" / "image.png"
        if outcome.what == "done" and of_bundle and "generate" in said:
            outcome = Outcome("image") if _is_image(image) else Outcome("exception", "exit 0 and no image")
            left = [name for name in left if name != "out/image.png"]
        if left and outcome.is_good:
            outcome = Outcome("litter", f"{', '.join(left[:5])} ({outcome.what})")
        touched = self.canaries.touched()
        if touched and of_bundle:
            outcome = Outcome("outside", f"{', '.join(touched)} ({outcome.what}: {outcome.said})")
        self.space.restore()
        return said, outcome

    def _write_measurements(self, clean: Path, calibration: Path) -> None:
        """A calibration file and a trace file that fit the recipe: the first of a build, the second of plausible numbers."""
        from fluxc.base.measured import Origin
        from fluxc.calibrate.file import read_calibration, write_calibration
        from fluxc.recipe.structs import LAGS
        from fluxc.stepcache.file import write_trace
        from fluxc.stepcache.trace import StepTrace

        loaded = load_recipe(clean / "recipes" / "recipe.yaml", (TRACED, "sampling.steps=10"))
        read = read_calibration(calibration)
        origin = Origin(self.digests, calibration_request(loaded, is_large=False), "cpu", {})
        write_calibration(clean / "calibration.safetensors", origin, read.records)
        rng, images, steps = np.random.default_rng(0), 8, 10
        change = rng.uniform(0.05, 0.5, (images, steps))
        change[:, 0] = 0
        moved = np.stack([change * 2] * 2, axis=-1)
        error = rng.uniform(0.01, 0.1, (images, steps, LAGS))
        error[np.broadcast_to(np.arange(steps)[:, None] <= np.arange(LAGS), error.shape)] = np.inf
        trace = StepTrace(change, moved, moved * 1.5, error, error)
        origin = Origin(self.digests, trace_request(loaded), "cpu", {})
        write_trace(clean / "trace.safetensors", origin, list(range(images)), trace)

    # What is damaged.

    def _damaged(self, how: Callable[..., Any], data: bytes, rng: random.Random) -> tuple[bytes, str]:
        if self._spared:
            return data, "nothing"
        made = how(data, rng)
        return (made, how.__name__) if isinstance(made, bytes) else made

    def _manifest(self, rng: random.Random) -> tuple[str, Callable[[], Any]]:
        path = self.root / "bundle" / MANIFEST
        data, said = self._damaged(of_json, path.read_bytes(), rng)
        path.write_bytes(_sealed(data))
        if rng.random() < 0.3:
            return f"{said} [inspect]", lambda: _fluxc("inspect", str(self.root / "bundle"))
        return f"{said} [generate]", self._generate(rng)

    def _graph(self, rng: random.Random) -> tuple[str, Callable[[], Any]]:
        names = [name for name in open_bundle(self.root / "bundle").manifest.files if name.endswith(".onnx")]
        name = rng.choice(sorted(names))
        data, said = self._damaged(of_graph, (self.root / "bundle" / name).read_bytes(), rng)
        hashed = rng.random() < 0.8
        self._put(name, data, hashed)
        return f"{name}: {said}{'' if hashed else ', under the old hash'} [generate]", self._generate(rng)

    def _tokenizer(self, rng: random.Random) -> tuple[str, Callable[[], Any]]:
        name = "tokenizer/tokenizer.json"
        data, said = self._damaged(of_json, (self.root / "bundle" / name).read_bytes(), rng)
        self._put(name, data, True)
        return f"{said} [generate]", self._generate(rng)

    def _weights(self, rng: random.Random) -> tuple[str, Callable[[], Any]]:
        files = sorted(path for path in (self.root / "checkpoint").rglob("*.safetensors"))
        path = rng.choice(files)
        data, said = self._damaged(of_safetensors, path.read_bytes(), rng)
        path.write_bytes(data)
        return f"{path.relative_to(self.root)}: {said} [plan]", self._plan()

    def _config(self, rng: random.Random) -> tuple[str, Callable[[], Any]]:
        files = sorted(path for path in (self.root / "checkpoint").rglob("*.json") if path.parent.name != "tokenizer")
        path = rng.choice(files)
        data, said = self._damaged(of_json, path.read_bytes(), rng)
        path.write_bytes(data)
        return f"{path.relative_to(self.root)}: {said} [plan]", self._plan()

    def _recipe(self, rng: random.Random) -> tuple[str, Callable[[], Any]]:
        path = self.root / "recipes" / "recipe.yaml"
        data, said = self._damaged(of_text, path.read_bytes(), rng)
        path.write_bytes(data)
        return f"{said} [plan]", self._plan()

    def _prompts(self, rng: random.Random) -> tuple[str, Callable[[], Any]]:
        path = self.root / "recipes" / "prompts.txt"
        data, said = self._damaged(of_text if rng.random() < 0.8 else of_bytes, path.read_bytes(), rng)
        path.write_bytes(data)
        return f"{said} [check]", lambda: check_prompts(self._job(), self.prompting)

    def _calibration(self, rng: random.Random) -> tuple[str, Callable[[], Any]]:
        path = self.root / "calibration.safetensors"
        data, said = self._damaged(of_safetensors, path.read_bytes(), rng)
        path.write_bytes(data)

        def work() -> None:
            from fluxc.base.measured import check_origin
            from fluxc.calibrate.amax import input_amax
            from fluxc.calibrate.file import read_calibration

            job = self._job("calibration.file=../calibration.safetensors", "sampling.steps=10")
            file = read_calibration(path)
            check_origin(file, self.digests, calibration_request(job.loaded, job.is_large))
            records = file.records.get("transformer", {})
            for amax in ("max", "percentile"):
                loaded = load_recipe(self.root / "recipes" / "recipe.yaml", (f"calibration.amax={amax}",))
                input_amax(records, job.original.plans["transformer"], loaded.recipe.calibration)

        return f"{said} [read]", work

    def _trace(self, rng: random.Random) -> tuple[str, Callable[[], Any]]:
        path = self.root / "trace.safetensors"
        data, said = self._damaged(of_safetensors, path.read_bytes(), rng)
        path.write_bytes(data)

        def work() -> None:
            from fluxc.base.measured import check_origin
            from fluxc.stepcache.choose import make_step_cache
            from fluxc.stepcache.file import check_complete, read_trace

            changes = ("step_cache={skip: 2, min_r2: -9, trace: ../trace.safetensors}", "sampling.steps=10")
            job = self._job(*changes)
            file, settings = read_trace(path), job.loaded.recipe.step_cache
            check_origin(file, self.digests, trace_request(job.loaded))
            check_complete(file)
            assert settings
            make_step_cache(settings, file.trace, (64, 64))

        return f"{said} [read]", work

    # What is run.

    def _generate(self, rng: random.Random) -> Callable[[], Any]:
        target = rng.choice(([], [], ["--target", "onnxruntime"]))
        arguments = [
            "generate",
            str(self.root / "bundle"),
            "--prompt",
            PROMPT,
            "--steps",
            "1",
            "--threads",
            "1",
            *target,
        ]

        def work() -> int:
            from fluxrt.cli import main

            return main([*arguments, "--out", str(self.root / "out" / "image.png")])

        return work

    def _plan(self) -> Callable[[], Any]:
        recipe, out = self.root / "recipes" / "recipe.yaml", self.root / "out" / "bundle"
        return lambda: _fluxc("plan", str(recipe), "--out", str(out))

    def _job(self, *changes: str) -> Job:
        loaded = load_recipe(self.root / "recipes" / "recipe.yaml", changes)
        job = open_job(loaded, self.root / "out")
        job.digests = self.digests
        return job

    def _put(self, name: str, data: bytes, hashed: bool) -> None:
        """Replace a file of the bundle; `hashed`: with its hash in the manifest."""
        (self.root / "bundle" / name).write_bytes(data)
        if hashed:
            path = self.root / "bundle" / MANIFEST
            plain = json.loads(path.read_bytes())
            plain["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            path.write_bytes(_sealed(json.dumps(plain).encode()))


def _sealed(manifest: bytes) -> bytes:
    """With the digest of what it says, where it can be read at all."""
    try:
        plain = json.loads(manifest)
        plain["digest"] = manifest_digest(decode_manifest(manifest))
        return json.dumps(plain).encode()
    except (*NO_JSON, TypeError, ValueError):
        return manifest


def _is_image(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def _fluxc(*arguments: str) -> Any:
    from fluxc.cli.main import main

    main(list(arguments), prog_name="fluxc")


def campaign(bundle: Path, calibration: Path, work: Path, cases: int, seed: int, only: str | None) -> list[Tally]:
    """`cases` of each kind; `only` is KIND or KIND/NUMBER."""
    import importlib

    # Once for all cases; what is left out starts threads.
    for name in (
        "fluxc.cli.describe",
        "fluxc.cli.describe_bundle",
        "fluxc.stepcache.choose",
        "fluxrt.pipeline",
        "onnx",
        # A plan measures how fast it multiplies; while it is imported it starts a program.
        "torch",
    ):
        importlib.import_module(name)
    for name in ("tokenizers", "PIL.PngImagePlugin", "fluxrt.backends.onnxruntime", "fluxrt.cli", "rich.table"):
        importlib.import_module(name)
    damage, tallies = Damage(bundle, calibration, work), []
    for kind in damage.kinds:
        wanted, _, number = (only or kind).partition("/")
        if wanted != kind:
            continue
        _, sound = damage.case(kind, None, seed)
        if sound.what not in ("image", "done"):
            raise SystemExit(f"{kind}: undamaged it comes to {sound}: {damage.log.read_text(errors='replace')}")
        tally = Tally(kind)
        for at in [int(number)] if number else range(cases):
            said, outcome = damage.case(kind, at, seed)
            tally.add(f"{kind}/{at} (seed {seed}): {said}", outcome)
            if number:
                print(f"{kind}/{at}: {said}\n{outcome}\n{damage.log.read_text(errors='replace')}")
        print(f"{kind}: {tally.counts}", flush=True)
        tallies.append(tally)
    return tallies
