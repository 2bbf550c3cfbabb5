"""`python -m fluxrt`."""

import sys

from fluxrt.entry import main

sys.exit(main())
