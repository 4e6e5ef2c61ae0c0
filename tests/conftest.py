"""What all tests share: one torch thread, as cells use, so that numbers repeat and parallel test processes do not fight; a cache."""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Generated data go to a folder of the test run, not to the user's."""
    os.environ["HGRN2_BENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
