"""Which images and models a number of ranks can divide among themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fluxc.base.errors import RecipeError
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxrt.sharding import Shard

MOST_GPUS = 64


def undivided(gpus: int, heads: int, text_tokens: int, image_tokens: dict[tuple[int, int], int]) -> list[str]:
    """What so many GPUs cannot share equally, in words; `image_tokens` by size (height, width)."""
    counted = {"attention heads": heads, "text tokens": text_tokens}
    counted |= {f"image tokens of {height}x{width}": count for (height, width), count in image_tokens.items()}
    return [f"the {count} {what}" for what, count in counted.items() if count % gpus]


def check_sharding(
    field: str,
    gpus: int,
    transformer: Flux2Transformer,
    text_length: int,
    tokens: dict[tuple[int, int], int],
    is_tensorrt: bool,
) -> None:
    """Refuse a target that cannot be sharded for `gpus`, saying what could be.

    `tokens` is the number of image tokens of every size. A CPU target pads them; TensorRT needs equal shards, and two heads on
    each GPU: TensorRT-RTX 1.7.1 has no kernel for a sharded attention of one.
    """
    heads = transformer.num_attention_heads

    def faults(number: int) -> list[str]:
        shared = undivided(number, heads, text_length, tokens if is_tensorrt else {})
        found = [f"{what} cannot be shared equally" for what in shared]
        if is_tensorrt and heads == number:
            found.append(
                f"of {heads} attention heads each would have one, which TensorRT does not compute in one kernel"
            )
        return found

    if faults(gpus):
        works = [number for number in range(1, MOST_GPUS + 1) if number == 1 or not faults(number)]
        raise RecipeError(
            f"{field}: among {gpus} GPUs {', '.join(faults(gpus))}; it can be sharded for "
            f"{', '.join(map(str, works))}, or take other sizes"
        )


def needs_padding(gpus: int, tokens: list[int]) -> bool:
    """Whether images of so many tokens must be padded for `gpus` to hold equal shards."""
    return any(count % gpus for count in tokens)


@dataclass(frozen=True)
class Shards:
    """What each of `ranks` GPUs holds of an image of one size, and what a step makes it exchange.

    `padding` counts the image tokens added so that all shards are equal. `exchanged_bytes` is what a rank gives to all-to-alls
    a step, with all rows of a CFG batch; 1/ranks of it stays where it is.
    """

    ranks: int
    size: tuple[int, int]
    heads: int
    text_tokens: int
    image_tokens: int
    padding: int
    exchanged_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        height, width = self.size
        padding = f" ({self.padding} of the image's are padding)" if self.padding else ""
        return (
            f"{height}x{width} on {self.ranks} ranks: each {self.heads} heads, {self.text_tokens} text and {self.image_tokens} "
            f"image tokens{padding}; a step exchanges {self.exchanged_bytes / 2**20:,.2f} MiB a rank, "
            f"{(self.ranks - 1) / self.ranks:.0%} of it with others"
        )


def shards_of(
    ranks: int,
    size: tuple[int, int],
    tokens: int,
    transformer: Flux2Transformer,
    text_length: int,
    branches: int,
    itemsize: int,
) -> Shards:
    """The shards of an image of `tokens` image tokens; activations are exchanged in `itemsize` bytes.

    In each block queries, keys and values are exchanged before attention and its output after it: four activations of the
    model's width.
    """
    shard = Shard(0, ranks, tokens, text_length // ranks)
    activation = branches * (shard.tokens + shard.text_tokens) * transformer.width * itemsize
    return Shards(
        ranks=ranks,
        size=size,
        heads=transformer.num_attention_heads // ranks,
        text_tokens=shard.text_tokens,
        image_tokens=shard.tokens,
        padding=ranks * shard.tokens - tokens,
        exchanged_bytes=transformer.blocks * 4 * activation,
    )
