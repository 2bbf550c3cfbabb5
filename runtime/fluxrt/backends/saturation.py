"""Whether ONNX Runtime's products of uint8 and int8 are right on this CPU.

Instructions of x86 without VNNI add two products in 16 bits, and keep the largest number where the sum has no room. Nothing
says so. Which instructions ONNX Runtime uses is its own choice, so what it computes is looked at.
"""

from __future__ import annotations

import base64
from functools import cache

PROBE = (
    "CAgSADpsCh4KAWEKAWISB3Byb2R1Y3QiDU1hdE11bEludGVnZXISBWZsdXhjWhMKAWESDgoMCAISCAoCCAEKAghAWhMKAWISDgoMCAMSCAoCCEAKAggQYhkK"
    "B3Byb2R1Y3QSDgoMCAYSCAoCCAEKAggQQgQKABAK"
)
"""A model of one MatMulInteger, [1, 64] uint8 by [64, 16] int8."""


@cache
def saturates() -> bool:
    """Whether a product of large values comes out too small."""
    import numpy as np
    import onnxruntime

    from fluxrt.backends.onnxruntime import session_options

    options = session_options()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(base64.b64decode(PROBE), options, providers=["CPUExecutionProvider"])
    values = {"a": np.full((1, 64), 255, np.uint8), "b": np.full((64, 16), 127, np.int8)}
    return bool((session.run(None, values)[0] != 64 * 255 * 127).any())
