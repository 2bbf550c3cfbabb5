"""Checks that fail, crash and hang, for the processes of `fluxc gpu-check`: a module that costs them little to import."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fluxc.gpu_check.child import Found
from fluxc.gpu_check.subject import Subject
from fluxrt.errors import BackendError


def passes(subject: Subject) -> Found:
    with Path(subject.settings["counter"]).open("a") as counter:
        counter.write("x")
    return Found({"value": 1})


def fails(subject: Subject) -> Found:
    raise BackendError("cuMemAlloc failed: CUDA_ERROR_NOT_PERMITTED")


def breaks(subject: Subject) -> Found:
    raise ZeroDivisionError("one by none")


def crashes(subject: Subject) -> Found:
    print("what the library said", flush=True)
    os.abort()


def hangs(subject: Subject) -> Found:
    time.sleep(600)
    return Found()


def comes_to_nan(subject: Subject) -> Found:
    return Found({"psnr": [float("nan")]})


def does_not_apply(subject: Subject) -> Found:
    return Found(skipped="torch is not installed")
