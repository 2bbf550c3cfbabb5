"""Weights that a session keeps packed for its products, made in memory: constants of a graph, in place of its inputs.

ONNX Runtime packs constants when a session is made, and what is bound at every product. Values are the same to the bit.
"""

from __future__ import annotations

import base64
from functools import cache
from typing import TYPE_CHECKING, Any

from fluxrt.backends.saturation import PROBE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np

TYPES = {"float32": 1, "uint8": 2, "int8": 3}
"""TensorProto.DataType by numpy's name."""
GRAPH = 7
"""The field of a ModelProto."""
INITIALIZER, INPUT = 5, 11
"""Fields of a GraphProto."""
VARINT, BYTES = 0, 2
"""Wire types of protobuf that occur in these messages; the others have a fixed size, WIDTHS."""
WIDTHS = {1: 8, 5: 4}


def with_constants(model: bytes, arrays: Mapping[str, np.ndarray]) -> bytes:
    """`model`, an ONNX file's content, whose inputs that `arrays` names are initializers with data elsewhere, which
    `give` gives; ValueError where it is no such file."""
    parts: list[bytes] = []
    for number, whole, content in _fields(model):
        parts.append(_field(GRAPH, _graph(content, arrays)) if number == GRAPH else whole)
    return b"".join(parts)


def give(options: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Let a session of these `options` take the data of such initializers from `arrays`, which must live until it is made, and
    longer where `copies` is false."""
    from onnxruntime import OrtValue

    values = [OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    options.add_external_initializers(list(arrays), values)


@cache
def copies() -> bool:
    """Whether ONNX Runtime is done with weights that were given once a session is made. Neither its documentation nor its
    versions agree, so it is tried."""
    import numpy as np
    import onnxruntime

    from fluxrt.backends.onnxruntime import session_options

    options = session_options()
    options.intra_op_num_threads = 1
    weights = {"b": np.full((64, 16), 2, np.int8)}
    give(options, weights)
    content = with_constants(base64.b64decode(PROBE), weights)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    weights["b"][:] = 1
    products = session.run(None, {"a": np.full((1, 64), 3, np.uint8)})[0]
    return bool((products == 64 * 3 * 2).all())


def _graph(content: bytes, arrays: Mapping[str, np.ndarray]) -> bytes:
    parts: list[bytes] = []
    for number, whole, value in _fields(content):
        if number != INPUT or _text(value, 1) not in arrays:
            parts.append(whole)
    parts += [_field(INITIALIZER, _tensor(name, array)) for name, array in arrays.items()]
    return b"".join(parts)


def _tensor(name: str, array: np.ndarray) -> bytes:
    """A TensorProto without data: ONNX asks for a file's name, which is not opened."""
    dims = b"".join(_number(1, size) for size in array.shape)
    entry = _field(13, _field(1, b"location") + _field(2, b"made-when-loaded"))
    return dims + _number(2, TYPES[str(array.dtype)]) + _field(8, name.encode()) + entry + _number(14, 1)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, whole field, its content or nothing) of a message."""
    at = 0
    while at < len(message):
        began = at
        key, at = _read(message, at)
        length = WIDTHS.get(key & 7, 0)
        if key & 7 in (VARINT, BYTES):
            value, at = _read(message, at)
            length = value if key & 7 == BYTES else 0
        elif not length:
            raise ValueError("it is no ONNX file")
        if at + length > len(message):
            raise ValueError("it ends too early")
        yield key >> 3, message[began : at + length], message[at : at + length]
        at += length


def _text(message: bytes, wanted: int) -> str:
    return next((content.decode() for number, _, content in _fields(message) if number == wanted), "")


def _read(message: bytes, at: int) -> tuple[int, int]:
    """A varint, and where it ends."""
    value = shift = 0
    while at < len(message):
        byte = message[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("it ends too early")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3 | VARINT) + _varint(value)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | BYTES) + _varint(len(content)) + content
