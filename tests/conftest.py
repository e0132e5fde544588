"""Shared set-up: one thread and no autograd, so that tests are quick and repeat bit by bit."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_torch():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
