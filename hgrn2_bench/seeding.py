"""Global random generators, seeded for a while: for libraries that draw from them."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def seeded(for_random: int, for_numpy: int, for_torch: int) -> Iterator[None]:
    """The generators of random, numpy and torch with these seeds; afterwards they go on where the caller left them."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    random.seed(for_random)
    np.random.seed(for_numpy)
    torch.manual_seed(for_torch)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)
