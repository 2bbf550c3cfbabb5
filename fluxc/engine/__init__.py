"""TensorRT engines: one plan for each kind of block, built from lowered graphs, then read back and audited."""
