"""Fixtures and helpers that every test may use."""

import os

import torch

# A test run shares the machine with itself: no more threads than cores, the same results everywhere.
torch.set_num_threads(min(2, os.cpu_count() or 1))
