"""The `tensorrt_rtx` and `tensorrt` targets: an engine for each kind of block, built from lowered graphs and audited."""
