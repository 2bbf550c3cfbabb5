"""What ONNX Runtime's threads do while they wait: spin or sleep, on an idle and on a busy machine.

    python benchmarks/waiting.py BUNDLE

Every contender generates one image in a process of its own, and the contenders take turns. Busy means that as many processes
as there are cores do nothing but compute beside it. Times are medians over all turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

PROMPT = "a large red circle at the left on a white background"
CONTENDERS = {
    "sleeping threads": (False, None),
    "spinning threads": (True, None),
    "one thread": (False, 1),
}
BURN = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--state", choices=("idle", "busy"), action="append", help="only this one")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(run_contender(options.bundle, options.steps, *CONTENDERS[options.contender])))
        return
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, load before: {os.getloadavg()[0]:.1f}")
    for state, beside in (("idle", 0), ("busy", cores)):
        if state not in (options.state or ("idle", "busy")):
            continue
        others = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(beside)]
        try:
            results = take_turns(options)
        finally:
            for other in others:
                other.kill()
                other.wait()
        for name, runs in results.items():
            wall, cpu = (statistics.median(run[what] for run in runs) for what in ("wall", "cpu"))
            spread = ", ".join(f"{run['wall']:.2f}" for run in sorted(runs, key=lambda run: run["wall"]))
            print(f"| {state} | {name} | {wall:.2f} | {cpu:.2f} |   walls: {spread}")


def take_turns(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(options.turns):
        for name in CONTENDERS:
            command = [sys.executable, __file__, options.bundle, "--steps", str(options.steps), "--contender", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name].append(json.loads(output.splitlines()[-1]))
    return results


def run_contender(bundle: str, steps: int, spins: bool, threads: int | None) -> dict[str, float]:
    """Seconds on the clock and of CPU time that an image takes, after one that is not timed."""
    import fluxrt
    from fluxrt.backends import onnxruntime as backend

    plain = backend.session_options

    def options() -> object:
        made = plain()
        made.add_session_config_entry("session.intra_op.allow_spinning", "1" if spins else "0")
        return made

    backend.session_options = options
    with fluxrt.load(bundle, threads=threads) as pipeline:
        pipeline.generate(fluxrt.Request(PROMPT, steps=2))
        wall, cpu = time.perf_counter(), time.process_time()
        pipeline.generate(fluxrt.Request(PROMPT, steps=steps))
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


if __name__ == "__main__":
    main()
