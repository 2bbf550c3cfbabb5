"""The command line: parse, call, print. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import click

import fluxc
from fluxc.cli.build import build, calibrate, merge_traces, trace
from fluxc.cli.bundle import doctor, export_onnx, finish, inspect, verify
from fluxc.cli.gpu import add_evidence, gpu_check
from fluxc.cli.plan import plan, predict
from fluxc.cli.recipe import init, schema
from fluxc.cli.report import report
from fluxc.cli.tune import tune
from fluxrt.commands import CommandLine


@click.group(
    "fluxc",
    cls=CommandLine,
    on_interrupt="interrupted; finished stages are kept, run the command again to go on",
)
@click.version_option(fluxc.__version__, prog_name="fluxc")
def main() -> None:
    """Compile FLUX.2 checkpoints into bundles that a thin runtime generates with."""


for command in (
    *(init, schema),
    *(build, calibrate, trace, merge_traces),
    *(plan, predict, tune),
    *(inspect, report, verify, finish, export_onnx, doctor),
    *(gpu_check, add_evidence),
):
    main.add_command(command)
