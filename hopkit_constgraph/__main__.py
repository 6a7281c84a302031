"""``python -m hopkit_constgraph`` is ``hopkit constgraph``."""

import runpy
import sys

sys.argv[1:1] = ["constgraph"]
runpy.run_module("hopkit", run_name="__main__")
