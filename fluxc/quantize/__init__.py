"""Number formats, the precision plan, and the writer of quantized weights."""
