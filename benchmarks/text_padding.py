"""dev's text encoder on a CPU: all 512 rows, or the prompt's tokens and one row of padding; the same weights, in one run.

    python benchmarks/text_padding.py               # 3 layers of Mistral's widths in FP8, random weights; 2 GB of disk

Both graphs get the same prompts, in turn. Seconds are medians, errors those of the shorter graph against the other: the norm of
the difference over the norm, of the tokens' rows and of the padding's.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from cpu_memory import TEXT_TOKENS, write_random
from cpu_step import cpu_name

TOKENS = (48, 96, 192, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3, help="layers of the text encoder (dev reads 30)")
    parser.add_argument("--runs", type=int, default=3, help="of each graph and prompt")
    options = parser.parse_args()
    from fluxrt.backends.onnxruntime import FOLDED, open_session
    from fluxrt.cores import usable_cores

    with tempfile.TemporaryDirectory(prefix="text-padding-") as name:
        folder = Path(name)
        write_graphs(folder, options.layers)
        sessions = {
            which: open_session(str(folder / f"{which}.onnx"), usable_cores(), has_arena=True, folded=FOLDED)
            for which in ("all rows", "tokens")
        }
        print(f"{cpu_name()}, {usable_cores()} cores; {options.layers} layers, {TEXT_TOKENS} rows\n")
        print("| tokens of the prompt | all rows, s | tokens, s | faster | error, tokens | error, padding |")
        print("|---|---|---|---|---|---|")
        for tokens in TOKENS:
            ids = np.full((1, TEXT_TOKENS), 11, np.int64)
            ids[0, -tokens:] = np.random.default_rng(tokens).integers(1000, 131072, tokens)
            feeds = {
                "input_ids": ids,
                "attention_mask": (np.arange(TEXT_TOKENS) >= TEXT_TOKENS - tokens)[None].astype(int),
            }
            seconds: dict[str, list[float]] = {which: [] for which in sessions}
            text = {}
            for _ in range(options.runs):
                for which, session in sessions.items():
                    began = time.perf_counter()
                    (text[which],) = session.run(None, feeds)
                    seconds[which].append(time.perf_counter() - began)
            whole, short = (statistics.median(seconds[which]) for which in sessions)
            errors = [error(text, part) for part in (slice(-tokens, None), slice(0, TEXT_TOKENS - tokens))]
            shown = " | ".join("" if found is None else f"{found:.1e}" for found in errors)
            print(f"| {tokens} | {whole:.2f} | {short:.2f} | {whole / short:.2f}x | {shown} |", flush=True)


def error(text: dict[str, np.ndarray], rows: slice) -> float | None:
    """Of `rows` of the shorter graph's text; None where there are none."""
    whole, short = text["all rows"][:, rows], text["tokens"][:, rows]
    return float(np.linalg.norm(short - whole) / np.linalg.norm(whole)) if whole.size else None


def write_graphs(folder: Path, layers: int) -> None:
    """Both lowered graphs, and the weights that they share."""
    from fluxc.base.safetensors import read_header
    from fluxc.families.dev import DEV
    from fluxc.graph.bind import argument_names, bind
    from fluxc.graph.compose import compose_text_encoder
    from fluxc.graph.export import trace_text_encoder
    from fluxc.models.mistral3 import Mistral3
    from fluxc.models.published import MISTRAL_SMALL
    from fluxc.quantize.plan import precision_plan
    from fluxc.recipe.structs import ComponentPrecision
    from fluxc.targets.onnxruntime.lower import lower

    encoder = Mistral3.read(MISTRAL_SMALL)
    family = dataclasses.replace(DEV, text_layers=tuple(max(1, layers * part // 3) for part in (1, 2, 3)))
    linears = encoder.linears(family.text_layers[-1])
    plan = {e.layer.name: e for e in precision_plan("text_encoder", linears, ComponentPrecision("fp8"))}
    norm = f"{encoder.prefix}norm.weight"
    shapes = {name: shape for name, shape in encoder.tensors(family.text_layers[-1]).items() if name != norm}
    write_random(folder / "weights.safetensors", shapes, plan)
    refs = read_header(folder / "weights.safetensors")
    for which, any_length in (("all rows", False), ("tokens", True)):
        pieces = trace_text_encoder(MISTRAL_SMALL, TEXT_TOKENS, family, any_length=any_length)
        length = TEXT_TOKENS if any_length else None
        neutral = compose_text_encoder(pieces, family.text_layers, length)
        arguments = argument_names(neutral)
        lowered = lower(neutral, arguments, {name: ref.dtype for name, ref in refs.items()}, plan, "none", "8-bit")
        bind(lowered, arguments, refs)
        (folder / f"{which}.onnx").write_bytes(lowered.SerializeToString())


if __name__ == "__main__":
    main()
