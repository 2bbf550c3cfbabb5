"""Values of ONNX graphs."""

from __future__ import annotations

import onnx


def renamed(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    """A copy of `value` under another name."""
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy
