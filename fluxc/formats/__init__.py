"""Number formats: storage and numerics, one file a format, with the compiled kernels."""
