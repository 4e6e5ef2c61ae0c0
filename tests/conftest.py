"""What all tests share: one torch thread, as cells use, so that numbers repeat and parallel test processes do not fight."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
