"""Global random generators, seeded for a while."""

import random

import numpy as np
import pytest
import torch

from hgrn2_bench.seeding import seeded


def drawn() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_each_generator_has_its_own_seed():
    with seeded(1, 2, 3):
        one = drawn()
    with seeded(1, 2, 4):
        other = drawn()
    assert one[:2] == other[:2]
    assert one[2] != other[2]


def test_the_caller_s_generators_go_on_where_they_were_even_after_a_fault():
    with seeded(5, 6, 7):
        want = drawn(), drawn()
    with seeded(5, 6, 7):
        first = drawn()
        with pytest.raises(KeyError), seeded(1, 2, 3):
            raise KeyError(drawn())
        assert (first, drawn()) == want
