"""What a process may still take: of the machine, of its control groups, of its own limits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fluxrt.memory import available_memory

KB = 1024


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A machine with 48000 kB available, and a process in no group and without limits."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       64000 kB\nMemAvailable:   48000 kB\n")
    return tmp_path


def group(folder: Path, files: dict[str, str]) -> None:
    """A control group at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def test_without_limits_the_machines_memory_counts(system: Path) -> None:
    group(system / "sys/fs/cgroup", {"memory.max": "max", "memory.current": "1000000"})
    assert available_memory(system) == 48000 * KB


def test_a_containers_limit_counts(system: Path) -> None:
    group(system / "sys/fs/cgroup", {"memory.max": "9000000", "memory.current": "1000000"})
    assert available_memory(system) == 8000000


def test_the_tightest_of_the_nested_groups_counts(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("0::/build.slice/job.scope\n")
    root = system / "sys/fs/cgroup"
    group(root / "build.slice", {"memory.max": "20000000", "memory.current": "15000000"})
    group(root / "build.slice/job.scope", {"memory.max": "9000000", "memory.high": "max", "memory.current": "1000000"})
    assert available_memory(system) == 5000000
    group(root / "build.slice/job.scope", {"memory.high": "4000000"})
    assert available_memory(system) == 3000000


def test_files_that_a_group_holds_count_as_free(system: Path) -> None:
    stat = "anon 1000000\nfile 6000000\ninactive_file 5000000\nactive_file 500000"
    group(system / "sys/fs/cgroup", {"memory.max": "9000000", "memory.current": "8000000", "memory.stat": stat})
    assert available_memory(system) == 6500000


def test_a_limit_of_the_older_control_groups_counts(system: Path) -> None:
    (system / "proc/self/cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n")
    files = {"memory.limit_in_bytes": "9000000", "memory.usage_in_bytes": "2000000"}
    files["memory.stat"] = "inactive_file 1\ntotal_inactive_file 600000\ntotal_active_file 400000"
    group(system / "sys/fs/cgroup/memory", files)
    assert available_memory(system) == 8000000
    group(system / "sys/fs/cgroup/memory", {"memory.limit_in_bytes": "9223372036854771712"})
    assert available_memory(system) == 48000 * KB


def test_a_group_that_holds_more_than_its_limit_leaves_nothing(system: Path) -> None:
    group(system / "sys/fs/cgroup", {"memory.max": "1000000", "memory.current": "1000100"})
    assert available_memory(system) == 0


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="/proc is Linux's")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_the_process_counts(limit: str) -> None:
    """A process under a limit can take nearly what it was told it could, and no more."""
    code = (
        f"import resource\n"
        f"from fluxrt.memory import available_memory\n"
        f"resource.setrlimit(resource.{limit}, (1 << 30, 1 << 30))\n"
        "free = available_memory()\n"
        "assert 0 < free < 1 << 30, free\n"
        "taken = bytearray(free - (8 << 20))\n"
        "del taken\n"
        "try:\n"
        "    bytearray(free + (8 << 20))\n"
        "except MemoryError:\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"
