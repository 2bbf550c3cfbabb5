"""Gates: the worst result a recipe allows."""

from __future__ import annotations

from typing import Any

from fluxc.base.errors import GateError
from fluxc.recipe.structs import Gates


def check_gates(
    gates: Gates,
    layer_snr_db: dict[str, float],
    targets: dict[str, dict[str, Any]],
    cached: dict[str, Any] | None = None,
) -> None:
    """Raise GateError naming every figure that misses its gate.

    `layer_snr_db` holds the weight SNR of the layers the build quantized, `targets` figures by target (see compare_target),
    `cached` those of images with the step cache (see frontier.figures).
    """
    # Written as "not at least", so that a NaN misses its gate.
    misses = []
    if gates.layer_snr_db is not None:
        low = {name: snr for name, snr in layer_snr_db.items() if not snr >= gates.layer_snr_db}
        if low:
            worst = sorted(low, key=lambda name: low[name])[:4]
            listed = ", ".join(f"{name} {low[name]:.2f} dB" for name in worst)
            misses.append(f"{len(low)} layers under layer_snr_db {gates.layer_snr_db}: {listed}")
    for field in ("step_cosine", "image_psnr_db"):
        gate = getattr(gates, field)
        if gate is None:
            continue
        for name, figures in targets.items():
            if not figures[field] >= gate:
                misses.append(f"target {name}: {field} {figures[field]} under {gate}")
    if gates.step_cache_psnr_db is not None and not (cached and cached["psnr_db"] >= gates.step_cache_psnr_db):
        found = (
            f"{cached['psnr_db']} under {gates.step_cache_psnr_db}" if cached else "not measured, no target runs here"
        )
        misses.append(f"step cache: step_cache_psnr_db {found}")
    if misses:
        raise GateError(
            f"gates: {'; '.join(misses)}. No bundle was written; keep more layers in higher precision, skip fewer steps, "
            "or lower the gate in the recipe if this loss is acceptable"
        )
