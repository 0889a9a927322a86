"""One thread a process: the models are small, and several test processes share the cores."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # and every process that a test starts: their threads would wait for each other

from collections.abc import Iterator

import hypothesis
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What a test has set, such as SummaryTrainingArguments for all cores, holds for that test alone."""
    yield
    torch.set_num_threads(1)


# Other tests run on the other core: how long an example takes says nothing.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
