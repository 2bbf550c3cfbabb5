"""The `onnxruntime` target: graphs for ONNX Runtime, on the CPU or through its CUDA provider."""
