"""Runs a command as if this CPU had no AVX-512 and no VNNI: x86 with AVX2, as desktop CPUs up to 2020 are.

    python benchmarks/without_avx512.py python benchmarks/cpu_step.py

torch, oneDNN and OpenVINO have switches for that. ONNX Runtime asks the CPU itself, so the command gets a copy of it whose
CPUID instructions are traps, and a library that answers them without the bits of AVX-512, VNNI and AMX. Needs Linux on x86-64,
gcc and objdump. The clock of such a CPU differs from this one's: figures compare ways of computing, not machines.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SWITCHES = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
ANSWER = r"""
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>
static void answer(int number, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    unsigned a, b, c, d, leaf = r[REG_RAX], part = r[REG_RCX];
    __cpuid_count(leaf, part, a, b, c, d);
    if (leaf == 7 && part == 0) { b &= ~0xDC230000u; c &= ~0x5842u; d &= ~0x03C0010Cu; }
    if (leaf == 7 && part == 1) { a &= ~0x30u; d &= ~0x430u; }
    r[REG_RAX] = a; r[REG_RBX] = b; r[REG_RCX] = c; r[REG_RDX] = d;
}
__attribute__((constructor)) static void install(void) {
    struct sigaction action = {0};
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGTRAP, &action, 0);
}
"""
CPUID, TRAP = b"\x0f\xa2", b"\xcc\x90"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="without-avx512-") as folder:
        sys.exit(subprocess.run(sys.argv[1:], env=environment(Path(folder))).returncode)


def can_mask() -> bool:
    """Whether this machine has what it takes."""
    return sys.platform == "linux" and os.uname().machine == "x86_64" and all(map(shutil.which, ("gcc", "objdump")))


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that sees no AVX-512; what it needs is made in `folder`."""
    import onnxruntime

    copy = folder / "packages" / "onnxruntime"
    shutil.copytree(Path(onnxruntime.__file__).parent, copy, symlinks=True)
    (library,) = (copy / "capi").glob("onnxruntime_pybind11_state*.so")
    replace_cpuid(library)
    source, answers = folder / "answer.c", folder / "answer.so"
    source.write_text(ANSWER)
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", str(source), "-o", str(answers)], check=True)
    path = os.pathsep.join(filter(None, (str(folder / "packages"), os.environ.get("PYTHONPATH"))))
    return {**os.environ, **SWITCHES, "PYTHONPATH": path, "LD_PRELOAD": str(answers)}


def replace_cpuid(library: Path) -> None:
    """Make every CPUID instruction of a shared library a trap."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)], check=True, capture_output=True, text=True
    ).stdout
    addresses = [int(found, 16) for found in re.findall(r"^ *([0-9a-f]+):\tcpuid", listing, re.MULTILINE)]
    headers = subprocess.run(["objdump", "-h", str(library)], check=True, capture_output=True, text=True).stdout
    text = re.search(r" \.text +\w+ +(\w+) +\w+ +(\w+) ", headers)
    assert text
    assert addresses, "no CPUID instruction was found"
    shift = int(text[2], 16) - int(text[1], 16)
    content = bytearray(library.read_bytes())
    for address in addresses:
        at = address + shift
        assert content[at : at + 2] == CPUID
        content[at : at + 2] = TRAP
    library.write_bytes(content)


if __name__ == "__main__":
    main()
