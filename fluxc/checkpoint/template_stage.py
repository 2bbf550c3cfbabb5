"""The template stage: the chat template rendered around a prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxc.base.progress import Report
from fluxc.checkpoint.files import CheckpointFiles
from fluxc.families.base import Prompts

RESULT = "template.json"


@dataclass(frozen=True)
class TemplateInputs:
    """The tokenizer's files and its class, how prompts are read, and the system message, if there is one."""

    files: CheckpointFiles
    class_name: str
    prompts: Prompts
    system: str | None


def run(inputs: TemplateInputs, folder: Path, report: Report) -> None:
    """Write the text before and after a prompt, the pad token, and how prompts are padded."""
    from fluxc.checkpoint.exact_folder import exact_component
    from fluxc.families.prompting import render_template

    tokenizer = inputs.files.checkpoint.components["tokenizer"]
    with exact_component(tokenizer) as exact:
        rendered = render_template(exact, inputs.class_name, inputs.prompts, tokenizer.folder)
    (folder / RESULT).write_text(json.dumps(rendered))


def load(folder: Path) -> dict[str, Any]:
    """The fields of the manifest's `prompting` that were rendered."""
    rendered: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return rendered
