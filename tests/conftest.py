"""Settings for all tests."""

import torch

# The tensors are tiny: a second thread gains nothing, and on a busy machine it waits for the first.
torch.set_num_threads(1)
