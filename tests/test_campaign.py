"""The campaign of `make campaign` in its short form: no fault in a few cases of every kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from campaign.cases import Outcome, Tally, outcome_of
from fluxrt.errors import BundleError


def test_a_few_cases_of_every_kind_have_no_fault(shared_cache: Path, tmp_path: Path) -> None:
    arguments = ["--short", "--cache", str(shared_cache), "--work", str(tmp_path), "--out", str(tmp_path / "table")]
    command = [sys.executable, "-m", "campaign", *arguments]
    folder = Path(__file__).parent
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, "\n".join(line for line in ended.stdout.splitlines() if line.startswith("FAULT"))
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert len(rows) > 25
    assert all(row.endswith(("| 0 |", "skipped |")) for row in rows)


def test_only_our_errors_count_as_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: Exception) -> Outcome:
        def work() -> None:
            raise error

        return outcome_of(work)

    assert fails(BundleError("damaged")) == Outcome("error", "damaged")
    assert fails(KeyError("x")).what == "exception"
    assert not fails(MemoryError()).is_good
    log = tmp_path / "said"
    for said, what in (("target x\nfluxrt: no room", "error"), ("unexpected error, KeyError", "exception")):
        log.write_text(f"fluxrt: {said}\n")
        assert outcome_of(lambda: 1, log).what == what
    tally = Tally("kind")
    tally.add("kind/1 (seed 7): bytes", fails(KeyError("x")))
    assert "FAULT kind/1 (seed 7): bytes: exception: KeyError" in capsys.readouterr().out
