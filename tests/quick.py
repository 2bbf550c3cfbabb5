"""The quick build of flux2-nano, and what a bundle consists of: for tests, and for the campaign, which imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from fluxc.base.cache import USED

QUICK = (
    "calibration.prompts=../tests/data/two-prompts.txt",
    "fidelity.prompts=../tests/data/two-prompts.txt",
    "sampling.steps=3",
    "calibration.margin=1",
    "precision.transformer.scales=max",
    "gates={}",
)


def contents(bundle: Path) -> dict[str, bytes]:
    """Every file's bytes; of the manifest, all but the time it was built."""
    files = {p.relative_to(bundle).as_posix(): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    manifest = json.loads(files["bundle.json"])
    assert manifest["provenance"].pop("built_at")
    files["bundle.json"] = json.dumps(manifest, sort_keys=True).encode()
    return files


def results_of(cache: Path, bundle: Path) -> list[Path]:
    """What `bundle` was made from, in the stage cache."""
    notes = [json.loads(note.read_text()) for note in (cache / USED).glob("*.json")]
    (entry,) = (note for note in notes if note["owner"] == str(bundle.resolve()))
    return [cache / name for name in entry["results"]]
