"""Targets: one module a kind, each turning neutral graphs and weights files into what one engine runs."""
