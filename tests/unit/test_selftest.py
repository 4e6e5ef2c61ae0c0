"""The self-test's inputs, and that it tells a wrong kernel from a right one."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from hgrn2_bench import registry
from hgrn2_bench.ops import chunked, fla
from hgrn2_bench.selftest import DTYPES, compare, placed, samples


def test_every_family_that_a_model_runs_has_a_sample():
    sampled = {inputs.family for inputs in samples().values()}
    assert sampled >= {model.facts["family"] for model in registry.models().values() if model.facts.get("family")}
    assert sampled >= {entry.partition(" ")[0] for entry in fla._KERNELS}


def test_samples_repeat():
    first, second = samples(), samples()
    for case, inputs in first.items():
        for field in fields(inputs):
            value = getattr(inputs, field.name)
            same = torch.equal(value, getattr(second[case], field.name)) if isinstance(value, Tensor) else True
            assert same, (case, field.name)


def test_gates_stay_in_float32():
    dtypes = {}
    for inputs in samples().values():
        moved = placed(inputs, "cpu", torch.bfloat16)
        dtypes |= {f.name: x.dtype for f in fields(moved) if isinstance(x := getattr(moved, f.name), Tensor)}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide == {"log_f_BTHK", "log_f_BTH", "log_f_BTHM", "log_a_BTD", "log_a_DN", "theta_DN", "beta_BTH", "dt_BTD", "A_DN"}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16, torch.complex64}


def test_loading_imports_the_kernel_that_will_run(monkeypatch):
    asked = []
    monkeypatch.setattr(fla, "_function", lambda module, name: asked.append(name))
    for case, dtype in (
        ("delta_rule without decay", torch.bfloat16),
        ("delta_rule without decay", torch.float32),
        ("softmax", torch.float32),
    ):
        fla.load(placed(samples()[case], "cpu", dtype))
    assert asked == ["chunk_delta_rule", "chunk_gated_delta_rule"]


def test_a_right_kernel_agrees():
    found = list(compare("per_channel_decay", "cpu"))
    assert [line["dtype"] for line in found] == [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    assert found[0]["error"] < 1e-5
    assert 1e-5 < found[1]["error"] < 1e-2
    assert found[0]["kernel"] == "chunked.per_channel_decay"


def test_a_wrong_gradient_is_seen(monkeypatch):
    right = chunked.per_channel_decay

    def wrong(inputs, state):
        k = inputs.k_BTHK
        return right(replace(inputs, k_BTHK=1.05 * k - 0.05 * k.detach()), state)

    monkeypatch.setattr(chunked, "per_channel_decay", wrong)
    for line in compare("per_channel_decay", "cpu"):
        assert line["tensor"] == "dk_BTHK"
        assert line["error"] == pytest.approx(0.05, rel=0.1)


def test_a_kernel_that_raises_is_a_fault_of_its_dtype_only(monkeypatch):
    right = chunked.softmax

    def choosy(inputs, state):
        if inputs.v_BTHV.dtype == torch.bfloat16:
            raise RuntimeError("not\nhere")
        return right(inputs, state)

    monkeypatch.setattr(chunked, "softmax", choosy)
    first, second = compare("softmax", "cpu")
    assert first["error"] < 1e-5
    assert second["fault"] == "RuntimeError: not here"
