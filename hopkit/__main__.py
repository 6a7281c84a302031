"""``python -m hopkit``."""

import sys

from hopkit.cli import main

sys.exit(main())
