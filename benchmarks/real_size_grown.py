"""Makes a checkpoint of a published model's size that computes what flux2-nano computes, for `real_size.py --grown`.

    python benchmarks/real_size_grown.py klein-4b-grown                               # klein 4B's size: 15.8 GB

Random weights show what a real size takes, and not whether its images are right. These show it: transformer and text encoder
have klein's widths, heads, depth and files, and one and the same image comes out of them and of flux2-nano. How they are made:

1. Every channel of flux2-nano stands there many times, and a Linear divides the weights of its inputs by how many there are.
2. A head of attention is wider; those of its rotary pairs that turn as fast as flux2-nano's hold its values, and the weights of
   the norms make up for the width.
3. Where flux2-nano has nothing, weights are noise of FAINT their neighbours' size, and further blocks are copies whose outputs
   are FAINT: so no tensor is all zeros, which no real one is.

The VAE and the tokenizer are flux2-nano's own, so the transformer has its 32 latent channels where klein has 128.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from real_size_checkpoint import NANO, Pieces, Shape, add_shape_options, in_bf16, shape_of, write_component
from safetensors import safe_open

from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.qwen3 import Qwen3

FAINT = 1e-3
OUTPUTS = re.compile(r"\.(to_out|to_out\.0|to_add_out|linear_out|o_proj|down_proj)\.weight$")
"""What a block adds to the residual stream."""
NOTHING = -1
"""In a map, a channel that flux2-nano has nothing for."""


def make(folder: Path, configs: dict[str, dict[str, Any]]) -> int:
    """Write the checkpoint with the components of `configs` into `folder`, which appears when it is complete; its bytes on
    disk."""
    partial_folder = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    shutil.copytree(
        NANO, partial_folder, ignore=shutil.ignore_patterns("*.py", "README.md", "transformer", "text_encoder")
    )
    for component, config in configs.items():
        (partial_folder / component).mkdir()
        (partial_folder / component / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_component(
            partial_folder / component, component, tensors_of(component, config), pieces_of(component, config)
        )
    size = sum(path.stat().st_size for path in partial_folder.rglob("*") if path.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.replace(folder)
    return size


def configs_of(shape: Shape) -> dict[str, dict[str, Any]]:
    """The config.json of both components: of `shape`'s size, with what flux2-nano takes and gives."""
    transformer, text = shape.transformer, shape.text_encoder
    small, small_text = _config("transformer"), _config("text_encoder")
    same = ("in_channels", "rope_theta", "eps")
    ids = ("eos_token_id", "pad_token_id", "bos_token_id", "rope_parameters", "rms_norm_eps")
    return {
        "transformer": transformer | {name: small[name] for name in same},
        "text_encoder": text | {name: small_text[name] for name in ids} | {"tie_word_embeddings": True},
    }


def tensors_of(component: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The component's tensors, name and shape."""
    if component == "transformer":
        return dict(Flux2Transformer.read(config).tensors)
    encoder = Qwen3.read(config)
    return encoder.tensors(encoder.num_hidden_layers)


@dataclass(frozen=True)
class Spread:
    """How a tensor of flux2-nano becomes a larger one: of each output and input, the channel that it repeats or NOTHING.

    A vector has no `inputs`. All is multiplied by `factor`, and divided by how often an input stands there, if it is `shared`.
    """

    outputs: np.ndarray
    inputs: np.ndarray | None = None
    factor: float = 1.0
    shared: bool = True


def grown(small: np.ndarray, spread: Spread, generator: np.random.Generator) -> np.ndarray:
    """The larger tensor, fp32."""
    if spread.inputs is None:
        found = small[np.maximum(spread.outputs, 0)] * np.float32(spread.factor)
        found[spread.outputs == NOTHING] = spread.factor
        return found
    columns = small[:, np.maximum(spread.inputs, 0)]
    if spread.shared:
        counts = np.bincount(spread.inputs[spread.inputs != NOTHING], minlength=small.shape[1])
        columns = columns / np.float32(counts)[np.maximum(spread.inputs, 0)]
    columns *= np.float32(spread.factor)
    faint = np.float32(FAINT * columns.std())
    found = columns[np.maximum(spread.outputs, 0)]
    for part in ((spread.outputs == NOTHING, slice(None)), (slice(None), spread.inputs == NOTHING)):
        found[part] = faint * generator.standard_normal(found[part].shape, np.float32)
    return found


def pieces_of(component: str, config: dict[str, Any]) -> Pieces:
    """The tensors of a larger component, each in one piece."""
    small = _config(component)
    spread_of = (_Transformer if component == "transformer" else _TextEncoder)(small, config)
    (file,) = (NANO / component).glob("*.safetensors")

    def piece(name: str, shape: tuple[int, ...]) -> bytes:
        source, factor = spread_of.source(name)
        with safe_open(file, "pt") as tensors:
            values = tensors.get_tensor(source).float().numpy()
        spread = spread_of(name)
        spread = replace(spread, factor=spread.factor * factor)
        larger = grown(values, spread, np.random.default_rng(list(name.encode())))
        assert larger.shape == shape, (name, larger.shape, shape)
        return in_bf16(larger)

    def pieces(name: str, shape: tuple[int, ...]) -> Iterator[Callable[[], bytes]]:
        yield partial(piece, name, shape)

    return pieces


def tiled(count: int, small: int) -> np.ndarray:
    """`small` channels one after the other, again and again; NOTHING for what is left over."""
    found = np.arange(count) % small
    found[count // small * small :] = NOTHING
    return found


def beside(*maps: tuple[np.ndarray, int]) -> np.ndarray:
    """Maps one after the other, each with the number of channels of flux2-nano that it is a map of."""
    found, first = [], 0
    for one, count in maps:
        found.append(np.where(one == NOTHING, NOTHING, one + first))
        first += count
    return np.concatenate(found)


def heads_of(count: int, small_count: int, inner: np.ndarray, small_width: int) -> np.ndarray:
    """Of heads that repeat flux2-nano's in turn, each with the map `inner`."""
    numbers = np.arange(count) % small_count
    return np.concatenate([np.where(inner == NOTHING, NOTHING, inner + number * small_width) for number in numbers])


def spread_blocks(count: int, small: int) -> dict[int, int]:
    """{block: flux2-nano's block that it is}, evenly over the depth."""
    return {round(place): number for number, place in enumerate(np.linspace(0, count - 1, small))}


class _Transformer:
    """Maps of the transformer's tensors."""

    def __init__(self, small: dict[str, Any], large: dict[str, Any]) -> None:
        one, other = Flux2Transformer.read(small), Flux2Transformer.read(large)
        text, large_text = small["joint_attention_dim"] // 3, large["joint_attention_dim"] // 3
        width, mlp = tiled(other.width, one.width), tiled(other.mlp_width, one.mlp_width)
        small_head, head = one.attention_head_dim, other.attention_head_dim
        counts = other.num_attention_heads, one.num_attention_heads
        turning = rotary_places(list(large["axes_dims_rope"]), list(small["axes_dims_rope"]))
        turned = heads_of(*counts, turning, small_head)
        values = heads_of(*counts, tiled(head, small_head), small_head)
        channels = np.arange(one.in_channels)
        times = tiled_times(large["timestep_guidance_channels"], small["timestep_guidance_channels"])
        # The norm takes the root mean square over a wider head, and attention divides by the root of its width.
        norm = Spread(turning, factor=(head / small_head) ** -0.25)
        self._blocks = {
            "transformer_blocks": spread_blocks(large["num_layers"], small["num_layers"]),
            "single_transformer_blocks": spread_blocks(large["num_single_layers"], small["num_single_layers"]),
        }
        self._counts = {
            "transformer_blocks": small["num_layers"],
            "single_transformer_blocks": small["num_single_layers"],
        }

        def chunks(map_: np.ndarray, count: int, times: int) -> np.ndarray:
            return beside(*[(map_, count)] * times)

        qkv = beside((turned, one.width), (turned, one.width), (values, one.width))
        by_end = {
            "x_embedder": (width, channels),
            "context_embedder": (width, chunks(tiled(large_text, text), text, 3)),
            "timestep_embedder.linear_1": (width, times),
            "timestep_embedder.linear_2": (width, width),
            "modulation_img.linear": (chunks(width, one.width, 6), width),
            "modulation_txt.linear": (chunks(width, one.width, 6), width),
            "stream_modulation.linear": (chunks(width, one.width, 3), width),
            "norm_out.linear": (chunks(width, one.width, 2), width),
            "proj_out": (channels, width),
            "to_qkv_mlp_proj": (
                beside((qkv, 3 * one.width), (chunks(mlp, one.mlp_width, 2), 2 * one.mlp_width)),
                width,
            ),
            "attn.to_out": (width, beside((values, one.width), (mlp, one.mlp_width))),
            "attn.to_out.0": (width, values),
            "to_add_out": (width, values),
            "linear_in": (chunks(mlp, one.mlp_width, 2), width),
            "linear_out": (width, mlp),
        }
        by_end |= dict.fromkeys(("to_q", "to_k", "add_q_proj", "add_k_proj"), (turned, width))
        by_end |= dict.fromkeys(("to_v", "add_v_proj"), (values, width))
        self._maps = {end: Spread(*maps) for end, maps in by_end.items()}
        self._maps |= dict.fromkeys(("norm_q", "norm_k", "norm_added_q", "norm_added_k"), norm)

    def source(self, name: str) -> tuple[str, float]:
        """The tensor of flux2-nano that `name` is made of, and how much of it is left."""
        kind, _, rest = name.partition(".")
        if kind not in self._blocks:
            return name, 1.0
        number, _, inner = rest.partition(".")
        same = self._blocks[kind].get(int(number))
        if same is not None:
            return f"{kind}.{same}.{inner}", 1.0
        return f"{kind}.{int(number) % self._counts[kind]}.{inner}", FAINT if OUTPUTS.search(name) else 1.0

    def __call__(self, name: str) -> Spread:
        return _by_end(self._maps, name)


class _TextEncoder:
    """Maps of the text encoder's tensors: its first layers are flux2-nano's; what comes after the last one taken is a copy."""

    def __init__(self, small: dict[str, Any], large: dict[str, Any]) -> None:
        one, other = Qwen3.read(small), Qwen3.read(large)
        width, mlp = tiled(other.hidden_size, one.hidden_size), tiled(other.intermediate_size, one.intermediate_size)
        small_head, head = one.head_width, other.head_width
        turning = halved_places(head, small_head)
        queries = other.num_attention_heads, one.num_attention_heads
        keys = other.num_key_value_heads or 1, one.num_key_value_heads or 1
        assert keys[1] == 1, "queries would need the keys of their own group"
        values = tiled(head, small_head)
        norm = Spread(turning, factor=(head / small_head) ** -0.25)
        rows = np.arange(other.vocab_size)
        rows[one.vocab_size :] = NOTHING
        self._layers = one.num_hidden_layers
        self._maps = {
            "embed_tokens": Spread(rows, width, shared=False),
            "q_proj": Spread(heads_of(*queries, turning, small_head), width),
            "k_proj": Spread(heads_of(*keys, turning, small_head), width),
            "v_proj": Spread(heads_of(*keys, values, small_head), width),
            "o_proj": Spread(width, heads_of(*queries, values, small_head)),
            "gate_proj": Spread(mlp, width),
            "up_proj": Spread(mlp, width),
            "down_proj": Spread(width, mlp),
        }
        self._maps |= dict.fromkeys(("q_norm", "k_norm"), norm)
        self._maps |= dict.fromkeys(("input_layernorm", "post_attention_layernorm", "model.norm"), Spread(width))

    def source(self, name: str) -> tuple[str, float]:
        """The tensor of flux2-nano that `name` is made of, and how much of it is left."""
        return re.sub(r"layers\.(\d+)\.", lambda found: f"layers.{int(found[1]) % self._layers}.", name), 1.0

    def __call__(self, name: str) -> Spread:
        return _by_end(self._maps, name)


def rotary_places(axes: list[int], small_axes: list[int]) -> np.ndarray:
    """FLUX.2's: each axis has its own channels; channels 2i and 2i + 1 of it turn by theta^(-2i / width of the axis)."""
    maps = []
    for large, small in zip(axes, small_axes, strict=True):
        every = large // small
        pair, side = np.arange(large) // 2, np.arange(large) % 2
        maps.append((np.where(pair % every == 0, 2 * (pair // every) + side, NOTHING), small))
    return beside(*maps)


def halved_places(head: int, small: int) -> np.ndarray:
    """Qwen3's: channels i and i + width / 2 of a head turn by theta^(-2i / width)."""
    every, half = head // small, np.arange(head) % (head // 2)
    side = np.arange(head) // (head // 2)
    return np.where(half % every == 0, half // every + side * (small // 2), NOTHING)


def tiled_times(channels: int, small: int) -> np.ndarray:
    """The timestep's: cosines, then sines, of frequencies that fall from channel to channel by the same factor."""
    every, place = channels // small, np.arange(channels // 2)
    half = np.where(place % every == 0, place // every, NOTHING)
    return beside((half, small // 2), (half, small // 2))


def _by_end(maps: dict[str, Spread], name: str) -> Spread:
    """The map of the tensor, found by how its name ends; the longest end counts."""
    stem = name.removesuffix(".weight")
    end = max((end for end in maps if stem.endswith(end)), key=len)
    return maps[end]


def _config(component: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((NANO / component / "config.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    add_shape_options(parser)
    options = parser.parse_args()
    began = time.perf_counter()
    size = make(options.folder, configs_of(shape_of(options)))
    print(f"{size / 1e9:.2f} GB in {options.folder}, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
