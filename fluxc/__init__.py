"""fluxc compiles FLUX.2 checkpoints into bundles: quantized weights, graphs, and the evidence that the images are right."""

__version__ = "0.1.0"
