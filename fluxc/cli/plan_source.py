"""What `plan` says of the checkpoint: where it is from, at which commits, and what a build has to download."""

from __future__ import annotations

from rich.console import Console

from fluxc.base.memory import bytes_in_words
from fluxc.checkpoint.named import parts_of
from fluxc.checkpoint.source import Checkpoint
from fluxc.recipe.load import LoadedRecipe


def print_source(console: Console, loaded: LoadedRecipe, checkpoint: Checkpoint) -> None:
    """The recipe's name, the pipeline's class and its sources in a line; then findings, and the download."""
    model = loaded.recipe.model
    commits = [f"{repo} at commit {commit}" for repo, commit in checkpoint.commits.items() if repo != model.source]
    commit = checkpoint.commits.get(model.source)
    words = [f"{model.source} at commit {commit}" if commit else model.source]
    words += [f"{name} from {place}" for name, place in parts_of(model).items()]
    console.print(f"{loaded.recipe.name}: {checkpoint.pipeline_class} from {', '.join([*words, *commits])}")
    for notice in checkpoint.notices:
        console.print(notice)
    missing = checkpoint.missing
    if missing:
        size = bytes_in_words(sum(entry.size for entry in missing))
        files = "1 file" if len(missing) == 1 else f"{len(missing)} files"
        console.print(
            f"a build downloads {files} of weights first, {size}; their headers alone were read for this plan"
        )
