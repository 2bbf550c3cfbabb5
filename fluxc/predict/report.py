"""What `predict --on GPU` prints: the prediction, named as one, what it rests on, and its error where figures are known."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median

from rich.console import Console
from rich.table import Table

from fluxc.base.console import new_table
from fluxc.base.fitted import Column, fitted_table
from fluxc.formats.registry import multiplied_in
from fluxc.predict.published import CALIBRATED_ON, STEPS, TEACACHE, calibrated, checked, steps_computed_with_teacache
from fluxc.predict.rates import EXCHANGE_LATENCY, KERNEL_GAP
from fluxc.predict.scaling import Prediction, RankMemory, Scaling
from fluxc.predict.work import LARGE_DECODER, tile_hint
from fluxc.quantize.plan import summary_by_format


def print_scaling(console: Console, scaling: Scaling) -> None:
    """The tables of a prediction."""
    subject, gpu = scaling.subject, scaling.gpu
    formats = ", ".join(
        f"{count} Linears {format}" for format, (count, _, _, _) in sorted(summary_by_format(subject.plan).items())
    )
    height, width = subject.size
    branches = "two passes a step (guidance)" if subject.branches == 2 else "one pass a step"
    console.print(f"PREDICTED, not measured: {subject.name} on {gpu.name}", style="bold")
    console.print(
        f"{formats}; {height}x{width}, {subject.tokens} image and {subject.text_tokens} text tokens; {subject.steps} steps, "
        f"{branches}"
    )
    console.print(_time_table(console, scaling))
    for count, reason in scaling.impossible.items():
        console.print(f"{count} GPUs: {reason}")
    for sentence in _bodies_sentences(scaling):
        console.print(sentence)
    if subject.skipped is None:
        console.print("How many steps the step cache skips is known once the recipe is built, so it is not counted.")
    console.print(_memory_table(scaling))
    console.print(_first_rank_sentence(scaling))
    if scaling.at_once:
        console.print(_at_once_table(scaling))
    console.print(
        "CUDA's and NCCL's own memory is not counted. Weights are the same on every rank: sharding divides activations."
    )
    if any(multiplied_in(entry.format) not in gpu.gemms for entry in subject.plan):
        console.print(
            f"{gpu.name} does not multiply every format of this plan: those layers are taken to be computed in bf16."
        )
    console.print(_points_table())
    errors = [abs(c.error_without) for c in checked()]
    console.print(
        f"So expect an error of {median(errors):.0%}; it has been as large as {max(errors):.0%}, on a figure of torch as it "
        "comes, whose pauses between kernels are not modelled."
    )
    if gpu.name not in CALIBRATED_ON:
        console.print(
            f"None of these figures is of {gpu.name}: it is taken to reach the same parts of its peak rates as "
            f"{', '.join(CALIBRATED_ON)}."
        )
    computed = steps_computed_with_teacache()
    console.print(
        f"{TEACACHE.what}: {TEACACHE.published:.2f} s ({TEACACHE.source}), published without the number of steps computed; by "
        f"this model {computed:.0f} of {STEPS}."
    )
    console.print(_assumptions(scaling))


def _time_table(console: Console, scaling: Scaling) -> Table:
    subject = scaling.subject
    shares: list[tuple[str, float]] = [("image, s", 1.0)]
    if subject.skipped:
        shares.append((f"{subject.skipped:g} steps skipped, s", 1 - subject.skipped / subject.steps))
    fewest = scaling.predictions[0]
    # The parts of a step go first where a terminal is narrow, the smallest of them before the others.
    columns = (
        Column("GPUs"),
        Column("a step, ms"),
        Column("GEMMs", 1),
        Column("attention", 2),
        Column("memory traffic", 3),
        Column("all-to-alls", 4),
        Column("launches", 5),
        *(Column(title) for title, _ in shares),
        Column(f"against {fewest.gpus}"),
        Column("of ideal"),
    )
    rows = []
    for p in scaling.predictions:
        parts = (p.time.gemms, p.time.attention, p.time.memory, p.time.exchanges, p.time.launches)
        faster = fewest.image_seconds / p.image_seconds
        figures = [_figure(1e3 * seconds) for seconds in (p.time.seconds, *parts)]
        figures += [_figure(share * p.image_seconds) for _, share in shares]
        rows.append([str(p.gpus), *figures, f"{faster:.2f}x", f"{faster * fewest.gpus / p.gpus:.0%}"])
    return fitted_table(console, columns, rows, "predicted time")


def _bodies_sentences(scaling: Scaling) -> list[str]:
    """What steps of other bodies take."""
    found = []
    for body, (plan, steps) in scaling.subject.bodies.items():
        changed = sum(old.format != new.format for old, new in zip(scaling.subject.plan, plan, strict=True))
        times = ", ".join(f"{_figure(1e3 * p.bodies[body][0].seconds)} ms" for p in scaling.predictions)
        how = (
            "how many is measured when the recipe is built, so none is counted" if steps is None else "as counted above"
        )
        number = "Some" if steps is None else str(steps)
        found.append(
            f"{number} of the steps leave the inputs of {changed} Linears as they are ({body}): {times} a step; {how}."
        )
    return found


def _memory_table(scaling: Scaling) -> Table:
    unit, size = _unit(scaling.predictions[0].first)
    table = new_table(
        "GPUs",
        "rank",
        f"weights, {unit}",
        "plans' working memory",
        "buffers",
        "all",
        f"of {scaling.gpu.memory / 1e9:.0f} GB",
        title="predicted memory of each rank",
    )
    for p in scaling.predictions:
        for rank, memory in _ranks(p):
            parts = (memory.weights, memory.working, memory.buffers, memory.total)
            share = memory.total / scaling.gpu.memory
            fits = f"{share:.1%}" if share < 1 else f"{share:.1%}: does not fit"
            table.add_row(str(p.gpus), rank, *(f"{part / size:.2f}" for part in parts), fits)
    return table


def _at_once_table(scaling: Scaling) -> Table:
    """Several images at once: time, and memory of the fullest rank, which is the first."""
    unit, size = _unit(scaling.predictions[0].first)
    table = new_table(
        "GPUs",
        "images at once",
        "a step, ms",
        "a step and image, ms",
        "against one at a time",
        f"rank 0, resident, {unit}",
        "staged",
        f"of {scaling.gpu.memory / 1e9:.0f} GB",
        title="predicted, several images at once (--batch)",
    )
    alone = {p.gpus: p.time.seconds for p in scaling.predictions}
    for p in sorted((*scaling.predictions, *scaling.at_once), key=lambda p: (p.gpus, p.images)):
        each = p.time.seconds / p.images
        figures = (_figure(1e3 * seconds) for seconds in (p.time.seconds, each))
        held = (f"{memory.total / size:.2f}" for memory in (p.first, p.staged))
        shares = " / ".join(f"{memory.total / scaling.gpu.memory:.0%}" for memory in (p.first, p.staged))
        table.add_row(str(p.gpus), str(p.images), *figures, f"{alone[p.gpus] / each:.2f}x", *held, shares)
    return table


def _first_rank_sentence(scaling: Scaling) -> str:
    """What rank 0 holds for whom, and what the hungriest component takes where they take turns."""
    subject, first = scaling.subject, scaling.predictions[0].first
    unit, size = _unit(first)
    parts = [(subject.weights, "transformer"), (subject.text_encoder, "text encoder"), (subject.vae, "VAE")]
    held = ", ".join(f"{nbytes / size:.2f} the {name}'s" for nbytes, name in parts)
    step = scaling.predictions[0].work.working_bytes
    turns = ", ".join(f"{memory.total / size:.2f} the {name}" for name, memory in scaling.predictions[0].stages.items())
    text = (
        f"Of rank 0's weights, {held} ({unit}). All plans share the working memory of the largest: a step takes "
        f"{step / size:.2f}, decoding the image {subject.decoder / size:.2f}. Resident: all components stay; staged (--memory "
        f"staged, or auto where not all fit): they take turns, and with buffers {turns} takes."
    )
    return f"{text} {tile_hint().capitalize()}." if subject.decoder >= LARGE_DECODER and not subject.in_tiles else text


def _unit(memory: RankMemory) -> tuple[str, int]:
    return ("MiB", 2**20) if memory.total < 2**30 else ("GiB", 2**30)


def _ranks(prediction: Prediction) -> list[tuple[str, RankMemory]]:
    first = [("0, resident", prediction.first), ("0, staged", prediction.staged)]
    if prediction.others is None:
        return first
    others = f"1 to {prediction.gpus - 1}" if prediction.gpus > 2 else "1"
    return [*first, (others, prediction.others)]


def _points_table() -> Table:
    table = new_table(
        "published, FLUX.2-dev, 1024x1024, 50 steps",
        "published",
        "predicted",
        "error",
        "error, calibrated without it",
        "read in",
        title="what it was calibrated on, and its error there",
    )
    for c in checked():
        unit = "" if c.point.unit == "x" else " "
        table.add_row(
            c.point.what,
            f"{c.point.published:g}{unit}{c.point.unit}",
            f"{_figure(c.predicted)}{unit}{c.point.unit}",
            f"{c.error:+.0%}",
            f"{c.error_without:+.0%}",
            c.point.source,
        )
    return table


def _assumptions(scaling: Scaling) -> str:
    gpu = scaling.gpu
    reached = {name.replace("_", " "): part for name, part in asdict(calibrated()).items()}
    rates = ", ".join(f"{format} {rate / 1e12:,.0f}" for format, rate in gpu.gemms.items())
    return (
        f"Stated peak rates of {gpu.name}: {rates} TFLOP/s, memory {gpu.memory_bandwidth / 1e12:g} TB/s, {gpu.link} "
        f"{gpu.link_bandwidth / 1e9:.0f} GB/s to others. Efficiency, as calibrated: "
        f"{', '.join(f'{name} {part:.0%}' for name, part in reached.items())}. Assumed: {1e6 * EXCHANGE_LATENCY:.0f} us an "
        f"all-to-all and {1e6 * KERNEL_GAP:.0f} us a kernel besides; skipped steps take no time; text encoding and VAE are not "
        "in it. No published figure is of this compiler's plans."
    )


def _figure(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{float(f'{value:.3g}'):,g}"
