"""`fluxc gpu-check`: what only a GPU can show of a bundle, as one command."""
