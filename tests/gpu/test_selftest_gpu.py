"""The self-test of `doctor` on a real GPU: every kernel that this Triton does not miscompile agrees, in minutes at most."""

import time
from pathlib import Path

import pytest
from gpu_marks import NEEDS_FLA, ON_GPU

from hgrn2_bench.doctor import PROBLEM, REQUIRED, agrees, combination_findings, told
from hgrn2_bench.machine import compare_on_gpu, gather

pytestmark = [*ON_GPU, NEEDS_FLA]

LIMIT_S = 180.0


def test_every_kernel_agrees_with_the_reference(tmp_path: Path) -> None:
    facts = gather(tmp_path, tuple(REQUIRED))
    assert facts.torch is not None
    assert (facts.torch.available, facts.torch_fault) == (True, "")
    if any(each.mark == PROBLEM for each in combination_findings(facts)):
        pytest.skip("fla refuses a gradient with this Triton on this GPU")
    began = time.monotonic()
    found = compare_on_gpu(facts.torch.cases)
    took_s = time.monotonic() - began
    assert [told(each, "cuda") for each in found if not agrees(each, "cuda")] == []
    assert {each.case for each in found} == set(facts.torch.cases)
    assert {each.kernel.partition(".")[0] for each in found} == {"fla", "chunked", "torch"}
    assert took_s < LIMIT_S
