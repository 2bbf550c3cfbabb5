"""A checkpoint's own model, run by diffusers: where, in which type, and how much of it is in memory at a time."""
