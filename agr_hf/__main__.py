"""`python -m agr_hf` is the command `agr-hf`."""

import sys

from agr_hf.cli import main

sys.exit(main())
