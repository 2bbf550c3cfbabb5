"""Networks by their configs alone: tensors, Linears, blocks, fusion groups; no torch."""
