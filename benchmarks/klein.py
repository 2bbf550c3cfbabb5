"""The transformer of FLUX.2-klein-4B as its config.json describes it: what the benchmarks take their shapes from."""

KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 7680,
    "in_channels": 128,
    "mlp_ratio": 3.0,
    "guidance_embeds": False,
}
