"""How a family's chat template surrounds a prompt, rendered once when a bundle is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fluxc.base.errors import CheckpointError
from fluxc.base.json_object import read_json
from fluxc.base.loading import loading

PROBES = ("", "a cat", " two  spaces ", "line\nbreak", "<|im_end|>", "Ünïcödé 猫")


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer without what prompts are read with: tokenizer.json and a chat template, neither of them damaged.

    Quick, without transformers; `render_template` finds the rest.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: there is no tokenizer.json, which the runtime tokenizes with; download the checkpoint again"
        )
    with loading(file, "it is not a tokenizer"):
        Tokenizer.from_file(str(file))
    template = _template(folder)
    if template is None:
        raise CheckpointError(
            f"{folder}: there is no chat_template.jinja, nor a chat_template in tokenizer_config.json; the text encoder was "
            "trained on prompts within one, download it too"
        )
    _check_syntax(template, folder)


def render_template(folder: Path, class_name: str, options: dict[str, Any], where: Path) -> tuple[str, str, int]:
    """(prefix, suffix, pad id) of the chat template of the tokenizer in `folder` around one user message.

    `class_name` is the tokenizer's in transformers, `where` what messages call the folder. Raises CheckpointError when the
    template does more to the message than to surround it, since the runtime could not repeat that without the template
    engine, and when transformers reads other tokens than the runtime does, from tokenizer.json alone.
    """
    import transformers
    from tokenizers import Tokenizer

    with loading(where, f"transformers cannot read the tokenizer as {class_name}"):
        tokenizer = getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)

    def render(message: str) -> str:
        messages = [{"role": "user", "content": message}]
        with loading(where, "its chat template cannot be rendered"):
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))

    marker = "\u2063fluxc-prompt\u2063"
    prefix, found, suffix = render(marker).partition(marker)
    if not found or any(render(probe) != prefix + probe + suffix for probe in PROBES):
        raise CheckpointError(
            f"{where}: the chat template changes the message it is given, so it cannot be rendered once at compile time"
        )
    if tokenizer.pad_token_id is None or tokenizer.padding_side != "right":
        raise CheckpointError(f"{where}: the tokenizer must have a pad token and pad on the right")
    with loading(where / "tokenizer.json", "it is not a tokenizer"):
        ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ours.no_padding()
        ours.no_truncation()
    for text in (prefix + probe + suffix for probe in PROBES):
        if ours.encode(text).ids != tokenizer(text)["input_ids"]:
            raise CheckpointError(
                f"{where}: transformers reads other tokens of {text!r} than tokenizer.json alone gives, which the runtime "
                "reads; its files are not of one tokenizer, use them as published"
            )
    return prefix, suffix, int(tokenizer.pad_token_id)


def _template(folder: Path) -> str | None:
    """The chat template's text, from the place that transformers prefers."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        with loading(file, "it cannot be read"):
            return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    found = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{config}: chat_template is neither text nor a list with a default; use it as published")
    return found


def _check_syntax(template: str, folder: Path) -> None:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(autoescape=False, extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except (TemplateSyntaxError, RecursionError) as error:
        # transformers has a tag of its own, which jinja2 does not know.
        if "'generation'" not in str(error):
            raise CheckpointError(
                f"{folder}: its chat template is damaged: {error}; use the checkpoint as published"
            ) from error
