"""Generates a bundle's recorded images again with every target that runs here; exits with 1 where one is another image."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import fluxrt
from fluxrt.bundle import open_bundle

LEAST_PSNR_DB = 40.0

bundle = open_bundle(Path(sys.argv[1]))
for recorded in {image.target: image for image in bundle.manifest.images}.values():
    pipeline = fluxrt.load(bundle.root, target=recorded.target)
    request = fluxrt.Request(
        recorded.prompt, seed=recorded.seed, steps=recorded.steps, guidance=recorded.guidance, size=recorded.size
    )
    image = np.asarray(pipeline.generate(request).images[0], np.float64)
    expected = np.asarray(Image.open(bundle.path(recorded.file)).convert("RGB"), np.float64)
    psnr = -10 * np.log10(max(np.square((image - expected) / 255).mean(), 1e-12))
    print(f"{recorded.target}: {psnr:.1f} dB of the recorded image")
    if psnr < LEAST_PSNR_DB:
        sys.exit(f"{recorded.target}: at least {LEAST_PSNR_DB:g} dB is expected")
