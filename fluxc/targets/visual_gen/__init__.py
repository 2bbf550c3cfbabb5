"""The `visual_gen` target: a folder that TensorRT-LLM's VisualGen loads."""
