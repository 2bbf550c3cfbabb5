"""Makes a checkpoint of a published FLUX.2 model's shapes with random weights, for `real_size.py`.

    python benchmarks/real_size_checkpoint.py klein-4b                                # klein 4B whole: 15.8 GB
    python benchmarks/real_size_checkpoint.py dev --widths dev --blocks 2+4 --text-layers 31

Every tensor has the name, shape, dtype (bf16) and file that it has in the published checkpoint. Numbers are Gaussian and
follow from `--seed` and the tensor's name, so that they depend neither on the other tensors nor on the machine. They are
written a chunk at a time. How large they are, and why:

1. A Linear has the standard deviation GAIN / sqrt(in), so that activations neither grow nor vanish: at klein's width a largest
   weight of 0.1, and of 0.4 in an outlier row, which is the range of dev's published table (0.07 to 0.44).
2. Outliers: the same 0.2 % of channels of the residual stream are 4 or 8 times as large in every layer that writes to it, and
   0.1 % of the feed-forward's channels 4 times. So the inputs of layers have a few channels that are far larger than the rest.
3. A block adds about a tenth of what its input is, through gates of about 0.25, as blocks of trained models do.
4. Norms are 1, biases 0. The text encoder's hidden states keep growing from layer to layer, as Qwen3's do.

`dev` is FLUX.2 dev: it embeds the scale of the guidance, and has Mistral-Small's language model, without vision tower and head.
Unless `--whole-text` is given, the feed-forward of that is 8192 wide and not 32768, to spare 23 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.models.mistral3 import Mistral3
from fluxc.models.published import MISTRAL_SMALL, MODELS, QWEN3_4B, QWEN3_8B
from fluxc.models.qwen3 import Qwen3
from fluxc.models.text_encoder import TextEncoder

NANO = Path(__file__).resolve().parent.parent / "models" / "flux2-nano"
NANO_DEV = NANO.with_name("flux2-nano-dev")
CHUNK = 8 << 20
"""Values that are drawn at once."""
SHARDS = {"transformer": 10_000_000_000, "text_encoder": 5_000_000_000, "vae": 10_000_000_000}
"""The most bytes of a weights file, as diffusers and transformers save them."""
STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
THINK = {"<think>": 151667, "</think>": 151668}
"""Tokens of Qwen3 that text cannot spell, with their ids there."""
TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "klein-4b": {**QWEN3_4B, "tie_word_embeddings": True},
    "klein-9b": {**QWEN3_8B, "tie_word_embeddings": False},
    "dev": MISTRAL_SMALL["text_config"],
}
LEAST_LAYERS = {"klein-4b": 28, "klein-9b": 28, "dev": 31}
"""Layers of the text encoder: one more than the last whose output is taken."""
NARROW = 8192
"""Features of the feed-forward of dev's text encoder, unless it is made whole."""
RESIDUAL_OUTLIERS, FEED_FORWARD_OUTLIERS = 500, 1000
"""One channel of so many."""
Pieces = Callable[[str, tuple[int, ...]], Iterable[Callable[[], bytes]]]
"""Of a tensor's name and shape, what gives its bytes piece by piece, in order."""


@dataclass(frozen=True)
class Shape:
    """What is made: `widths` of MODELS, transformer blocks of both kinds, layers of the text encoder; None as published."""

    widths: str = "klein-4b"
    double: int | None = None
    single: int | None = None
    text_layers: int | None = None
    whole_text: bool = False

    @property
    def is_dev(self) -> bool:
        """Whether it is a dev, and no klein."""
        return self.widths == "dev"

    @property
    def nano(self) -> Path:
        """The small checkpoint that tokenizer, scheduler and index are taken from."""
        return NANO_DEV if self.is_dev else NANO

    @property
    def transformer(self) -> dict[str, Any]:
        """The transformer's config.json."""
        config = dict(MODELS[self.widths])
        if self.double is not None:
            config |= {"num_layers": self.double, "num_single_layers": self.single}
        return {
            "_class_name": "Flux2Transformer2DModel",
            "_diffusers_version": "0.42.1",
            "axes_dims_rope": [32, 32, 32, 32],
            "eps": 1e-6,
            "out_channels": None,
            "patch_size": 1,
            "rope_theta": 2000,
            "timestep_guidance_channels": 256,
            **config,
        }

    @property
    def text_encoder(self) -> dict[str, Any]:
        """The text encoder's config.json."""
        config = dict(TEXT_ENCODERS[self.widths])
        config["num_hidden_layers"] = self.text_layers or config["num_hidden_layers"]
        if self.is_dev:
            return self._mistral(config)
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "eos_token_id": SPECIAL["<|im_end|>"],
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 40960,
            "max_window_layers": config["num_hidden_layers"],
            "model_type": "qwen3",
            "pad_token_id": SPECIAL["<|endoftext|>"],
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_window": None,
            "use_cache": True,
            "use_sliding_window": False,
            **config,
        }

    def _mistral(self, config: dict[str, Any]) -> dict[str, Any]:
        rope = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
        text = {"model_type": "mistral", "hidden_act": "silu", "rope_parameters": rope, "pad_token_id": 11, **config}
        if not self.whole_text:
            text["intermediate_size"] = NARROW
        vision = json.loads((NANO_DEV / "text_encoder" / "config.json").read_text())["vision_config"]
        return {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "dtype": "bfloat16",
            "image_token_index": 10,
            "model_type": "mistral3",
            "text_config": text | {"tie_word_embeddings": True},
            "tie_word_embeddings": True,
            "vision_config": vision,
        }

    @property
    def vae(self) -> dict[str, Any]:
        """The VAE's config.json."""
        nano = json.loads((NANO / "vae" / "config.json").read_text())
        return {
            **nano,
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "latent_channels": 32,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "sample_size": 1024,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        }

    def tensors(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Every tensor by component, name and shape."""
        text = self.text_encoder
        kind: type[TextEncoder] = Mistral3 if self.is_dev else Qwen3
        encoder = kind.read(text)
        found = {
            "transformer": Flux2Transformer.read(self.transformer).tensors,
            "text_encoder": encoder.tensors(encoder.num_hidden_layers),
            "vae": Flux2VAE.read(self.vae).tensors,
        }
        if not text["tie_word_embeddings"]:
            found["text_encoder"]["lm_head.weight"] = found["text_encoder"]["model.embed_tokens.weight"]
        return found

    @property
    def name(self) -> str:
        """Such as klein-4b, or dev 2+4, or klein-4b with 28 text layers."""
        blocks = "" if self.double is None else f" {self.double}+{self.single}"
        return f"{self.widths}{blocks}" + (f" with {self.text_layers} text layers" if self.text_layers else "")


def make(folder: Path, shape: Shape, seed: int = 0, like: Path | None = None) -> int:
    """Write the checkpoint of `shape` into `folder`, which appears when it is complete; its bytes on disk.

    `like` is another of the same seed: components with the same config are links to its files.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    configs = {"transformer": shape.transformer, "text_encoder": shape.text_encoder, "vae": shape.vae}
    for component, tensors in shape.tensors().items():
        if like and json.loads((like / component / "config.json").read_text()) == configs[component]:
            shutil.copytree(like / component, partial / component, copy_function=os.link)
            continue
        (partial / component).mkdir()
        _write_json(partial / component / "config.json", configs[component])
        write_component(partial / component, component, tensors, random_pieces(component, seed))
    if shape.is_dev:
        shutil.copytree(NANO_DEV / "tokenizer", partial / "tokenizer")
    else:
        write_tokenizer(partial / "tokenizer")
    shutil.copytree(shape.nano / "scheduler", partial / "scheduler")
    index = json.loads((shape.nano / "model_index.json").read_text())
    _write_json(partial / "model_index.json", index | ({} if shape.is_dev else {"is_distilled": True}))
    size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return size


def write_component(folder: Path, component: str, tensors: dict[str, tuple[int, ...]], pieces: Pieces) -> None:
    """The weights of a component: one safetensors file, or shards and their index where they are more than SHARDS."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARDS[component]
    for name, shape in tensors.items():
        size = _bytes_of(name, shape)
        if size > room and shards[-1]:
            shards.append({})
            room = SHARDS[component]
        room -= size
        shards[-1][name] = shape
    stem = STEMS[component]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        of = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        write_file(folder / f"{stem}{of}.safetensors", shard, pieces)
        weight_map |= dict.fromkeys(shard, f"{stem}{of}.safetensors")
    if len(shards) > 1:
        total = sum(_bytes_of(name, shape) for name, shape in tensors.items())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / f"{stem}.safetensors.index.json", index)


def write_file(path: Path, tensors: dict[str, tuple[int, ...]], pieces: Pieces) -> None:
    """A safetensors file of bf16 tensors, whose pieces are made two at a time and written in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        end = position + _bytes_of(name, shape)
        dtype = "I64" if _is_counter(name) else "BF16"
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    work = (piece for name, shape in tensors.items() for piece in pieces(name, shape))
    with path.open("wb") as out, ThreadPoolExecutor(2) as pool:
        out.write(struct.pack("<Q", len(text)) + text)
        # Few at a time: what is made and not written yet is in memory.
        waiting = [pool.submit(piece) for piece in islice(work, 3)]
        while waiting:
            out.write(waiting.pop(0).result())
            waiting += [pool.submit(piece) for piece in islice(work, 1)]


def random_pieces(component: str, seed: int) -> Pieces:
    """Random numbers for the tensors of a component."""

    def pieces(name: str, shape: tuple[int, ...]) -> Iterator[Callable[[], bytes]]:
        return (partial(draw, chunk) for chunk in chunks_of(component, name, shape, seed))

    return pieces


@dataclass(frozen=True)
class Chunk:
    """Rows of a tensor: their numbers' seed, their standard deviation (0: all are `mean`), and rows that are larger."""

    seed: tuple[int, ...]
    first: int
    shape: tuple[int, int]
    deviation: float
    mean: float = 0.0
    outliers: tuple[int, ...] = ()
    factor: float = 1.0
    counter: bool = False


def chunks_of(component: str, name: str, shape: tuple[int, ...], seed: int) -> Iterator[Chunk]:
    """The chunks of a tensor in order."""
    if _is_counter(name):
        yield Chunk((), 0, (1, 1), 0.0, counter=True)
        return
    rows = shape[0]
    columns = int(np.prod(shape[1:], dtype=np.int64))
    deviation, mean = spread_of(component, name, columns)
    outliers, factor = outlier_rows(component, name, rows, seed)
    words = np.frombuffer(hashlib.sha256(f"{seed}/{component}/{name}".encode()).digest(), np.uint32)
    # Chunks end with a row, so where they end depends on the shape alone.
    step = max(1, CHUNK // columns)
    for number, first in enumerate(range(0, rows, step)):
        count = min(step, rows - first)
        key = (*map(int, words), number)
        yield Chunk(key, first, (count, columns), deviation, mean, outliers, factor)


def draw(chunk: Chunk) -> bytes:
    """The chunk's numbers as bf16."""
    if chunk.counter:
        return bytes(8)
    if chunk.deviation == 0:
        values = np.full(chunk.shape, chunk.mean, np.float32)
    else:
        generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(chunk.seed)))
        values = generator.standard_normal(chunk.shape, np.float32)
        values *= np.float32(chunk.deviation)
        if chunk.mean:
            values += np.float32(chunk.mean)
        for row in chunk.outliers:
            if chunk.first <= row < chunk.first + chunk.shape[0]:
                values[row - chunk.first] *= np.float32(chunk.factor)
    return in_bf16(values)


def in_bf16(values: np.ndarray) -> bytes:
    """fp32 `values`, which are overwritten, rounded to bf16."""
    bits = values.view(np.uint32)
    bits += ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return (bits >> np.uint32(16)).astype(np.uint16).tobytes()


def spread_of(component: str, name: str, columns: int) -> tuple[float, float]:
    """(standard deviation, mean) of a tensor's numbers; `columns` values make one of its outputs."""
    if "norm" in name.rpartition(".")[0].rpartition(".")[2] and ".linear" not in name:
        return (0.0, 0.0) if name.endswith(".bias") else (0.0, 1.0)
    if name.endswith("running_mean"):
        return 0.1, 0.0
    if name.endswith("running_var"):
        return 0.0, 1.0
    if name.endswith(".bias"):
        return 0.0, 0.0
    if name.endswith("embed_tokens.weight") or name == "lm_head.weight":
        return 0.05, 0.0
    gain = 1.0
    if "modulation" in name or name.startswith("norm_out"):
        gain = 1.5
    elif (component == "text_encoder" and name.endswith(("o_proj.weight", "down_proj.weight"))) or (
        component == "vae" and name.startswith("decoder.conv_out")
    ):
        gain = 0.5
    return gain / columns**0.5, 0.0


def outlier_rows(component: str, name: str, rows: int, seed: int) -> tuple[tuple[int, ...], float]:
    """The outputs of a layer that are larger than the others, and how many times as large."""
    if component == "vae" or not name.endswith(".weight"):
        return (), 1.0
    if name.startswith(("x_embedder", "context_embedder")):
        return _channels("residual", rows, RESIDUAL_OUTLIERS, seed), 8.0
    if name.endswith((".to_out.0.weight", ".to_out.weight", ".to_add_out.weight", ".linear_out.weight")) or (
        name.endswith((".o_proj.weight", ".down_proj.weight"))
    ):
        return _channels("residual", rows, RESIDUAL_OUTLIERS, seed), 4.0
    if name.endswith((".gate_proj.weight", ".up_proj.weight")):
        return _channels("feed-forward", rows, FEED_FORWARD_OUTLIERS, seed), 4.0
    if name.endswith(".linear_in.weight"):
        half = _channels("feed-forward", rows // 2, FEED_FORWARD_OUTLIERS, seed)
        return (*half, *(rows // 2 + row for row in half)), 4.0
    return (), 1.0


def _channels(kind: str, count: int, one_of: int, seed: int) -> tuple[int, ...]:
    words = np.frombuffer(hashlib.sha256(f"{seed}/{kind}/{count}".encode()).digest(), np.uint32)
    generator = np.random.default_rng(np.random.SeedSequence(tuple(map(int, words))))
    return tuple(sorted(int(row) for row in generator.choice(count, max(1, count // one_of), replace=False)))


def write_tokenizer(folder: Path) -> None:
    """flux2-nano's, a byte a token, with the special tokens of Qwen3 under their ids there."""
    folder.mkdir()
    made = json.loads((NANO / "tokenizer" / "tokenizer.json").read_text())
    alphabet = sorted(token for token in made["model"]["vocab"] if len(token) == 1)
    made["model"] |= {"vocab": {token: number for number, token in enumerate(alphabet)} | SPECIAL | THINK, "merges": []}
    made |= {"truncation": None, "padding": None}
    made["added_tokens"] = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token in SPECIAL,
        }
        for token, number in (SPECIAL | THINK).items()
    ]
    _write_json(folder / "tokenizer.json", made)
    config = json.loads((NANO / "tokenizer" / "tokenizer_config.json").read_text())
    _write_json(folder / "tokenizer_config.json", config | {"model_max_length": 131072})
    shutil.copy(NANO / "tokenizer" / "chat_template.jinja", folder)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _bytes_of(name: str, shape: tuple[int, ...]) -> int:
    return 8 if _is_counter(name) else 2 * int(np.prod(shape, dtype=np.int64))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """The options that `shape_of` reads."""
    parser.add_argument("--widths", choices=sorted(MODELS), default="klein-4b")
    parser.add_argument("--blocks", metavar="D+S", help="double- and single-stream blocks (default: as published)")
    parser.add_argument(
        "--text-layers",
        type=int,
        help="layers of the text encoder, at least 28, of dev 31 (default: as published)",
    )
    parser.add_argument("--whole-text", action="store_true", help="dev's text encoder with its whole feed-forward")


def shape_of(options: argparse.Namespace) -> Shape:
    """What the options ask for; SystemExit where they cannot be read."""
    least = LEAST_LAYERS[options.widths]
    if options.text_layers is not None and options.text_layers < least:
        raise SystemExit(
            f"--text-layers {options.text_layers}: the pipeline takes the output of layer {least - 1}; {least} is the least"
        )
    if options.blocks is None:
        return Shape(options.widths, text_layers=options.text_layers, whole_text=options.whole_text)
    double, plus, single = options.blocks.partition("+")
    if not (plus and double.isdecimal() and single.isdecimal() and int(double) and int(single)):
        raise SystemExit(f"--blocks {options.blocks}: D+S is expected, such as 2+4")
    return Shape(options.widths, int(double), int(single), options.text_layers, options.whole_text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    add_shape_options(parser)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    shape = shape_of(options)
    size = make(options.folder, shape, options.seed)
    print(f"{shape.name}: {size / 1e9:.2f} GB in {options.folder}, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
