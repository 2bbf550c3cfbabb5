"""A rank's part of an image: its shard of image and text tokens, padding, and what it exchanges outside the graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fluxrt.manifest import dimension_size

if TYPE_CHECKING:
    import numpy as np

    from fluxrt.backends import Backend
    from fluxrt.group import Group
    from fluxrt.manifest import Sharding, Target

FIRST_RANK = ("text_encoder", "vae_decoder", "vae_blend")
"""The stages that rank 0 alone runs, for all of them."""


@dataclass(frozen=True)
class Shard:
    """What rank `rank` of `ranks` holds of an image of `total` image tokens and `ranks` times `text_tokens` text tokens.

    Image tokens are divided in order, equally many to each rank; after the last comes padding, tokens of zeros, where `ranks`
    does not divide `total`.
    """

    rank: int
    ranks: int
    total: int
    text_tokens: int

    @property
    def tokens(self) -> int:
        """Image tokens of each rank, padding included."""
        return -(-self.total // self.ranks)

    @property
    def first_token(self) -> int:
        """The place of this rank's first image token in the image."""
        return self.rank * self.tokens

    @property
    def first_text(self) -> int:
        """The place of this rank's first text token in the text."""
        return self.rank * self.text_tokens

    def image(self, tokens: np.ndarray) -> np.ndarray:
        """This rank's shard of `tokens` [images, total, C], with padding: [images, tokens, C]."""
        import numpy as np

        part = tokens[:, self.first_token : self.first_token + self.tokens]
        return np.pad(part, ((0, 0), (0, self.tokens - part.shape[1]), (0, 0)))

    def text_parts(self, text: np.ndarray) -> np.ndarray:
        """Every rank's shard of `text` [B, L, F]: [ranks, B, L / ranks, F]."""
        import numpy as np

        return np.stack(np.split(text, self.ranks, axis=1))

    def whole(self, parts: list[np.ndarray]) -> np.ndarray:
        """The images' tokens [images, total, C] from every rank's, without padding."""
        import numpy as np

        return np.concatenate(parts, axis=1)[:, : self.total]

    def is_token(self) -> np.ndarray:
        """fp32 [1, tokens, 1]: 1 for an image token of this rank, 0 for padding."""
        import numpy as np

        places = np.arange(self.first_token, self.first_token + self.tokens)
        return (places < self.total).astype(np.float32).reshape(1, -1, 1)

    def keys(self) -> np.ndarray:
        """int64: the places of the tokens that are attended to, in attention's order: text and image of rank 0, rank 1, ..."""
        import numpy as np

        image = np.arange(self.ranks * self.tokens).reshape(self.ranks, self.tokens) < self.total
        text = np.ones((self.ranks, self.text_tokens), bool)
        return np.flatnonzero(np.concatenate([text, image], axis=1))


def sizes_of(branches: int, grid: tuple[int, int], images: int = 1) -> dict[str, int]:
    """What the dimensions of graphs count, for so many images of `grid` (rows, columns) tokens.

    "branches" are the rows of an image: one, or two with guidance; "batch" are the rows of all images.
    """
    rows, columns = grid
    counted = {"branches": branches, "images": images, "batch": images * branches}
    return {**counted, "tokens": rows * columns, "rows": rows, "columns": columns}


class Rank:
    """The only rank of a target that is not sharded: it holds all tokens and exchanges nothing."""

    is_first = True
    """Whether this rank encodes the text and decodes the image."""

    def sizes(self, branches: int, grid: tuple[int, int], images: int = 1) -> dict[str, int]:
        """What dimensions of this rank's graphs count; see sizes_of."""
        return sizes_of(branches, grid, images)

    def put_text(self, backend: Backend, text: np.ndarray) -> None:
        """Fill the text that a step reads with embeddings fp32 [batch, length, features]."""
        backend.put("text", text)

    def place_text(self, backend: Backend, source: str, number: int) -> None:
        """Make the embeddings in the buffer `source` the text of image `number`; asked for in order of images."""
        if source != "text":
            backend.place(source, "text", number)

    def shard(self, latents: np.ndarray) -> np.ndarray:
        """This rank's part of the images' `latents` [images, tokens, channels]."""
        return latents

    def put_shard(self, backend: Backend) -> None:
        """Fill the buffers that say which tokens of image and text are this rank's."""

    def gather(self, latents: np.ndarray) -> np.ndarray:
        """The whole image's latents, on every rank, from each rank's."""
        return latents

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum over ranks."""
        return values


class ShardedRank(Rank):
    """One rank of `group`. `sizes` begins an image; the other methods are about that image."""

    def __init__(self, group: Group, target: Target, sharding: Sharding) -> None:
        self._group, self._target, self._sharding = group, target, sharding
        self._sizes: dict[str, int] = {}
        self._texts: list[np.ndarray] = []
        self._shard = Shard(group.rank, group.ranks, 0, sharding.text_tokens)
        self.is_first = group.rank == 0

    def sizes(self, branches: int, grid: tuple[int, int], images: int = 1) -> dict[str, int]:
        self._shard = Shard(self._group.rank, self._group.ranks, grid[0] * grid[1], self._sharding.text_tokens)
        self._sizes = super().sizes(branches, grid, images) | {"tokens": self._shard.tokens}
        return self._sizes

    def put_text(self, backend: Backend, text: np.ndarray) -> None:
        """Kept until the ranks get their shards of it."""
        self._texts = [text]

    def place_text(self, backend: Backend, source: str, number: int) -> None:
        self._texts = [*self._texts[:number], backend.get(source)]

    def shard(self, latents: np.ndarray) -> np.ndarray:
        return self._shard.image(latents)

    def put_shard(self, backend: Backend) -> None:
        """Rank 0 has the text, and gives each rank its shard."""
        import numpy as np

        shard = self._shard
        features = dimension_size(self._target.input("text_shard").shape[-1], self._sizes)
        parts = shard.text_parts(np.concatenate(self._texts)) if self.is_first else None
        self._texts = []
        shape = (self._sizes["batch"], shard.text_tokens, features)
        backend.put("text_shard", self._group.scatter(parts, shape))
        backend.put("first_token", np.array(shard.first_token, dtype=np.int64))
        backend.put("first_text", np.array(shard.first_text, dtype=np.int64))
        if self._target.reads("keys"):
            backend.put("keys", shard.keys())
        if self._target.reads("image_tokens"):
            backend.put("image_tokens", shard.is_token())

    def gather(self, latents: np.ndarray) -> np.ndarray:
        return self._shard.whole(self._group.gather(latents))

    def sum(self, values: np.ndarray) -> np.ndarray:
        return self._group.sum(values)


def rank_of(group: Group | None, target: Target) -> Rank:
    """This process's rank of `target`, with the others in `group` where it is sharded."""
    return ShardedRank(group, target, target.sharding) if group and target.sharding else Rank()
