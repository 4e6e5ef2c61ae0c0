"""The checks of one mixer: each fault is found by its own check and named, the other checks still run, and the verdict counts them."""

import pytest
import torch
from test_results import failed, row
from torch import nn

from baselines.base_conv import BaseConv
from hgrn2_bench import check, contract
from hgrn2_bench.contract import BrokenPromiseError, DoesNotApplyError, Subject
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.hgrn2 import HGRN2
from hgrn2_bench.interfaces import Mixer, MixerSpec, recomputing
from hgrn2_bench.plan import make_plan

SPEC = MixerSpec(d_model=16, layer=1, num_layers=2, conv=4, max_len=check.LONGEST)


class Mean(nn.Module):
    """The mean of all inputs so far: a plain module without a fault."""

    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, x):
        return self.linear(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class Narrow(HGRN2):
    def forward(self, x_BTD, ctx=None):
        return super().forward(x_BTD, ctx)[..., 1:]


class Double(Mean):
    def forward(self, x):
        return super().forward(x).double()


class NotFinite(Mean):
    def forward(self, x):
        return super().forward(x) / (x.shape[1] != 65)


class AllNaN(Mean):
    def forward(self, x):
        return float("nan") * super().forward(x)


class Constant(Mean):
    def forward(self, x):
        return 0 * super().forward(x) + 1


class Unused(Mean):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.spare = nn.Linear(d_model, 1, bias=False)


class NotANumber(Mean):
    def forward(self, x):
        return super().forward(x) + 0 * (0 * self.linear.bias).sqrt()  # the value is right, its gradient is 0 * inf


class Stuck(Unused):
    def forward(self, x):
        return super().forward(x) + 0 * self.spare.weight


class LooksAhead(Mean):
    def forward(self, x):
        ahead = torch.cat([x[:, 2:], x[:, :2]], 1)
        return super().forward(x) + (torch.arange(x.shape[1]) == 31)[:, None] * ahead


class NoMixing(Mean):
    def forward(self, x):
        return self.linear(x)


class Random(Mean):
    def forward(self, x):
        return super().forward(x) + torch.randn_like(x)


class Forgetful(HGRN2):
    def step(self, x_BD, state, shared=None, carry=None):
        y_BD, following = super().step(x_BD, state, shared, carry)
        return y_BD, {**following, "op": (0.9 * following["op"][0],)}


class WrongState(HGRN2):
    def forward(self, x_BTD, ctx=None):
        y_BTD = super().forward(x_BTD, ctx)
        if ctx is not None and "op" in ctx.next_state:
            ctx.next_state["op"] = (2 * ctx.next_state["op"][0],)
        return y_BTD


class Padded(HGRN2):
    def forward(self, x_BTD, ctx=None):
        ctx.lengths_B = None
        return super().forward(x_BTD, ctx)


class Misplaces(BaseConv):
    long = "all"

    def convolve(self, x_BTD, ctx):
        y_BTD = super().convolve(x_BTD, ctx)
        if ctx.lengths_B is not None:
            ctx.next_state["past"] = (x_BTD,)  # the padding is taken for tokens
        return y_BTD


class Carries(HGRN2):
    """Sound: a layer works on what layer 0 left."""

    def forward(self, x_BTD, ctx=None):
        if self.spec.layer == 0:
            ctx.carry["gain"] = x_BTD.sigmoid()
        return super().forward(x_BTD, ctx) * ctx.carry["gain"]


class Overflows(Mean):
    def forward(self, x):
        return super().forward(x) * (float("inf") if torch.is_autocast_enabled("cpu") else 1)


class OverRows(Mean):
    def forward(self, x):
        return super().forward(x) - x.mean(0)


class Understates(HGRN2):
    def state_size(self, seq_len, itemsize=4):
        return super().state_size(seq_len, itemsize) - 4


class Disagrees(HGRN2):
    def readout(self, o, x_BTD):
        return super().readout(o, x_BTD) * (1.01 if self.spec.backend == "reference" else 1)


FAULTS = [
    (Narrow, "shape", r"the output of \(2, 1, 16\) has shape \(2, 1, 15\)"),
    (Double, "shape", "the output of torch.float32 is torch.float64"),
    (NotFinite, "shape", "the output at T=65 is not finite"),
    (Constant, "shape", "the output at T=1 is the same number everywhere"),
    (Unused, "gradients", "none for spare.weight$"),
    (NotANumber, "gradients", "not finite for linear.bias$"),
    (Stuck, "gradients", "zero for spare.weight$"),
    (LooksAhead, "causality", "the output at position 31 changes with token 33"),
    (NoMixing, "causality", "no mixing over time"),
    (Random, "determinism", "a second call on the same input"),
    (Forgetful, "decoding", "steps after a prompt of 0 tokens"),
    (WrongState, "two chunks", "two chunks against one forward pass: differs by up to"),
    (Padded, "padding", "a row of length 9 with padding against the row alone, state"),
    (Misplaces, "padding", "a row of length 9 with padding against the row alone, one step later: differs by up to"),
    (Overflows, "bfloat16", "the output under bfloat16 autocast is not finite"),
    (OverRows, "batch", "row 0 alone against the batch: differs by up to"),
    (Understates, "state", r"state_size says \d+ bytes after 5 tokens, step holds \d+"),
    (Disagrees, "backends", "chunked against reference, output"),
]


def subject(cls, shake=0.0):
    return Subject(cls if issubclass(cls, Mixer) else recomputing(cls), SPEC, shake)


@pytest.mark.parametrize(("cls", "name", "told"), FAULTS, ids=[cls.__name__ for cls, _, _ in FAULTS])
def test_each_fault_is_found_by_its_check_and_named(cls, name, told):
    with pytest.raises(BrokenPromiseError, match=told):
        check.CONTRACT[name](subject(cls))


@pytest.mark.parametrize("name", ["causality", "determinism", "decoding", "two chunks", "batch"])
def test_an_output_that_is_not_finite_is_told_as_that_and_not_as_another_fault(name):
    with pytest.raises(BrokenPromiseError, match=r"not finite$"):
        check.CONTRACT[name](subject(AllNaN))


@pytest.mark.parametrize("name", check.CONTRACT)
@pytest.mark.parametrize("cls", [Mean, HGRN2, BaseConv, Carries])
def test_a_sound_mixer_passes_or_the_check_says_why_it_does_not_apply(cls, name):
    finding = check.judge(name, lambda: check.CONTRACT[name](subject(cls, check.SHAKE)))
    skipped = {"padding": "not told the true lengths", "backends": "one implementation"} if cls is Mean else {}
    assert finding.outcome == ("skipped" if name in skipped else "pass")
    assert skipped.get(name, ": ") in finding.text


def test_a_projection_that_starts_at_zero_is_no_fault_and_hides_none():
    class Zero(LooksAhead):
        def __init__(self, d_model):
            super().__init__(d_model)
            self.out = nn.Linear(d_model, d_model)
            nn.init.zeros_(self.out.weight)

        def forward(self, x):
            return self.out(super().forward(x))

    assert "each gets a finite gradient" in contract.gradients(subject(Zero, check.SHAKE))
    with pytest.raises(BrokenPromiseError, match="position 31"):
        contract.causality(subject(Zero, check.SHAKE))


def test_whatever_a_check_raises_is_its_finding():
    def fails(error):
        def run():
            raise error

        return run

    assert str(check.judge("shape", fails(KeyError("two\nlines")))) == "shape        FAIL     raised KeyError: 'two\\nlines'"
    assert check.judge("shape", fails(ConfigError("no"))).outcome == "FAIL"
    assert check.judge("shape", fails(DoesNotApplyError("why"))) == check.Finding("shape", "skipped", "why")
    with pytest.raises(KeyboardInterrupt):
        check.judge("shape", fails(KeyboardInterrupt()))


def cells(ref, *words):
    return make_plan(["suite=mqar", "preset=test", f"model={ref},hgrn2,attention", *words], "cpu").cells


MIXERS = """
import torch
from torch import nn

class Good(nn.Module):
    def __init__(self, d_model, width: int = 8):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)
    def forward(self, x):
        return self.linear(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

class Raises(Good):
    def forward(self, x):
        raise RuntimeError("no such kernel")

class CannotBuild(Good):
    def __init__(self, d_model):
        raise RuntimeError("no such file")
"""


@pytest.fixture
def findings(tmp_path, monkeypatch):
    """The findings on a class of MIXERS, without training."""
    path = tmp_path / "mine.py"
    path.write_text(MIXERS)
    monkeypatch.setattr(check, "ROUNDS", 1)
    monkeypatch.setattr(check, "train", lambda planned: [row(model=cell.model, value=0.9) for cell in planned])
    return lambda name: {finding.name: finding for finding in check.run_checks(cells(f"{path}:{name}"))}


def test_every_check_has_a_finding_and_a_sound_module_passes(findings):
    found = findings("Good")
    assert list(found) == ["build", *check.CONTRACT, *check.COSTS]
    assert {name for name, finding in found.items() if finding.outcome != "pass"} == {"padding", "backends", "FLOPs"}
    assert "Good with d_model 16, width 8: a plain module" in found["build"].text
    assert found["parameters"].text.startswith("272 in one layer's mixer (hgrn2 1.")
    assert "times hgrn2's" in found["speed"].text


def test_layers_that_are_not_alike_are_each_held_to_the_contract_and_share_the_costs(monkeypatch):
    monkeypatch.setattr(check, "ROUNDS", 1)
    monkeypatch.setattr(check, "train", lambda planned: [row(model=cell.model, value=0.9) for cell in planned])
    planned = cells("hybrid", "num_layers=3", "hybrid.layers=[hgrn2,hgrn2,attention]")
    found = list(check.run_checks(planned))
    assert [(f.name, f.kind) for f in found if f.kind] == [(name, kind) for name in check.CONTRACT for kind in ("hgrn2", "attention")]
    assert {f.outcome for f in found} == {"pass"}
    sizes = [sum(p.numel() for p in check.layers_of(cell)[0].facts.parameters()) for cell in planned[1:]]
    (told,) = [f.text for f in found if f.name == "parameters"]
    assert told.startswith(f"{check.count((2 * sizes[0] + sizes[1]) / 3)} in one layer's mixer")


def test_a_first_layer_of_another_kind_is_not_looked_at():
    layers = check.layers_of(cells("gla", "num_layers=3", "first_layer=attention")[0])
    assert [(subject.spec.layer, subject.spec.first) for subject in layers] == [(1, 1), (2, 1)]


def test_checks_after_a_failed_one_still_run(findings):
    found = findings("Raises")
    assert {found[name].outcome for name in ("shape", "causality", "state", "speed")} == {"FAIL"}
    assert found["speed"].text == "raised RuntimeError: no such kernel"
    assert found["learning"].outcome == "pass"


def test_a_mixer_that_cannot_be_built_fails_once(findings):
    found = findings("CannotBuild")
    assert found.pop("build").text == "raised RuntimeError: no such file"
    assert {finding.outcome for finding in found.values()} == {"skipped"}


def test_illegal_settings_and_files_that_do_not_import_are_the_users_words(tmp_path):
    with pytest.raises(ConfigError, match="d_model / expand_ratio"):
        list(check.run_checks(cells("hgrn2", "hgrn2.expand_ratio=5")))
    with pytest.raises(ConfigError, match="d_model=200"):
        list(check.run_checks(cells("gla", "d_model=200", "gla.num_heads=1")))
    (tmp_path / "broken.py").write_text("import no_such_package\n\nclass Mine: ...")
    with pytest.raises(ConfigError, match="cannot import it: ModuleNotFoundError: No module named 'no_such_package'"):
        list(check.run_checks(cells(f"{tmp_path}/broken.py:Mine")))


@pytest.mark.parametrize(
    ("rows", "outcome", "told"),
    [
        ([row(value=0.9), row(value=1.0, model="gla")], "pass", "gla 1.000): it learned"),
        ([row(value=0.3), row(value=1.0, model="gla")], "FAIL", "not learned, in a budget in which others learn it"),
        ([row(value=0.3), row(value=0.3, model="gla")], "skipped", "none of them learns it"),
        ([row(value=0.3), failed("oom", "no memory", model="gla")], "skipped", "gla oom): in this budget"),
        ([failed("diverged", "loss nan at step 2 of 9"), row(value=1.0)], "FAIL", "diverged after 1500 steps of len32_kv4: loss nan"),
    ],
)
def test_learning_goes_by_the_floor_and_by_those_beside(rows, outcome, told, monkeypatch):
    monkeypatch.setattr(check, "train", lambda planned: rows)
    finding = check.judge("learning", lambda: check._learning(*cells("gla")[:1], []))
    assert finding.outcome == outcome
    assert told in finding.text


def test_verdict_counts_and_names_what_failed():
    found = [check.Finding("shape", "pass", ""), check.Finding("padding", "skipped", ""), check.Finding("state", "FAIL", "")]
    assert check.verdict("Mine", found) == "Mine: 1 of 3 checks FAILED (state); 1 passed, 1 skipped"
    of_kind = check.Finding("state", "FAIL", "wrong", "gla")
    assert str(of_kind) == "state        FAIL     gla: wrong"
    assert check.verdict("Mine", [of_kind]) == "Mine: 1 of 1 checks FAILED (state of gla); 0 passed"
    assert check.verdict("Mine", found[:2]) == "Mine: all is well; 1 checks passed, 1 skipped"
