"""Calibration: one pass of the model over the prompts, recording the largest input of every Linear."""
