"""bf16: a layer that stays as it is. It has no parts of its own; what is excluded is copied from the checkpoint."""

BF16 = "bf16"
