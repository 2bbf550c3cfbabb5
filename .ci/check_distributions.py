"""Checks that the wheels and sdists in a folder hold every file of the packages, and the licence: FOLDER CLONE."""

import sys
import tarfile
import zipfile
from pathlib import Path

LICENCES = ("LICENSE", "NOTICE")

dist, clone = map(Path, sys.argv[1:])
faults = []
for name, root in (("fluxc", clone), ("fluxrt", clone / "runtime")):
    (wheel,), (sdist,) = dist.glob(f"{name}-*.whl"), dist.glob(f"{name}-*.tar.gz")
    sources = {
        path.relative_to(root).as_posix()
        for path in (root / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {member.partition("/")[2] for member in archive.getnames()}
    information = next(file.partition("/")[0] for file in in_wheel if file.endswith(".dist-info/METADATA"))
    licences = {f"{information}/licenses/{licence}" for licence in LICENCES}
    faults += [f"{wheel.name} lacks {file}" for file in sorted((sources | licences) - in_wheel)]
    faults += [f"{wheel.name} holds {file}" for file in sorted(f for f in in_wheel - sources if ".dist-info/" not in f)]
    faults += [
        f"{sdist.name} lacks {file}"
        for file in sorted((sources | {*LICENCES, "README.md", "pyproject.toml"}) - in_sdist)
    ]
    metadata = zipfile.ZipFile(wheel).read(f"{information}/METADATA").decode()
    faults += [
        f"{wheel.name}: its metadata lacks {line!r}"
        for line in ("License-Expression: Apache-2.0",)
        if line not in metadata
    ]
    faults += [f"{wheel.name}: its metadata names a place on this machine" for _ in [0] if "file:" in metadata]
    print(f"{wheel.name}: {len(sources)} files; {sdist.name}: {len(in_sdist)}")
if faults:
    sys.exit("\n".join(faults))
