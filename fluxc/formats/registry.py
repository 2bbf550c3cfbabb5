"""The quantized formats by name; a further one is a file and a line here."""

from __future__ import annotations

from fluxc.base.errors import RecipeError, nearest
from fluxc.formats.base import Format
from fluxc.formats.bf16 import BF16
from fluxc.formats.fp8 import FP8
from fluxc.formats.mxfp4 import MXFP4
from fluxc.formats.nvfp4 import NVFP4, NVFP4W4A16
from fluxc.recipe import fields

FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Make `format` known under its name, to recipes too."""
    FORMATS[format.name] = format
    fields.FORMATS.setdefault(format.name, (type(format).__doc__ or "").partition("\n")[0])


def multiplied_in(format: str) -> str:
    """The format that a GPU multiplies in where a layer is planned in `format`."""
    known = FORMATS.get(format)
    return format if known is None or known.multiplies is None else known.multiplies


def check_format(name: str, field: str) -> None:
    """Refuse a format that there is not, with near matches: RecipeError naming `field`."""
    known = (*FORMATS, BF16)
    if name not in known:
        raise RecipeError(
            f"{field}: there is no format {name!r}{nearest(name, known) or '.'} It can be {', '.join(known)}"
        )


for _format in (NVFP4(), NVFP4W4A16(), FP8(), MXFP4()):
    register(_format)
