"""The header of a safetensors file: 8 bytes of its length, little-endian, JSON, then data.

The safetensors library hides byte offsets, which graphs and engines need. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_HEADER = 100_000_000
"""The safetensors library's own limit."""


class HeaderError(ValueError):
    """What is wrong with a header, as a clause for a message that names the file and says what to do."""


def raw_header(file: Path) -> tuple[dict[str, Any], int]:
    """The entries of `file`'s header, `__metadata__` among them where there is one, and where its data begin.

    Raises HeaderError, or OSError if there is no such file.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            raise HeaderError(f"truncated: {size} bytes, too short for its own header")
        if length > MAX_HEADER:
            raise HeaderError(f"not a safetensors file: a header of {length} bytes, more than {MAX_HEADER}")
        try:
            header = json.loads(opened.read(length))
        except ValueError as error:
            raise HeaderError(f"not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise HeaderError("not a safetensors file: its header is no JSON object")
    return header, 8 + length
