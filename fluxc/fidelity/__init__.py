"""Fidelity: every stage of every target compared with diffusers on the same input; gates; the report."""
