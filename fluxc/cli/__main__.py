"""`python -m fluxc.cli`."""

from fluxc.cli.main import main

main()
