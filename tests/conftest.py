"""One thread a process: the models are small, and several test processes share the cores."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # and every process that a test starts: their threads would wait for each other

import hypothesis
import torch

torch.set_num_threads(1)

# Other tests run on the other core: how long an example takes says nothing.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
