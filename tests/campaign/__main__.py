"""`python -m campaign`: runs the parts, prints a table, and writes it as Markdown and JSON."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("damage", "kills", "resources", "load")
LONG = {"cases": 1000, "kills": 100, "sizes": 20, "threads": 8, "images": 200}
SHORT = {"cases": 6, "kills": 1, "sizes": 2, "threads": 3, "images": 6}
HELP = {
    "cases": "damaged inputs of each kind",
    "kills": "with each of three signals: of a build, and of generate in one process and in two",
    "sizes": "random sizes of a full disk and of memory",
    "threads": "that share a pipeline",
    "images": "of each thread",
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="campaign", description=__doc__)
    made.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--short", action="store_true", help="small numbers, and nothing that builds again and again")
    for name, meaning in HELP.items():
        made.add_argument(f"--{name}", type=int, help=f"{meaning} (default {LONG[name]}, short {SHORT[name]})")
    made.add_argument("--only", help="KIND or KIND/NUMBER of a damaged input")
    made.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    made.add_argument("--cache", type=Path, help="stage cache to build the bundle with (default: in the folder)")
    made.add_argument("--out", type=Path, help="write the table to OUT.md and OUT.json")
    made.add_argument("--part", help=argparse.SUPPRESS)
    return made


def main() -> int:
    options = parser().parse_args()
    for name, usual in (SHORT if options.short else LONG).items():
        if getattr(options, name) is None:
            setattr(options, name, usual)
    if options.part:
        from campaign.part import run_part

        return run_part(options)
    with tempfile.TemporaryDirectory(prefix="campaign-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        return _run(options, work)


def _run(options: argparse.Namespace, work: Path) -> int:
    """Each part in a process of its own, so that each begins with one thread and its own imports."""
    given = [*sys.argv[1:], "--work", str(work)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "FLUXC_CACHE": str(options.cache or work / "cache"),
    }
    paths = [str(ROOT), str(ROOT / "runtime"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    print(f"seed {options.seed}, in {work}", flush=True)
    failed, rows = [], []
    for part in ("bundle", *options.parts.split(",")):
        began, result = time.monotonic(), work / f"{part}.json"
        result.unlink(missing_ok=True)
        ended = subprocess.run([sys.executable, "-m", "campaign", *given, "--part", part], env=environment, check=False)
        if part == "bundle" and ended.returncode:
            return ended.returncode
        if not result.is_file() and part != "bundle":
            failed.append(f"{part}: ended with {ended.returncode} before its result")
        elif part != "bundle":
            took = time.monotonic() - began
            tallies = json.loads(result.read_text())
            rows += [{"part": part, **tally} for tally in tallies]
            failed += [failure for tally in tallies for failure in tally["failures"]]
            print(f"{part}: {took:.0f} s", flush=True)
    text = table(rows)
    print(text)
    if options.out:
        options.out.with_suffix(".md").write_text(text)
        about = {"command": " ".join(sys.argv[1:]), "seed": options.seed, "rows": rows}
        options.out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    for failure in failed:
        print(f"FAULT {failure}")
    return 1 if failed else 0


def table(rows: list[dict[str, object]]) -> str:
    """One line for each kind of case."""
    lines = ["| part | cases | how many | image or plan | error of ours | others |", "|---|---|---|---|---|---|"]
    for row in rows:
        counts = row["counts"]
        assert isinstance(counts, dict)
        good = sum(counts.get(what, 0) for what in ("image", "done"))
        others = ", ".join(
            f"{n} {what}" for what, n in sorted(counts.items()) if what not in ("image", "done", "error")
        )
        lines.append(
            f"| {row['part']} | {row['kind']} | {sum(counts.values())} | {good} | {counts.get('error', 0)} | {others or 0} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
