"""The template stage: the chat template rendered around a prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxc.base.progress import Report
from fluxc.checkpoint.files import CheckpointFiles

RESULT = "template.json"


@dataclass(frozen=True)
class TemplateInputs:
    """The tokenizer's files and its class, and the options its template is rendered with."""

    files: CheckpointFiles
    class_name: str
    options: dict[str, Any]


def run(inputs: TemplateInputs, folder: Path, report: Report) -> None:
    """Write the text before and after a prompt, and the pad token."""
    from fluxc.checkpoint.exact_folder import exact_component
    from fluxc.families.prompting import render_template

    tokenizer = inputs.files.checkpoint.components["tokenizer"]
    with exact_component(tokenizer) as exact:
        prefix, suffix, pad = render_template(exact, inputs.class_name, inputs.options, tokenizer.folder)
    (folder / RESULT).write_text(json.dumps({"prefix": prefix, "suffix": suffix, "pad_id": pad}))


def load(folder: Path) -> dict[str, Any]:
    """prefix, suffix and pad_id."""
    rendered: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return rendered
