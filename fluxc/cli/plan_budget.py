"""What `plan` prints of the budget: every stage with its predicted memory, disk and time, and what there is here."""

from __future__ import annotations

from rich.console import Console

from fluxc.base.fitted import Column, fitted_table
from fluxc.base.memory import bytes_in_words
from fluxc.build.budget import Budget, predicted_time, rates_for
from fluxc.build.budget_rates import Rates
from fluxc.build.preflight import Preflight

COLUMNS = (
    Column("stage", whole=True),
    Column("part", 2),
    Column("result"),
    Column("memory"),
    Column("disk"),
    Column("time"),
    Column("the model runs", 1),
)


def print_budget(console: Console, ready: Preflight) -> None:
    """The table of stages, and a line with the sums against what is free."""
    budget, rates = ready.budget, rates_for(ready.job)
    rows = []
    for stage in budget.stages:
        need = stage.need
        figures = ["", "", "", ""]
        if need is not None:
            time = predicted_time(need.work.seconds(rates)).removeprefix("about ")
            figures = [bytes_in_words(need.memory), bytes_in_words(need.disk), time, need.how]
        rows.append([stage.name, stage.part, stage.result, *figures])
    console.print(fitted_table(console, COLUMNS, rows, "stages of a build here, with what is predicted"))
    console.print(summary(budget, rates))


def summary(budget: Budget, rates: Rates) -> str:
    """The most memory, all disk and all time, against what there is."""
    if not budget.to_run:
        return "Every result is in the cache."
    name, peak = budget.peak
    disks = "; ".join(
        f"{disk.folder} gets {bytes_in_words(disk.needed)} of {bytes_in_words(disk.free)} that are free"
        for disk in budget.disks
    )
    return (
        f"At most {bytes_in_words(peak)} of memory, in {name}; {budget.memory_there}. Disk: {disks}. "
        f"Time: {predicted_time(budget.seconds(rates))}."
    )
