"""Makes tests/reference and the modules beside the tests importable from any working directory."""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# The reference works on tiny tensors: starting PyTorch's threads costs more than they compute.
torch.set_num_threads(1)
