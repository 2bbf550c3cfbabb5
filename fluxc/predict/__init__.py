"""Predicts how long a denoising step takes on GPUs that are not here, and says how far off it is where figures are known."""
