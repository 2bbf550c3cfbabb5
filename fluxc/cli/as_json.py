"""What `inspect --json` prints: a bundle's manifest, summed up. Its fields are stable; docs/cli.md lists them."""

from __future__ import annotations

from typing import Any

import msgspec

from fluxc.fidelity.on_target import entries_of
from fluxrt.bundle import Bundle
from fluxrt.manifest import Manifest, Target, TensorRTTarget


def bundle_fields(bundle: Bundle) -> dict[str, Any]:
    """A bundle as JSON: where it comes from, precision, targets with their figures, sizes."""
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "digest": manifest.digest,
        "format_version": manifest.format_version,
        "family": manifest.family,
        "source": manifest.provenance.source,
        "commits": manifest.provenance.commits or {},
        "built_at": manifest.provenance.built_at,
        "tools": manifest.provenance.tools,
        "sizes": [list(size) for size in manifest.sampling.sizes],
        "size_range": [list(size) for size in manifest.sampling.range] if manifest.sampling.range else None,
        "steps": manifest.sampling.steps,
        "guidance": manifest.sampling.guidance,
        "text_tokens": manifest.prompting.length,
        "precision": _precision(manifest),
        "targets": [_target(manifest, target) for target in manifest.targets],
        "compared": None if manifest.fidelity.level is msgspec.UNSET else manifest.fidelity.level,
        "not_compared": (
            []
            if manifest.fidelity.not_compared is msgspec.UNSET
            else msgspec.to_builtins(manifest.fidelity.not_compared)
        ),
        "evidence": msgspec.to_builtins(manifest.recorded),
        "step_cache": msgspec.to_builtins(manifest.step_cache),
        "step_cache_fidelity": manifest.fidelity.step_cache or None,
        "on_target": msgspec.to_builtins(entries_of(manifest)),
        "files": len(manifest.files),
        "bytes": sum(file.size for file in manifest.files.values()),
    }


def _precision(manifest: Manifest) -> list[dict[str, Any]]:
    """By component and format: how many layers, and the bytes of their weights before and after."""
    totals: dict[tuple[str, str], dict[str, Any]] = {}
    for layer in manifest.precision:
        empty = {"component": layer.component, "format": layer.format}
        row = totals.setdefault(
            (layer.component, layer.format), empty | dict.fromkeys(("layers", "bytes_before", "bytes_after"), 0)
        )
        row["layers"] += 1
        row["bytes_before"] += layer.bytes_before
        row["bytes_after"] += layer.bytes_after
    return list(totals.values())


def _target(manifest: Manifest, target: Target) -> dict[str, Any]:
    """A target, with its figures against diffusers, or, where it is sharded, against the target that is not."""
    ranked = manifest.fidelity.ranks.get(target.name)
    unfinished = target.engine.unfinished if isinstance(target, TensorRTTarget) else []
    return {
        "name": target.name,
        "kind": msgspec.to_builtins(target)["kind"],
        "device": target.device,
        "gpus": target.gpus,
        "unfinished": unfinished,
        "fidelity": msgspec.to_builtins(manifest.fidelity.targets.get(target.name)),
        "ranks": msgspec.to_builtins(ranked),
    }
