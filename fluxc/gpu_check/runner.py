"""Runs checks one after the other, each in a process of its own, and keeps what was found after every one."""

from __future__ import annotations

import fnmatch
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from fluxc.base.cache import cache_root
from fluxc.base.errors import BuildError, nearest
from fluxc.base.numbers import floats
from fluxc.base.output import check_output
from fluxc.base.progress import StageProgress
from fluxc.fidelity.on_target import digest_without_entries
from fluxc.gpu_check.checks import Check, checks_for
from fluxc.gpu_check.child import Ended, Found, run_limited
from fluxc.gpu_check.machine import Inventory, look
from fluxc.gpu_check.page import write_page
from fluxc.gpu_check.place import Place
from fluxc.gpu_check.record import Outcome, Ran, Record, new_record, read_record, write_record
from fluxc.gpu_check.subject import Amount, Subject, file_hashes
from fluxrt.bundle import Bundle, open_bundle
from fluxrt.errors import RequestError

LOOK_LIMIT = 120.0
DRY_RUN = "`fluxc gpu-check --dry-run` rehearses the checks on this machine's CPU"


def gpu_check(
    path: Path,
    out: Path,
    place: Place,
    amount: Amount,
    again: tuple[str, ...] = (),
    progress: StageProgress | None = None,
) -> Iterator[str]:
    """Run every check that `out` does not hold yet; yields a line for each, and what it came to.

    `out` and the page beside it are written after every check. Checks that it holds are not repeated where GPU, driver,
    libraries, bundle and fluxc are the same, unless a name or pattern of `again` matches. Raises BuildError without a GPU, and
    where `out` is about another bundle or GPU; the errors of opening a bundle; RequestError for an unknown name in `again`.
    """
    progress = progress or StageProgress()
    bundle = open_bundle(path)
    check_output(out, "a file of gpu-check")
    with progress.stage("look what is here"):
        inventory = _look(place, path, progress)
    ran = Ran(
        bundle.manifest.name,
        digest_without_entries(bundle.manifest),
        file_hashes(bundle),
        inventory.device,
        inventory.versions,
    )
    record = new_record(ran, place.is_rehearsal)
    checks = checks_for(bundle, inventory, amount, place.is_rehearsal)
    known = _kept(out, record)
    if known and not known.checks:
        yield f"{out}: driver, libraries or fluxc are others than those of its checks, which are all repeated"
    repeated = _matching(again, checks)
    kept = {
        check.name: known.checks[check.name]
        for check in checks
        if known
        and check.name in known.checks
        and check.name not in repeated
        and not _is_skip(known.checks[check.name])
    }
    yield f"{bundle.manifest.name} on {_device_line(inventory)}: {len(checks)} checks, {len(kept)} of them known"
    progress.expect(1 + len(checks) - len(kept))
    with tempfile.TemporaryDirectory(prefix="fluxc-gpu-check-") as kernels:
        for check in checks:
            if check.name in kept:
                yield f"{check.name}: known ({kept[check.name].status})"
                outcome = kept[check.name]
            else:
                with progress.stage(check.name):
                    outcome = _run(check, bundle, place, amount, kernels, out)
                yield line_of(check.name, outcome)
            record = msgspec.structs.replace(record, checks={**record.checks, check.name: outcome})
            # What is known of later checks must not be lost when this run is ended.
            later = {name: found for name, found in kept.items() if name not in record.checks}
            keeping = msgspec.structs.replace(record, checks={**record.checks, **later})
            write_record(out, keeping)
            write_page(page_of(out), read_record(out), {one.name: f"{one.shows} (needs {one.needs})" for one in checks})
    yield f"{out} and {page_of(out)}: {summary(record)}"


def page_of(out: Path) -> Path:
    """The page beside a file of gpu-check."""
    return out.with_suffix(".html")


def line_of(name: str, outcome: Outcome) -> str:
    """A check's outcome in a line."""
    return f"{name}: {outcome.status} ({outcome.seconds:.1f} s)" + (f": {outcome.why}" if outcome.why else "")


def summary(record: Record) -> str:
    """How many checks ended how."""
    statuses = [outcome.status for outcome in record.checks.values()]
    return ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(sorted(statuses)))


def _look(place: Place, path: Path, progress: StageProgress) -> Inventory:
    """What is here, found in a process of its own, so that this one never touches a GPU."""
    ended = run_limited(look, (place, str(path)), LOOK_LIMIT)
    if ended.how != "returned":
        for line in ended.log.splitlines():
            progress.explain(line)
        raise BuildError(
            f"gpu-check needs a GPU: {' '.join(ended.why.split())}. {DRY_RUN}; -v shows what libraries say"
        )
    inventory: Inventory = ended.value
    return inventory


def _kept(out: Path, record: Record) -> Record | None:
    """What `out` holds already, without its checks where they ran under other versions; None if there is no such file."""
    if not out.exists():
        return None
    known = read_record(out)
    if known.rehearsal != record.rehearsal:
        made = "a rehearsal" if known.rehearsal else "checks of a GPU"
        raise BuildError(f"{out}: holds {made}; give another --out, or remove it")
    for what, theirs, ours in (
        ("bundle", known.ran.bundle, record.ran.bundle),
        ("GPU", _gpus(known.ran), _gpus(record.ran)),
    ):
        if theirs != ours:
            raise BuildError(
                f"{out}: holds checks of another {what} ({_short(theirs)} there, {_short(ours)} here); give another --out, or "
                "remove it"
            )
    return known if known.ran == record.ran else msgspec.structs.replace(known, checks={})


def _gpus(ran: Ran) -> list[str]:
    return [f"{gpu['name']} {gpu['id']}" for gpu in ran.device["gpus"]]


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else ", ".join(value)


def _matching(again: tuple[str, ...], checks: list[Check]) -> set[str]:
    """The checks that names or patterns in `again` name; "steps" names the steps of every target."""
    names = [check.name for check in checks]
    kinds = list(dict.fromkeys(name.partition(":")[0] for name in names))
    found: set[str] = set()
    for pattern in again:
        matched = [n for n in names if fnmatch.fnmatchcase(n, pattern) or n.partition(":")[0] == pattern]
        if not matched:
            raise RequestError(
                f"--again {pattern}: no check has this name{nearest(pattern, kinds)}; there are {', '.join(names)}"
            )
        found.update(matched)
    return found


def _is_skip(outcome: Outcome) -> bool:
    return outcome.status == "skipped"


def _run(check: Check, bundle: Bundle, place: Place, amount: Amount, kernels: str, out: Path) -> Outcome:
    if check.skipped or check.work is None:
        return Outcome("skipped", why=check.skipped)
    pictures = str(out.absolute().with_suffix("")) + "-images"
    subject = Subject(
        place, str(bundle.root), check.target, amount, kernels, pictures, str(cache_root(out)), check.settings
    )
    return outcome_of(run_limited(check.work, (subject,), check.limit))


def outcome_of(ended: Ended) -> Outcome:
    """How a check ended, from how its process did."""
    seconds = round(ended.seconds, 2)
    if ended.how != "returned":
        return Outcome(ended.how, seconds, ended.why, log=ended.log)
    found: Found = ended.value
    if found.skipped:
        return Outcome("skipped", seconds, found.skipped)
    bad = [f"{place} came to {number}" for place, number in floats(found.figures) if not math.isfinite(number)]
    faults = [*found.faults, *bad]
    log = ended.log if faults else ""
    return Outcome("failed" if faults else "passed", seconds, "; ".join(faults), _finite(found.figures), log)


def _finite(value: Any) -> Any:
    """`value` with null for every number that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _device_line(inventory: Inventory) -> str:
    gpus = [gpu["name"] for gpu in inventory.device["gpus"]]
    return f"{len(gpus)} x {gpus[0]}, driver {inventory.device['driver']}, CUDA {inventory.device['cuda']}"
