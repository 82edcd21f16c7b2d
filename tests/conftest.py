"""What every test shares."""

import torch

# Networks of test size lose by threads: a step of 43 ms takes 150 to 2900 ms with two on a busy two-core machine.
torch.set_num_threads(1)
