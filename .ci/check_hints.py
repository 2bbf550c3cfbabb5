"""Runs what fluxrt.install says in the environment that runs, with --dry-run: fluxc or fluxrt [EXTRA...], all by default."""

import subprocess
import sys

from fluxrt.install import _project, install_extra, source_of

# Their packages get their own from NVIDIA's index while they are built; or they are for tests, and installed by `make test`.
LEFT_OUT = ("tensorrt", "test", "lint", "bench")

name, only = sys.argv[1], sys.argv[2:]
extras = only or [extra for extra in _project(name)[1] if extra not in LEFT_OUT]
print(f"{source_of(name)}: {', '.join(extras)}")
for extra in extras:
    command = f"{install_extra(name, extra)} --dry-run --quiet"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{command}\n{ended.stderr}")
