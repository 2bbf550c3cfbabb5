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
    """The tokenizer's files, and the options its template is rendered with."""

    files: CheckpointFiles
    options: dict[str, Any]


def run(inputs: TemplateInputs, folder: Path, report: Report) -> None:
    """Write the text before and after a prompt, and the pad token."""
    from fluxc.families.prompting import render_template

    prefix, suffix, pad = render_template(inputs.files.checkpoint.components["tokenizer"].folder, inputs.options)
    (folder / RESULT).write_text(json.dumps({"prefix": prefix, "suffix": suffix, "pad_id": pad}))


def load(folder: Path) -> dict[str, Any]:
    """prefix, suffix and pad_id."""
    rendered: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return rendered
