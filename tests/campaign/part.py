"""One part of the campaign, in its own process."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from campaign.cases import ROOT, Tally
from quick import QUICK, results_of

SETTINGS = (*QUICK, "targets=[{kind: onnxruntime}, {kind: onnxruntime, gpus: 2}]")
RECIPE = ROOT / "recipes" / "flux2-nano.yaml"


def run_part(options: argparse.Namespace) -> int:
    """Run `options.part` in the folder `options.work`, and write what it came to beside it."""
    work, part = options.work, options.part
    bundle = work / "bundles" / "campaign"
    if part == "bundle":
        return _build(bundle)
    tallies: list[Tally]
    if part == "damage":
        from campaign.damage import campaign as damage

        tallies = damage(bundle, _calibration(bundle), work / "damage", options.cases, options.seed, options.only)
    elif part == "kills":
        from campaign.kills import campaign as kills

        tallies = kills(bundle, work / "kills", options.kills, options.seed, not options.short)
    elif part == "resources":
        from campaign.resources import campaign as resources

        tallies = resources(bundle, work / "resources", options.sizes, options.seed, not options.short)
    else:
        from campaign.load import campaign as load

        tallies = load(bundle, options.threads, options.images)
    (work / f"{part}.json").write_text(json.dumps([tally.__dict__ for tally in tallies]))
    return 0


def _build(bundle: Path) -> int:
    """The bundle that all parts use: flux2-nano for one process, and for two."""
    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build
    from fluxc.recipe.load import load_recipe

    build(load_recipe(RECIPE, SETTINGS), bundle, StageProgress())
    return 0


def _calibration(bundle: Path) -> Path:
    cache = Path(os.environ["FLUXC_CACHE"])
    (folder,) = (folder for folder in results_of(cache, bundle) if folder.name.startswith("calibration-"))
    return folder / "calibration.safetensors"
