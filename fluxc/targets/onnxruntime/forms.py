"""The formats that ONNX Runtime's graphs have a form of their own for; free of onnx, for checks before any stage."""

FORMS = ("nvfp4", "fp8")
"""Any other format but bf16 goes through its reference form, on the CPU only."""
