"""Measures of difference between two arrays, and between two images."""

from __future__ import annotations

import math

import numpy as np

from fluxrt.evidence import cosine, relative_error

__all__ = ["SSIM_WINDOW", "cosine", "psnr", "relative_error", "ssim"]

SSIM_WINDOW = 11
"""Pixels a side: 3.5 standard deviations, of 1.5 pixels, in each direction."""


def psnr(ours: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of images in 0..1; at most 120, which identical images get."""
    from skimage.metrics import mean_squared_error

    error = mean_squared_error(reference.astype(np.float64), ours.astype(np.float64))
    return 120.0 if error < 1e-12 else -10 * math.log10(error)


def ssim(ours: np.ndarray, reference: np.ndarray) -> float | None:
    """Structural similarity of images [height, width, 3] in 0..1 (Wang et al. 2004, Gaussian window); None where the window,
    11 pixels a side, does not fit in."""
    from skimage.metrics import structural_similarity

    if min(reference.shape[:2]) < SSIM_WINDOW:
        return None
    return float(
        structural_similarity(
            reference,
            ours,
            channel_axis=2,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )
