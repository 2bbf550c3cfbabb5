"""Reading checkpoints lazily, and knowing what a FLUX.2 consists of."""
