"""Turns prompts into token ids with the chat template that was rendered when the bundle was compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxrt.errors import BundleError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from tokenizers import Tokenizer

    from fluxrt.bundle import Bundle
    from fluxrt.manifest import Prompting


def load_encoder(bundle: Bundle) -> PromptEncoder:
    """The encoder of a bundle's prompts; BundleError where its tokenizer cannot be used."""
    prompting = bundle.manifest.prompting
    return PromptEncoder(prompting, bundle.checked_file(prompting.tokenizer))


class PromptEncoder:
    """Holds a tokenizer and the rendered template."""

    def __init__(self, prompting: Prompting, tokenizer_file: Path) -> None:
        from tokenizers import Tokenizer

        self._prompting = prompting
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # tokenizers raises Exception itself
            raise BundleError(
                f"{tokenizer_file}: not a tokenizer that can be read: {error}; rebuild the bundle"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def tokens(self, prompt: str) -> list[int]:
        """The ids of `prompt` within its template, however many there are."""
        spec = self._prompting
        prompt = self.without_removed(prompt)
        added = spec.special_tokens is not False
        found: list[int] = self._tokenizer.encode(spec.prefix + prompt + spec.suffix, add_special_tokens=added).ids
        return found

    def without_removed(self, prompt: str) -> str:
        """`prompt` without the texts that the model's own pipeline takes out."""
        for text in self._prompting.removed or ():
            prompt = prompt.replace(text, "")
        return prompt

    def encode(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, attention_mask), int64 [prompts, length]; a prompt that does not fit is a RequestError."""
        import numpy as np

        spec = self._prompting
        ids = np.full((len(prompts), spec.length), spec.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = self.tokens(prompt)
            if len(tokens) > spec.length:
                raise RequestError(
                    f"the prompt {_shorten(prompt)!r} is {len(tokens)} tokens long with its chat template "
                    f"({len(self.tokens(''))} tokens), but this bundle was compiled for {spec.length}; "
                    "shorten it, or rebuild with a larger text.length in the recipe"
                )
            place = slice(spec.length - len(tokens), None) if spec.padding == "left" else slice(len(tokens))
            ids[row, place] = tokens
            mask[row, place] = 1
        return ids, mask


def _shorten(text: str, limit: int = 48) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
