"""Our clock on a GPU beside Triton's, and what makes a number on a GPU wrong."""

import pytest
import torch
import torch.nn.functional as F
from gpu_marks import ON_GPU

from hgrn2_bench import timing
from hgrn2_bench.ops import families
from hgrn2_bench.ops.families import DecayInputs, SoftmaxInputs

pytestmark = [*ON_GPU, pytest.mark.filterwarnings("ignore")]


def inputs(family):
    """16 sequences of 4,096 tokens, 8 heads of 128."""
    q, k, v, logits = torch.randn(4, 16, 4096, 8, 128, device="cuda").unbind(0)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    return SoftmaxInputs(q, k, v, scale=128**-0.5) if family == "softmax" else DecayInputs(q, k, v, F.logsigmoid(logits))


@pytest.mark.parametrize("family", ["per_channel_decay", "softmax"])
@pytest.mark.parametrize("gradients", [False, True])
def test_agrees_with_triton_s_clock(family, gradients):
    from triton.testing import do_bench

    given = inputs(family)
    leaves = [x.requires_grad_(gradients) for x in vars(given).values() if isinstance(x, torch.Tensor)]
    do = torch.randn_like(given.v_BTHV)

    def call():
        with torch.set_grad_enabled(gradients):
            o, _ = families.run(given, "fla")
        return torch.autograd.grad(o, leaves, do) if gradients else o

    ours = timing.time_calls([call], "cuda").median
    theirs = do_bench(call, warmup=100, rep=500, return_mode="median") / 1e3
    assert ours == pytest.approx(theirs, rel=0.03)


def test_the_device_is_waited_for():
    """A product that takes milliseconds, of which the host sees microseconds."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    timed = timing.time_calls([lambda: a @ a], "cuda", sample_s=0.1)
    assert timed.median > 2 * 8192**3 / 2.5e15
    assert timed.steady


def test_ceilings_are_below_the_data_sheet():
    top = timing.ceilings("cuda", torch.bfloat16)
    name = torch.cuda.get_device_name()
    timing.check_plausible(top.matmul, top.copy, 1.0, name)
    assert top.copy > 1e11
    assert top.matmul > 1e13
