"""How long weights take to be made into what fluxrt multiplies by on a CPU, and the same read from a file.

    python benchmarks/unfold.py

Layers of klein 4B's widest shape with random codes. Seconds are for a billion weights, on the clock with as many threads as
there are cores, and of CPU time; the least of three runs. A file of int8 rows is one that the page cache holds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cpu_memory import write_random
from cpu_step import cpu_name

ROWS, COLUMNS = 27648, 3072


def main() -> None:
    from fluxc.formats.registry import FORMATS
    from fluxc.models.base import Linear
    from fluxc.quantize.plan import LayerPlan
    from fluxrt.backends.openvino_weights import rounded_rows, values_of
    from fluxrt.manifest import Unfold
    from fluxrt.unfold import unfold
    from fluxrt.weights import read_weights

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    print(f"{cpu_name()}\n\n| what | s a billion weights | CPU s |\n|---|---|---|")
    count = options.layers * ROWS * COLUMNS
    with tempfile.TemporaryDirectory(prefix="unfold-") as folder:
        for name in ("nvfp4", "fp8"):
            layers = [Linear(f"{number}.layer", ROWS, COLUMNS) for number in range(options.layers)]
            plan = {layer.name: LayerPlan("transformer", layer, name, "", 0) for layer in layers}
            path = Path(folder) / f"{name}.safetensors"
            write_random(path, {f"{layer.name}.weight": (ROWS, COLUMNS) for layer in layers}, plan)
            stored, format = read_weights(path), FORMATS[name]
            scales = tuple(part for part in format.parts(ROWS, COLUMNS) if part.startswith("weight_scale"))
            block = format.block if format.block > 1 else 0
            for form in ("int8", "float32"):
                wanted = [Unfold(layer.name, form, (ROWS, COLUMNS), format.values, scales, block) for layer in layers]
                row(f"{name} to {form}", count, lambda wanted=wanted, stored=stored: unfold(wanted, stored))
        side = Path(folder) / "rows"
        side.write_bytes(bytes(count))
        row("int8 rows read from a file", count, lambda: np.fromfile(side, np.int8))
        packed = np.random.default_rng(0).integers(0, 256, (ROWS, COLUMNS // 2), np.uint8)
        blocks = np.ones((ROWS, COLUMNS // 16), np.float32)
        row(
            "nvfp4 to int8, for OpenVINO",
            ROWS * COLUMNS,
            lambda: rounded_rows(lambda first, last: values_of("f4e2m1", packed[first:last]), blocks, (ROWS, COLUMNS)),
        )


def row(what: str, count: int, make: Callable[[], object]) -> None:
    found = []
    for _ in range(3):
        began, used = time.perf_counter(), time.process_time()
        make()
        found.append((time.perf_counter() - began, time.process_time() - used))
    clock, cpu = min(found)
    print(f"| {what} | {clock / count * 1e9:.2f} | {cpu / count * 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
