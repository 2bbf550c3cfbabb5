"""What calibration comes to, in words: how inputs are distributed in every kind of layer, outliers by name, and which range an
input scale stands for."""

from __future__ import annotations

import numpy as np

from fluxc.base.console import new_console, new_table
from fluxc.calibrate.amax import percentile
from fluxc.calibrate.file import CalibrationFile
from fluxc.calibrate.records import LayerInputs
from fluxc.families.ranges import ANY_INPUT, kind_of_layer
from fluxc.recipe.structs import Calibration

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
            kinds.setdefault(kind_of_layer(layer), []).append(record)
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


def in_words(calibration: Calibration, margins: dict[str, float]) -> str:
    """Which range a scale stands for, and the margin on it."""
    if calibration.engine == "none":
        margin = max(margins.values())
        return (
            f"no model is run: a published range times {margin:g} where a layer's kind has one, otherwise {ANY_INPUT:g}"
        )
    if calibration.amax == "percentile":
        found = f"what {calibration.percentile:g} % of a layer's inputs do not exceed"
    else:
        found = "the largest input seen" if calibration.amax == "max" else "the range of least squared error"
    times = ", ".join(f"{margin:g} ({format})" for format, margin in margins.items())
    return f"{found}, times {times}"
