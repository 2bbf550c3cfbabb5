"""An interrupt at any moment of a command: one line and exit code 130, never a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import RECIPE

HIT = """\
import os, signal, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == {module!r}:
            sys.meta_path.remove(Finder)
            {then}
sys.meta_path.insert(0, Finder)
"""
INTERRUPTED = "os.kill(os.getpid(), signal.SIGINT)"
BURIED = "raise ImportError('initialization failed') from KeyboardInterrupt()"
TERMINATED = """try:
                os.kill(os.getpid(), signal.SIGTERM)
            except BaseException as error:
                raise ImportError('initialization failed') from error"""
LOST = """try:
                os.kill(os.getpid(), signal.{sent})
            except BaseException:
                pass
            import time
            time.sleep(60)"""
CLEANING = """\
import os, signal, time
from fluxrt.signals import ended_by_signals
with ended_by_signals():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        time.sleep(1.2)
        print("cleaned", flush=True)
"""
RUN = "from {command}.entry import main\nsys.exit(main(sys.argv[1:]))\n"


def ended(code: str, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, preexec_fn=_take_sigint)
    return done.returncode, done.stderr


def _take_sigint() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    ("command", "module"), [("fluxc", "click"), ("fluxc", "fluxc.base.errors"), ("fluxrt", "click")]
)
def test_while_the_program_is_read(command: str, module: str) -> None:
    code = HIT.format(module=module, then=INTERRUPTED) + RUN.format(command=command)
    assert ended(code, "--version") == (130, f"{command}: interrupted\n")


def test_while_a_command_reads_a_library(nano_bundle: Path, tmp_path: Path) -> None:
    """What pybind11 makes of an interrupt while ONNX Runtime is loaded."""
    arguments = ("generate", "-q", str(nano_bundle), "--prompt", "a dot", "--out", str(tmp_path / "x.png"))
    for then in (INTERRUPTED, BURIED):
        code = HIT.format(module="onnxruntime", then=then) + RUN.format(command="fluxrt")
        assert ended(code, *arguments) == (130, "fluxrt: interrupted\n")
    code = HIT.format(module="onnxruntime", then=TERMINATED) + RUN.format(command="fluxrt")
    assert ended(code, *arguments) == (143, "")
    code = HIT.format(module="ruamel.yaml", then=TERMINATED) + RUN.format(command="fluxc")
    assert ended(code, "plan", str(RECIPE)) == (143, "")
    code = HIT.format(module="ruamel.yaml", then=BURIED) + RUN.format(command="fluxc")
    status, said = ended(code, "plan", str(RECIPE))
    assert (status, said.count("\n")) == (130, 1)
    assert said.startswith("fluxc: interrupted; ")


def test_when_the_command_is_done() -> None:
    late = "import atexit, os, signal, sys\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
    assert ended(late + RUN.format(command="fluxc"), "--version") == (0, "")


def test_who_ignores_interrupts_goes_on_doing_so() -> None:
    ignored = "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code = ignored + HIT.format(module="click", then=INTERRUPTED) + RUN.format(command="fluxc")
    assert ended(code, "--version") == (0, "")


@pytest.mark.parametrize(("sent", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_that_a_library_loses_is_raised_again(sent: str, code: int) -> None:
    """As `except ImportError` does around a library that makes an error of its own out of it."""
    lost = HIT.format(module="ruamel.yaml", then=LOST.format(sent=sent)) + RUN.format(command="fluxc")
    assert ended(lost, "plan", str(RECIPE))[0] == code


def test_what_a_command_does_when_it_is_ended_is_not_interrupted_by_the_same_signal() -> None:
    command = [sys.executable, "-c", CLEANING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "cleaned\n", "")
