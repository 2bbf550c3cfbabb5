"""`python -m fluxc`."""

from fluxc.entry import main

main()
