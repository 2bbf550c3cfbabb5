"""`python -m fluxc`."""

from fluxc.cli.main import main

main()
