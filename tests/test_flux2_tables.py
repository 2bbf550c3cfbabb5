"""The tables of layers and tensors against diffusers' and transformers' own models, for the whole family."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from conftest import NANO
from fluxc.base.errors import CheckpointError
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.models.published import DEV, KLEIN_4B, KLEIN_9B
from fluxc.models.qwen3 import Qwen3

NANO_CONFIG = {
    key: value
    for key, value in json.loads((NANO / "transformer" / "config.json").read_text()).items()
    if not key.startswith("_")
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(DEV, 32.22e9), (KLEIN_9B, 9.08e9), (KLEIN_4B, 3.88e9), (NANO_CONFIG, 2.46e6)],
    ids=["dev", "klein-9B", "klein-4B", "nano"],
)
def test_transformer_table_equals_diffusers(config: dict[str, object], parameters: float) -> None:
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        model = Flux2Transformer2DModel.from_config(config)
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert Flux2Transformer.read(config).tensors == theirs
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {layer.name for layer in Flux2Transformer.read(config).linears} == linears
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-3)


def test_dev_has_203_linears() -> None:
    assert len(Flux2Transformer.read(DEV).linears) == 203


@pytest.mark.parametrize("tied", [True, False])
def test_text_encoder_table_equals_transformers(tied: bool) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": tied,
    }
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**config))
    theirs = {name: tuple(v.shape) for name, v in model.state_dict().items() if name != "lm_head.weight"}
    assert Qwen3.read(config).tensors(3) == theirs
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert {layer.name for layer in Qwen3.read(config).linears(3)} == linears


@pytest.mark.parametrize(
    "config",
    [
        json.loads((NANO / "vae" / "config.json").read_text()),
        {
            "block_out_channels": [128, 256, 512, 512],
            "latent_channels": 32,
            "layers_per_block": 2,
            "patch_size": [2, 2],
        },
        {"decoder_block_out_channels": [64, 128, 256, 256]},
        {
            "block_out_channels": [32, 64],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
            "latent_channels": 4,
            "layers_per_block": 3,
        },
    ],
    ids=["flux2-nano", "as published", "small decoder", "odd"],
)
def test_the_vaes_tensors_equal_diffusers(config: dict[str, Any]) -> None:
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        vae = AutoencoderKLFlux2.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert Flux2VAE.read(config, Path("vae")).tensors == expected


def test_a_field_of_a_config_that_does_not_fit_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"vae/config\.json: Expected `int`, got `str` - at `latent_channels`"):
        Flux2VAE.read({"latent_channels": "many"}, Path("vae"))


def test_what_a_config_leaves_out_is_what_the_libraries_take() -> None:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3Config

    def taken(model: type) -> dict[str, Any]:
        return {name: given.default for name, given in inspect.signature(model.__init__).parameters.items()}

    theirs = [
        (Flux2Transformer, taken(Flux2Transformer2DModel)),
        (Flux2VAE, taken(AutoencoderKLFlux2)),
        (Qwen3, Qwen3Config().to_dict()),
    ]
    for model, expected in theirs:
        ours = msgspec.structs.asdict(model.read({}))
        # What follows from other fields is left out.
        given = [name for name in ours if name not in ("layer_types", "rope_parameters", "sliding_window")]
        assert {name: ours[name] for name in given} == {name: expected[name] for name in given}
