"""Shared by the tests on a GPU."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hgrn2_bench.ops.autotune import autotuners

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of fla_cases, where pytest was given this folder alone
from fla_cases import load_kernels


@pytest.fixture(scope="module")
def no_tuning() -> Iterator[None]:
    """The first configuration of each kernel, for one file only: its tests check values, and tuning takes minutes."""
    load_kernels()
    tuners = list(autotuners())
    kept = [tuner.configs for tuner in tuners]
    for tuner in tuners:
        tuner.configs = tuner.configs[:1]
    yield
    for tuner, configs in zip(tuners, kept, strict=True):
        tuner.configs = configs
