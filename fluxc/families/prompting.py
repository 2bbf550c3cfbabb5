"""How a family's chat template surrounds a prompt, rendered once when a bundle is compiled."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fluxc.base.errors import CheckpointError
from fluxc.base.json_object import read_json
from fluxc.base.loading import loading
from fluxc.families.base import Prompts

PROBES = ("", "a cat", " two  spaces ", "line\nbreak", "<|im_end|>", "[INST]", "Ünïcödé 猫")


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


def render_template(folder: Path, class_name: str, prompts: Prompts, where: Path) -> dict[str, Any]:
    """The fields of the manifest's `prompting` that follow from the tokenizer in `folder`: text before and after a prompt, and
    how it is padded.

    `class_name` is the tokenizer's in transformers, `where` what messages call the folder. Raises CheckpointError when the
    template does more to a message than to surround it, since the runtime could not repeat that without the template engine,
    when it leaves the system message out or changes it, and when transformers reads other tokens than the runtime does, from
    tokenizer.json alone.
    """
    from tokenizers import Tokenizer

    tokenizer = load_tokenizer(folder, class_name, where)

    def render(message: str) -> str:
        with loading(where, "its chat template cannot be rendered"):
            return str(tokenizer.apply_chat_template(conversation(message, prompts), tokenize=False, **prompts.options))

    marker = "\u2063fluxc-prompt\u2063"
    prefix, found, suffix = render(marker).partition(marker)
    if not found or any(render(probe) != prefix + probe + suffix for probe in PROBES):
        raise CheckpointError(
            f"{where}: the chat template changes the message it is given, so it cannot be rendered once at compile time"
        )
    if prompts.system is not None and (prefix + suffix).count(system_message(prompts.system)) != 1:
        raise CheckpointError(
            f"{where}: the chat template does not hold the system message of FLUX.2 as it is given to it, which the model was "
            "trained with; use the template as published"
        )
    if tokenizer.pad_token_id is None or tokenizer.padding_side != prompts.padding:
        raise CheckpointError(
            f"{where}: the tokenizer must have a pad token and pad on the {prompts.padding}; it pads on the "
            f"{tokenizer.padding_side} with {tokenizer.pad_token!r}, use it as published"
        )
    with loading(where / "tokenizer.json", "it is not a tokenizer"):
        ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ours.no_padding()
        ours.no_truncation()
    added = prompts.special_tokens
    for text in (prefix + probe + suffix for probe in PROBES):
        if ours.encode(text, add_special_tokens=added).ids != tokenizer(text, add_special_tokens=added)["input_ids"]:
            raise CheckpointError(
                f"{where}: transformers reads other tokens of {text!r} than tokenizer.json alone gives, which the runtime "
                "reads; its files are not of one tokenizer, use them as published"
            )
    return {"prefix": prefix, "suffix": suffix, "pad_id": int(tokenizer.pad_token_id)} | _unusual(prompts)


def _unusual(prompts: Prompts) -> dict[str, Any]:
    """Fields of `prompting` that bundles have had since dev, where they are not what all bundles had before."""
    found = {"padding": prompts.padding, "removed": list(prompts.removed), "special_tokens": prompts.special_tokens}
    usual = {"padding": "right", "removed": [], "special_tokens": True}
    return {name: value for name, value in found.items() if value != usual[name]}


def conversation(prompt: str, prompts: Prompts) -> list[dict[str, Any]]:
    """What the chat template is given for `prompt`: the system message, if there is one, and one message of the user."""
    messages = [("system", system_message(prompts.system))] if prompts.system else []
    for text in prompts.removed:
        prompt = prompt.replace(text, "")
    return [
        {"role": role, "content": [{"type": "text", "text": text}] if prompts.parts else text}
        for role, text in (*messages, ("user", prompt))
    ]


def system_message(named: str) -> str:
    """The text that `named`, "module:NAME", holds in an installed library."""
    module, _, name = named.partition(":")
    return str(getattr(importlib.import_module(module), name))


def load_tokenizer(folder: Path, class_name: str, where: Path) -> Any:
    """The tokenizer in `folder` as transformers has it; of a processor, which takes images too, its tokenizer alone.

    The processor itself needs torchvision. Its template may be in a file that only processors read, and Mistral's tokenizers
    pad on the left where their config does not say.
    """
    import transformers

    processor = class_name.endswith("Processor")
    with loading(where, f"transformers cannot read the tokenizer as {class_name}"):
        if not processor:
            return getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
        # Not AutoTokenizer: with mistral-common installed it may take that for Mistral's, in place of tokenizer.json.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        file = folder / "tokenizer_config.json"
        if "padding_side" not in (read_json(file) if file.is_file() else {}):
            tokenizer.padding_side = "left"
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _template(folder)
        return tokenizer


def _template(folder: Path) -> str | None:
    """The chat template's text, from the place that transformers prefers."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        with loading(file, "it cannot be read"):
            return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        config = folder / name
        found = read_json(config).get("chat_template") if config.is_file() else None
        if found is not None:
            break
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
