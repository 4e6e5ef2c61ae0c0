"""What the tests on a GPU need, as marks."""

from importlib.util import find_spec

import pytest
import torch

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NEEDS_FLA = pytest.mark.skipif(find_spec("fla") is None, reason="needs flash-linear-attention")
WITH_FLA = [*ON_GPU, NEEDS_FLA, pytest.mark.filterwarnings("ignore")]  # fla and Triton warn about themselves
UNTUNED = [*WITH_FLA, pytest.mark.usefixtures("no_tuning")]
