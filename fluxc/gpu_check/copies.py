"""How much of a step goes into copying block scales, which TensorRT-RTX does at every run of a plan with bound weights.

Two measurements. The library's profiler names kernels and their times; the plan's own text says which of them copy weights.
Where it says nothing: the bytes the audit counted, at the rate at which this GPU copies, which is the least they can take.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from fluxc.base.errors import BuildError
from fluxc.base.numbers import significant
from fluxc.gpu_check.child import Found
from fluxc.gpu_check.plan_runner import COPY_BYTES, copy_rate, running, timed
from fluxc.gpu_check.subject import Subject, recorded_images
from fluxc.targets.tensorrt.audit import Expected, copying_kernels
from fluxrt.manifest import TensorRTTarget
from fluxrt.resolve import branches, grid_of
from fluxrt.sharding import sizes_of

SLOWEST = 12


def check_copies(subject: Subject) -> Found:
    """By plan of `body`: calls, milliseconds eager and as a graph, bytes copied, and the share of copies."""
    bundle, target = subject.open()
    recorded = recorded_images(bundle, target)
    if not isinstance(target, TensorRTTarget) or not recorded:
        return Found(skipped="this target has no plans that copy weights")
    sampling, image = bundle.manifest.sampling, recorded[0]
    rows = len(branches(sampling, image.prompt, image.guidance))
    sizes = sizes_of(rows, grid_of(sampling, target, image.size))
    calls = Counter(call.plan for call in target.engine.programs["body"].calls)
    driver = subject.place.driver()
    library = subject.place.library(bundle, target, driver)
    rate = copy_rate(driver, subject.amount.runs, COPY_BYTES if not subject.place.is_rehearsal else 1 << 20)
    plans: dict[str, Any] = {}
    for name, count in calls.items():
        plan = target.engine.plans[name]
        data = bundle.checked_file(str(plan.file)).read_bytes()
        with running(driver, library, name, plan, data, sizes) as runner:
            found = timed(driver, runner, subject.amount.runs)
            kernels = runner.kernels()
        copied = int(target.engine.audit.get(name, {}).get("copied_bytes", 0))
        found |= {"calls": count, "copied_bytes": copied, "copies_at_least_ms": significant(1e3 * copied / rate)}
        plans[name] = found | profiled(kernels, data, msgspec.convert(plan.expected, Expected))
    driver.close()
    total = sum(found["calls"] * (found["graph_ms"] or found["eager_ms"]) for found in plans.values())
    least = sum(found["calls"] * found["copies_at_least_ms"] for found in plans.values())
    figures: dict[str, Any] = {
        "copy_bytes_per_s": rate,
        "body_ms": significant(total),
        "copies_at_least_share": significant(least / total),
        "plans": plans,
    }
    if all("copies_ms" in found for found in plans.values()):
        by_profiler = sum(found["calls"] * found["kernels_ms"] for found in plans.values())
        for what in ("copies", "quantize"):
            spent = sum(found["calls"] * found[f"{what}_ms"] for found in plans.values())
            figures[f"{what}_share"] = significant(spent / by_profiler)
    return Found(figures)


def profiled(kernels: dict[str, float], data: bytes, expected: Expected) -> dict[str, Any]:
    """What the profiler said of a plan: all kernels, those that copy weights, those named after quantizing, the slowest."""
    if not kernels:
        return {"profiler": "says nothing"}
    slowest = sorted(kernels, key=lambda name: -kernels[name])[:SLOWEST]
    figures: dict[str, Any] = {
        "kernels_ms": significant(sum(kernels.values())),
        "quantize_ms": significant(sum(took for name, took in kernels.items() if "quant" in name.lower())),
        "slowest_ms": {name: significant(kernels[name]) for name in slowest},
    }
    try:
        copying = copying_kernels(data, expected)
    except BuildError as error:
        return figures | {"profiler": f"which kernels copy cannot be read from the plan: {error}"}
    if copying and not copying & set(kernels):
        return figures | {"profiler": "names kernels otherwise than the plan's text, so copies cannot be told apart"}
    return figures | {"copies_ms": significant(sum(took for name, took in kernels.items() if name in copying))}
