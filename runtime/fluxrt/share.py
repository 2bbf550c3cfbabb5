"""What one of N ranks holds of a picture: which image and text tokens, and which of them only fill up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Share:
    """Rank `rank` of `ranks`, of a picture of `total` image tokens and `ranks` times `text_tokens` text tokens.

    Image tokens are dealt out in order, equally many to each; after the last come tokens of zeros, where `ranks` does not
    divide `total`.
    """

    rank: int
    ranks: int
    total: int
    text_tokens: int

    @property
    def tokens(self) -> int:
        """Image tokens of each rank."""
        return -(-self.total // self.ranks)

    @property
    def first_token(self) -> int:
        """The place of this rank's first image token in the picture."""
        return self.rank * self.tokens

    @property
    def first_text(self) -> int:
        """The place of this rank's first text token in the text."""
        return self.rank * self.text_tokens

    def image(self, tokens: np.ndarray) -> np.ndarray:
        """This rank's part of `tokens` [1, total, C], filled up with zeros: [1, tokens, C]."""
        import numpy as np

        part = tokens[:, self.first_token : self.first_token + self.tokens]
        return np.pad(part, ((0, 0), (0, self.tokens - part.shape[1]), (0, 0)))

    def text_parts(self, text: np.ndarray) -> np.ndarray:
        """Every rank's part of `text` [B, L, F]: [ranks, B, L / ranks, F]."""
        import numpy as np

        return np.stack(np.split(text, self.ranks, axis=1))

    def whole(self, parts: list[np.ndarray]) -> np.ndarray:
        """The picture's tokens [1, total, C] from every rank's."""
        import numpy as np

        return np.concatenate(parts, axis=1)[:, : self.total]

    def is_token(self) -> np.ndarray:
        """fp32 [1, tokens, 1]: 1 for an image token of this rank, 0 for one that only fills up."""
        import numpy as np

        places = np.arange(self.first_token, self.first_token + self.tokens)
        return (places < self.total).astype(np.float32).reshape(1, -1, 1)

    def keys(self) -> np.ndarray:
        """int64: the places of the tokens that are attended to, in attention's order: text and image of rank 0, rank 1, ..."""
        import numpy as np

        image = np.arange(self.ranks * self.tokens).reshape(self.ranks, self.tokens) < self.total
        text = np.ones((self.ranks, self.text_tokens), bool)
        return np.flatnonzero(np.concatenate([text, image], axis=1))
