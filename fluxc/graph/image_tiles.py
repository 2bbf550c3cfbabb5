"""The VAE's decoder for one tile of an image, and the graph that adds a decoded tile to the image so far."""

from __future__ import annotations

import onnx
import torch
from torch import nn

from fluxc.graph.export import trace
from fluxc.graph.values import renamed, rewired

TILE = {"rows": "tile_rows", "columns": "tile_columns", "image": "tile"}
"""What the decoder counts and gives where it decodes a tile, by what it is called of an image."""

FAR = 2.0**24
"""More pixels than an image has on a side, and still a whole number in fp32."""


class VaeBlend(nn.Module):
    """tile [1, tile_height, tile_width, 3], canvas [1, height, width, 3], spans [2, 5] -> canvas with the tile added to it.

    `spans` has a row for each side of the image, in pixels: the tile's first, where its weight starts to rise from 0, the
    length of this ramp to 1, and the same of its fall. A pixel has the product of its row's and its column's weight.
    """

    def forward(self, tile: torch.Tensor, canvas: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
        rows, row_weights = _along(spans[0], tile.shape[1], canvas.shape[1])
        columns, column_weights = _along(spans[1], tile.shape[2], canvas.shape[2])
        placed = tile.index_select(1, rows).index_select(2, columns)
        return canvas + placed * row_weights.reshape(-1, 1, 1) * column_weights.reshape(-1, 1)


def _along(span: torch.Tensor, tile: int, whole: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of `whole` pixels of a side, which of the tile's lies there, and its weight: 0 where none does."""
    start, rise, rise_length, fall, fall_length = (span[at] for at in range(5))
    pixels = torch.arange(whole, dtype=torch.float32, device=span.device)
    # Bounds of Clip are constants: with others it becomes Min and Max, which may have no kernel on CUDA.
    after = (pixels - start).clamp(0.0, FAR)
    inside = (after - (after - (tile - 1)).clamp(0.0, FAR)).to(torch.int64)
    risen, fallen = ((pixels - at) / length for at, length in ((rise, rise_length), (fall, fall_length)))
    return inside, risen.clamp(0.0, 1.0) - fallen.clamp(0.0, 1.0)


def trace_vae_blend() -> onnx.ModelProto:
    """The neutral graph `vae_blend`, in fp32, without weights."""
    with torch.device("meta"):
        inputs = {
            "tile": (torch.empty(1, 48, 56, 3), {1: "tile_height", 2: "tile_width"}),
            "canvas": (torch.empty(1, 80, 72, 3), {1: "height", 2: "width"}),
            "spans": (torch.empty(2, 5), None),
        }
        return trace(VaeBlend(), inputs, ("image",))


def of_a_tile(decoder: onnx.ModelProto) -> onnx.ModelProto:
    """`vae_decoder` of an image as that of a tile: latent_grid [1, tile_rows, tile_columns, C] -> tile."""
    model = onnx.ModelProto()
    model.CopyFrom(decoder)
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            number, star, symbol = dimension.dim_param.rpartition("*")
            if symbol in TILE:
                dimension.dim_param = f"{number}{star}{TILE[symbol]}"
    nodes = [rewired(node, lambda name: TILE["image"] if name == "image" else name) for node in graph.node]
    outputs = [renamed(value, TILE[value.name]) for value in graph.output]
    del graph.node[:], graph.output[:]
    graph.node.extend(nodes)
    graph.output.extend(outputs)
    return model
