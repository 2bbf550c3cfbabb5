"""What every part of fluxc stands on: errors, progress, safetensors files, the stage cache; no torch."""
