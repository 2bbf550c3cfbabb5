"""`fluxc add-evidence` and `fluxc finish`: what a GPU check or a replay found becomes part of the bundle it ran.

1. The file must be whole (its seal), of a GPU (no rehearsal), and about this very bundle: the digest the bundle has without
   evidence, and the SHA-256 of every graph, plan and weights file.
2. Of the same GPU with the same driver and libraries there is one entry of checks and one of replays, the last ones added.
3. New files of the report have names of their own, the manifest comes last by rename, and only then do older ones go.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import msgspec

from fluxc.base.errors import BuildError
from fluxc.base.output import check_writable, names_place
from fluxc.fidelity.on_target import FILES, digest_without_entries, entries_of, with_entries
from fluxc.gpu_check import page
from fluxc.gpu_check.record import Record, read_record
from fluxc.gpu_check.subject import file_hashes
from fluxc.report.assemble import as_it_is
from fluxc.report.page import IMAGES, render
from fluxc.report.structs import REPORT_JSON, read_report
from fluxrt.bundle import Bundle, open_bundle, sha256_file
from fluxrt.manifest import MANIFEST, CheckFound, Device, File, OnTarget, decode_manifest, encode_manifest

RAN, FAILED, MATCHED = "ran on the target", "failed on the target", "matched on the target"
"""Tiers: images came out as the CPU's did; they did not, or crashed; and beyond the first, every stage did too."""
REPLAYED = "evidence:"
"""What the names of checks begin with that replayed the bundle's evidence; the target's name follows."""
NAME_DIGITS = 16


def add_evidence(path: Path, file: Path) -> str:
    """Put the figures of the GPU check `file` into the bundle at `path`; what was done, in a sentence.

    Raises BuildError naming what is wrong with the file, or the hash that differs, and the errors of opening a bundle. The
    bundle is the old one or the new one, whatever happens.
    """
    return add_record(path, file)


def add_record(path: Path, file: Path) -> str:
    """As add_evidence, of any file of records: one of checks, or one of a replay."""
    record = read_record(file)
    if record.rehearsal:
        raise BuildError(
            f"{file}: a rehearsal on a made-up GPU, of which no figure means anything; run gpu-check on a GPU"
        )
    bundle = open_bundle(path)
    check_same(bundle, record, file)
    if not any(
        name.startswith(("images:", REPLAYED)) and found.status != "skipped" for name, found in record.checks.items()
    ):
        raise BuildError(
            f"{file}: no target of the bundle ran there, so there is nothing to add; see what it says of targets"
        )
    check_writable(path)
    check_writable(path.resolve().parent)
    added = entry_of(record, file)
    kept = [entry for entry in entries_of(bundle.manifest) if not _same_machine(entry, added)]
    entries = tuple(sorted([*kept, added], key=lambda entry: (entry.gpu, entry.seal)))
    with names_place("add-evidence", path):
        _seal(bundle, entries, file)
    tiers = ", ".join(f"{name} {tier}" for name, tier in added.tiers.items())
    return f"{path}: {added.gpu}: {tiers}; entries of {len(entries)} machines in all"


def check_same(bundle: Bundle, record: Record, file: Path) -> None:
    """Refuse a record of another bundle; BuildError names the first hash that differs."""
    ours, theirs = file_hashes(bundle), record.ran.files
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise BuildError(
                f"{file}: made with another bundle: {name} has SHA-256 {_short(theirs.get(name))} there and "
                f"{_short(ours.get(name))} in {bundle.root}; run gpu-check with this bundle"
            )
    digest = digest_without_entries(bundle.manifest)
    if digest != record.ran.bundle:
        raise BuildError(
            f"{file}: made with another bundle: its digest without evidence is {_short(record.ran.bundle)}, that of "
            f"{bundle.root} is {_short(digest)} (other recipe, prompts or report; the files that run are equal); run gpu-check "
            "with this bundle"
        )


def entry_of(record: Record, file: Path) -> OnTarget:
    """The manifest's entry: tiers by target, what ran on what, and outcome and figures of every check."""
    checks = {name: CheckFound(found.status, found.why, found.figures) for name, found in record.checks.items()}
    try:
        device = msgspec.convert(record.ran.device, Device)
    except msgspec.ValidationError as error:
        raise BuildError(f"{file}: damaged: device: {error}; run gpu-check again") from None
    return OnTarget(tiers_of(record), record.seal, record.ran.bundle, device, record.ran.versions, checks)


def tiers_of(record: Record) -> dict[str, str]:
    """By target that was tried on the GPU: whether it ran, and whether every stage was as on a CPU."""
    tiers = {}
    for name, found in record.checks.items():
        kind, _, target = name.partition(":")
        if kind not in ("images", "ranks", REPLAYED[:-1]) or found.status == "skipped":
            continue
        if found.status == "passed" and name.startswith(REPLAYED):
            tiers[target] = MATCHED
        elif found.status != "passed":
            tiers[target] = FAILED
        else:
            stages = record.checks.get(f"stages:{target}")
            tiers[target] = MATCHED if stages and stages.status == "passed" else RAN
    return tiers


def _same_machine(one: OnTarget, other: OnTarget) -> bool:
    return (one.device, one.versions, _is_replay(one)) == (other.device, other.versions, _is_replay(other))


def _is_replay(entry: OnTarget) -> bool:
    """Whether the entry is of a replay, which a GPU check does not replace."""
    return all(name.startswith(REPLAYED) for name in entry.checks)


def _short(digest: str | None) -> str:
    return digest[:16] if digest else "nothing"


def _seal(bundle: Bundle, entries: tuple[OnTarget, ...], file: Path) -> None:
    """Put the report's files and then the manifest into the bundle, and take those away that it no longer names."""
    with tempfile.TemporaryDirectory(prefix=".evidence-", dir=bundle.root.resolve().parent) as name:
        scratch = Path(name)
        (scratch / FILES).parent.mkdir(parents=True)
        for entry in entries:
            record = f"{FILES}{entry.seal[:NAME_DIGITS]}.json"
            kept = bundle.root / record
            (scratch / record).write_bytes(kept.read_bytes() if record in bundle.manifest.files else file.read_bytes())
        records = [read_record(path) for path in sorted(scratch.rglob("*.json"))]
        text = _page(bundle, entries, records).encode()
        (scratch / f"{FILES}{hashlib.sha256(text).hexdigest()[:NAME_DIGITS]}.html").write_bytes(text)
        files = {
            path.relative_to(scratch).as_posix(): File(path.stat().st_size, sha256_file(path))
            for path in sorted((scratch / FILES).parent.iterdir())
        }
        manifest = with_entries(bundle.manifest, entries, files)
        sealed = scratch / MANIFEST
        sealed.write_bytes(encode_manifest(manifest))
        for added in files:
            if added not in bundle.manifest.files:
                (scratch / added).replace(bundle.root / added)
        sealed.replace(bundle.root / MANIFEST)
    for old in (bundle.root / FILES).parent.glob(f"{Path(FILES).name}*"):
        if old.relative_to(bundle.root).as_posix() not in files:
            old.unlink()


def _page(bundle: Bundle, entries: tuple[OnTarget, ...], records: list[Record]) -> str:
    """The bundle's report with these entries; where an older fluxc wrote the report, the figures of the GPUs alone."""
    try:
        report = read_report(bundle.path(REPORT_JSON))
    except BuildError:
        return page.render(records, {}, pictures=False)
    # As it will be read again: entries that were in the manifest before have their fields in its order.
    sealed = decode_manifest(encode_manifest(with_entries(bundle.manifest, entries, {})))
    return render(as_it_is(report, sealed), bundle.root / IMAGES)


def evidence_lines(entries: tuple[OnTarget, ...], digest: str) -> list[str]:
    """What `fluxc inspect` says of the entries of a bundle whose digest without them is `digest`."""
    lines = []
    for entry in entries:
        earlier = "" if entry.bundle == digest else " (before the bundle was finished)"
        for target, tier in entry.tiers.items():
            steps = entry.checks.get(f"steps:{target}")
            step = steps.figures.get("step") if steps else None
            timed = ""
            if isinstance(step, dict):
                timed = f"; a step {step.get('p50_ms')} ms (p50), {step.get('p99_ms')} ms (p99) of {step.get('count')}"
            replayed = entry.checks.get(f"{REPLAYED}{target}")
            if replayed:
                timed = f"; evidence replayed: {', '.join(replayed.figures['stages'])}"
            lines.append(f"{target}: {tier}: {entry.gpu}, driver {entry.device.driver}{timed}{earlier}")
    return lines
