"""A made-up GPU: the CUDA driver's and TensorRT's interfaces on a CPU, for tests and for rehearsing what needs a GPU."""
