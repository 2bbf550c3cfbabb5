"""One image in 1, 2 and 4 processes on a CPU: time of a step, and memory, of all processes together and of the largest.

    python benchmarks/ranks.py                       # flux2-nano
    python benchmarks/ranks.py --width 1536 --side 128 --steps 3 --ranks 1 2 4

The numbers of processes take turns. Memory is what the kernel counts: the sum over the processes of their proportional
sets (PSS: shared pages divided among those that map them), polled, and the largest process's own peak (VmHWM). On one machine
the processes share its cores, so this shows what sharding costs and divides, not what GPUs would gain.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from cpu_step import NANO, PROMPT, ROOT, cpu_name, write_random_transformer

POLL_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, help="random transformer of this width (a multiple of 512)")
    parser.add_argument("--side", type=int, default=64, help="image side in pixels; a token is 8 pixels (default 64)")
    parser.add_argument("--steps", type=int, default=24, help="denoising steps of an image")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("BUNDLE", "RANKS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(Path(options.one[0]), int(options.one[1]), options.steps)))
        return
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        bundle = prepare(Path(folder), options)
        results: dict[int, list[dict[str, float]]] = {ranks: [] for ranks in options.ranks}
        for _ in range(options.turns):
            for ranks in options.ranks:
                command = [sys.executable, __file__, "--steps", str(options.steps), "--one", str(bundle), str(ranks)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results[ranks].append(json.loads(output.splitlines()[-1]))
    print_table(results, options)


def prepare(folder: Path, options: argparse.Namespace) -> Path:
    """A bundle with a sharded target for every number of processes asked for."""
    import shutil

    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build
    from fluxc.recipe.load import load_recipe

    kinds = [f"{{kind: onnxruntime, gpus: {ranks}}}" for ranks in options.ranks if ranks > 1]
    prompts = "../tests/data/two-prompts.txt"
    changes = [f"sizes=[[{options.side}, {options.side}]]", "gates={}", f"sampling.steps={options.steps}"]
    changes += [f"targets=[{{kind: onnxruntime}}, {', '.join(kinds)}]", f"fidelity.prompts={prompts}"]
    changes += [f"calibration.prompts={prompts}", "calibration.steps=1"]
    if options.width:
        checkpoint = folder / "checkpoint"
        ignored = shutil.ignore_patterns(".work", "*.py", "__pycache__", "transformer")
        shutil.copytree(NANO, checkpoint, ignore=ignored)
        write_random_transformer(checkpoint / "transformer", options.width, 2, 4)
        changes.append(f"model.source={checkpoint}")
    recipe = load_recipe(ROOT / "recipes" / "flux2-nano.yaml", tuple(changes))
    bundle = build(recipe, folder / "bundle", StageProgress())
    assert bundle is not None
    return bundle


def measure(bundle: Path, ranks: int, steps: int) -> dict[str, float]:
    """Median time of a step over three images, and memory while they were generated."""
    import fluxrt

    target = "onnxruntime" if ranks == 1 else f"onnxruntime-{ranks}gpus"
    with Memory() as memory, fluxrt.load(bundle, target=target, gpus=ranks) as pipeline:
        pipeline.generate(fluxrt.Request(PROMPT, seed=0))
        times = []
        for seed in range(1, 4):
            began = time.perf_counter()
            pipeline.generate(fluxrt.Request(PROMPT, seed=seed))
            times.append((time.perf_counter() - began) / steps)
    return {"ms": 1000 * statistics.median(times), "all_mib": memory.together, "largest_mib": memory.largest}


class Memory:
    """Polls what this process and its descendants hold, in MiB: the most together, and the largest peak of one."""

    def __init__(self) -> None:
        self.together = self.largest = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._done.wait(POLL_S):
            processes = family()
            self.together = max(self.together, sum(kib(p, "smaps_rollup", "Pss:") for p in processes) / 1024)
            self.largest = max([self.largest, *(kib(p, "status", "VmHWM:") / 1024 for p in processes)])


def family() -> list[int]:
    """This process and every process that descends from it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [os.getpid()]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def kib(process: int, file: str, field: str) -> int:
    """A figure of /proc, 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def print_table(results: dict[int, list[dict[str, float]]], options: argparse.Namespace) -> None:
    model = f"random, width {options.width}, 2 and 4 blocks" if options.width else "flux2-nano"
    print(f"{model}, {options.side}x{options.side} pixels, {options.steps} steps, {cpu_name()}\n")
    print(
        "| processes | ms a step | of one | memory together, MiB | of one | largest process, MiB |\n|---|---|---|---|---|---|"
    )
    medians = {n: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for n, rows in results.items()}
    base = medians[options.ranks[0]]
    for ranks, row in medians.items():
        print(
            f"| {ranks} | {row['ms']:.1f} | {row['ms'] / base['ms']:.2f}x | {row['all_mib']:.0f} | "
            f"{row['all_mib'] / base['all_mib']:.2f}x | {row['largest_mib']:.0f} |"
        )


if __name__ == "__main__":
    main()
