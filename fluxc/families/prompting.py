"""How a family's chat template surrounds a prompt, rendered once when a bundle is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fluxc.base.errors import CheckpointError


def render_template(folder: Path, options: dict[str, Any]) -> tuple[str, str, int]:
    """(prefix, suffix, pad id) of the chat template of the tokenizer in `folder` around one user message.

    Raises CheckpointError when the template does more to the message than to surround it, since the runtime could not
    repeat that without the template engine.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder}: there is no tokenizer.json, which the runtime tokenizes with")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def render(message: str) -> str:
        messages = [{"role": "user", "content": message}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))

    marker = "\u2063fluxc-prompt\u2063"
    prefix, found, suffix = render(marker).partition(marker)
    probes = ("", "a cat", " two  spaces ", "line\nbreak", "<|im_end|>", "Ünïcödé 猫")
    if not found or any(render(probe) != prefix + probe + suffix for probe in probes):
        raise CheckpointError(
            f"{folder}: the chat template changes the message it is given, so it cannot be rendered once at compile time"
        )
    if tokenizer.pad_token_id is None or tokenizer.padding_side != "right":
        raise CheckpointError(f"{folder}: the tokenizer must have a pad token and pad on the right")
    return prefix, suffix, int(tokenizer.pad_token_id)
