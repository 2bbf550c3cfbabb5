"""What `fluxc calibrate` prints: how inputs are distributed in every kind of layer, and the outliers by name."""

from __future__ import annotations

import re

import numpy as np

from fluxc.base.console import new_console, new_table
from fluxc.calibrate.amax import percentile
from fluxc.calibrate.file import CalibrationFile
from fluxc.calibrate.records import LayerInputs

OUTLIERS = 10


def outliers(records: dict[str, LayerInputs], count: int = OUTLIERS) -> list[tuple[str, float, float, list[int]]]:
    """The `count` layers whose largest input stands out most: (layer, amax, amax / 99.9th percentile, channels).

    Channels are those (at most four, the largest first) that reach half the layer's amax.
    """
    found = []
    for layer, record in records.items():
        usual = percentile(record, 99.9)
        largest = np.argsort(-record.channel_amax, kind="stable")[:4]
        channels = [int(i) for i in largest if record.channel_amax[i] >= record.amax / 2]
        found.append((layer, record.amax, record.amax / usual if usual else 1.0, channels))
    return sorted(found, key=lambda row: -row[2])[:count]


def print_calibration(file: CalibrationFile) -> None:
    """The distribution of inputs by kind of layer, then the outliers."""
    console = new_console(width=160)
    request = file.origin.request
    console.print(
        f"{len(request['prompts'])} prompts, {request['steps']} steps, guidance {request['guidance']}; {file.origin.ran}"
    )
    for component, records in file.records.items():
        table = new_table(
            "inputs of",
            "layers",
            "median",
            "99%",
            "99.9%",
            "99.99%",
            "largest",
            title=component,
        )
        kinds: dict[str, list[LayerInputs]] = {}
        for layer, record in records.items():
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", layer, count=1), []).append(record)
        for kind, members in kinds.items():
            figures = [max(percentile(record, p) for record in members) for p in (50, 99, 99.9, 99.99)]
            largest = max(record.amax for record in members)
            table.add_row(kind, str(len(members)), *(f"{figure:.3g}" for figure in (*figures, largest)))
        console.print(table)
        table = new_table(
            "layer",
            "largest",
            "of its 99.9%",
            "channels",
            title=f"{component} outliers",
        )
        for layer, amax, ratio, channels in outliers(records):
            table.add_row(layer, f"{amax:.4g}", f"{ratio:.1f}x", ", ".join(map(str, channels)))
        console.print(table)
