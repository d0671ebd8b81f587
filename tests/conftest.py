"""One thread: tiny models are slower on more."""

import torch

torch.set_num_threads(1)
