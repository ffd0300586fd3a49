"""What has to be settled before any test imports anything."""

import os

import torch

if not torch.cuda.is_available():
    # Triton looks at this when it is first imported: its kernels then run on the CPU, for tests of the fused kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")
