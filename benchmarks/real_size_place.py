"""Where `real_size.py` works, what it builds there, and the words it says it in."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from real_size_checkpoint import Shape, make, shape_of
from real_size_grown import configs_of
from real_size_grown import make as make_grown
from real_size_watch import BETWEEN, OnBegin, Run, StageUse, watched

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NANO = ROOT / "models" / "flux2-nano"
PROMPTS = ROOT / "recipes" / "prompts"
NANO_PROMPTS, GROWN_PROMPTS = 8, 2
SIZE, TEXT, STEPS = 256, 512, 4
NANO_SIZE, NANO_TEXT = 64, 32
RECIPE = """\
name: real-size
model: {{source: {source}}}
sizes: [[{size}, {size}]]
text: {{length: {text}}}
sampling: {{steps: {steps}, guidance: 1.0}}
calibration: {{prompts: {calibration}}}
precision:
  transformer: {{default: nvfp4, preset: modelopt-flux2, scales: four-over-six}}
  text_encoder: {{default: fp8}}
targets: [{{kind: onnxruntime}}, {{kind: tensorrt_rtx}}]
fidelity: {{prompts: {held_out}}}
gates: {{layer_snr_db: 15}}
"""
UNITS = {"": 1, "MiB": 2**20, "GiB": 2**30}
GIB = 2**30


class Place:
    """The folder that everything is in, and the settings of its builds."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self.work, self.options = work, options
        self.shape = shape_of(options)

    @property
    def name(self) -> str:
        """What is compiled, in words."""
        if self.options.nano:
            return NANO.name
        return f"{self.shape.name}, grown from {NANO.name}" if self.options.grown else self.shape.name

    @property
    def is_nano(self) -> bool:
        """Whether what is compiled computes what flux2-nano does, so that its sizes and prompts suit it."""
        return bool(self.options.nano or self.options.grown)

    def checkpoint(self, shape: Shape | None = None, like: Path | None = None) -> Path:
        """The checkpoint of `shape`, by default the one that the options ask for, made where it is not there."""
        if shape is None and self.options.nano:
            return NANO
        shape = shape or self.shape
        folder = self.work / "checkpoints" / (shape.name.replace(" ", "-") + ("-grown" if self.options.grown else ""))
        if not (folder / "model_index.json").is_file():
            began = time.monotonic()
            size = make_grown(folder, configs_of(shape)) if self.options.grown else make(folder, shape, like=like)
            tell(f"made {folder}: {size / 1e9:.1f} GB in {time.monotonic() - began:.0f} s")
        return folder

    def recipe(self, checkpoint: Path) -> Path:
        """The recipe that compiles `checkpoint`."""
        nano = self.is_nano or checkpoint == NANO
        prompts = "flux2-nano" if nano else "natural"
        path = self.work / f"{checkpoint.name}.yaml"
        path.write_text(
            RECIPE.format(
                source=checkpoint,
                size=NANO_SIZE if nano else SIZE,
                text=NANO_TEXT if nano else TEXT,
                steps=STEPS,
                calibration=PROMPTS / f"{prompts}-calibration.txt",
                held_out=PROMPTS / f"{prompts}-held-out.txt",
            )
        )
        return path

    def command(self, recipe: Path, out: Path, limit: int | None = None) -> list[str]:
        """The command line that builds `recipe` into `out`."""
        changes = [part for change in self.options.changes for part in ("--set", change)]
        budget = ["--memory", in_words(limit)] if limit and takes_budget() else []
        return [*fluxc(), "build", str(recipe), *changes, *budget, "--log-format", "json", "--out", str(out)]

    def build(self, recipe: Path, out: Path, limit: int | None, on_begin: OnBegin | None = None) -> Run:
        """Build in `limit` bytes of memory; results of stages are kept beside `out`."""
        out.parent.mkdir(parents=True, exist_ok=True)

        def on_stage(number: int, stage: StageUse, process: subprocess.Popen[bytes]) -> None:
            stage.disk = disk_of(out.parent)
            tell(f"  {stage.title}")
            if on_begin:
                on_begin(number, stage, process)

        cache = str(out.parent / ".fluxc")
        return watched(self.command(recipe, out, limit), limit, on_stage, FLUXC_CACHE=cache)

    def undisturbed(self, limit: int | None) -> tuple[Path, list[StageUse], dict[str, str]]:
        """(bundle, stages, hashes) of a build that nothing disturbs: an earlier one's where it was kept."""
        grown = "-grown" if self.options.grown else ""
        out = self.work / f"build{grown}-{in_words(limit).replace(' ', '-')}" / "bundle"
        note = out.parent / "stages.json"
        if not note.is_file():
            tell(f"build of {self.name} in {in_words(limit)}")
            run = self.build(self.recipe(self.checkpoint()), out, limit)
            if run.status:
                print(stage_table(run.stages), flush=True)
                raise SystemExit(ended(run))
            note.write_text(json.dumps([asdict(stage) for stage in run.stages]))
        return out, [StageUse(**stage) for stage in json.loads(note.read_text())], hashes(out)


def checked(command: list[str]) -> str:
    """What the command prints; SystemExit with what it says where it fails."""
    run = watched(command)
    if run.status:
        raise SystemExit(ended(run))
    return run.out


def stage_table(stages: list[StageUse]) -> str:
    """Each stage with seconds and memory, and all of them."""
    lines = ["| stage | s | held, GiB | resident, GiB |", "|---|---|---|---|"]
    for stage in shown_stages(stages):
        lines.append(f"| {stage.title} | {stage.seconds:.1f} | {stage.held / GIB:.2f} | {stage.resident / GIB:.2f} |")
    held, resident = (max(getattr(stage, what) for stage in stages) / GIB for what in ("held", "resident"))
    seconds = sum(stage.seconds for stage in stages)
    return "\n".join([*lines, f"| **all** | {seconds:.0f} | {held:.2f} | {resident:.2f} |"])


def shown_stages(stages: list[StageUse]) -> list[StageUse]:
    """The stages in order; what lies between two of them belongs to the one before."""
    shown: list[StageUse] = []
    for stage in stages:
        if stage.title == BETWEEN and shown:
            last = shown[-1]
            last = StageUse(**asdict(last))
            last.seconds += stage.seconds
            last.held, last.resident = max(last.held, stage.held), max(last.resident, stage.resident)
            shown[-1] = last
        else:
            shown.append(stage)
    return shown


def ended(run: Run) -> str:
    """How a command ended that did not end well."""
    if run.over_limit:
        return f"over the limit in {run.stages[-1].title!r}"
    return f"exit {run.status} in {run.stages[-1].title!r}: " + " ".join(run.said[-3:])


def fluxc() -> list[str]:
    """The beginning of fluxc's command line."""
    return [sys.executable, "-m", "fluxc"]


@functools.cache
def takes_budget() -> bool:
    """Whether this fluxc's build has --memory."""
    return (
        "--memory" in subprocess.run([*fluxc(), "build", "--help"], capture_output=True, text=True, check=True).stdout
    )


def hashes(bundle: Path) -> dict[str, str]:
    """SHA-256 of every file; of the manifest without the time it was built."""
    found = {}
    for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
        name = path.relative_to(bundle).as_posix()
        if name == "bundle.json":
            manifest = json.loads(path.read_text())
            manifest["provenance"].pop("built_at")
            found[name] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
            continue
        with path.open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def compared(found: dict[str, str], expected: dict[str, str]) -> str:
    """Whether two bundles are the same, in words."""
    other = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if not other:
        return f"The same bytes in all {len(found)} files (but for the time in bundle.json)."
    return f"**{len(other)} of {len(expected)} files differ**: {', '.join(other[:8])}"


def disk_of(folder: Path) -> int:
    """Bytes that the files below take on disk, each once however many names it has."""
    found = {}
    for path in folder.rglob("*"):
        try:
            stat = path.lstat()
        except OSError:
            continue
        found[stat.st_ino] = 512 * stat.st_blocks
    return sum(found.values())


def in_bytes(text: str) -> int:
    """Bytes of a size such as 12GiB."""
    found = re.fullmatch(r"([0-9.]+) ?(GiB|MiB|)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: a size is expected, such as 12GiB")
    return int(float(found[1]) * UNITS[found[2]])


def in_words(size: int | None) -> str:
    """A size as `in_bytes` reads it."""
    if size is None:
        return "no limit"
    return f"{size / GIB:g}GiB" if size % (GIB // 4) == 0 else f"{size / 2**20:g}MiB"


def tell(line: str) -> None:
    """Say what happens, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
