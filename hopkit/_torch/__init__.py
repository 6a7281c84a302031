"""The seam: the only folder that names private torch. One file per area; its first line is the feature that needs them.

``tests/contract/test_canary.py`` asks the installed torch for every private name used here.
"""

import torch

from hopkit._torch.versions import check

check(torch.__version__)
