"""Scans that look ahead, against loops over positions; padding; what rows say of them; refusals."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from hgrn2_bench import check, contract, directions, engine, matching, measure, registry
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.contract import DoesNotApplyError, Subject
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, recomputing
from hgrn2_bench.model import SequenceModel
from hgrn2_bench.ops import families
from hgrn2_bench.plan import make_plan

D, H, W = 16, 3, 5
T = H * W
GRID = (H, W)
SMALL: dict[str, dict[str, Any]] = {"mamba2": {"d_state": 8}, "gsa": {"num_slots": 4}, "based": {"feature_dim": 4}}
FORMS: list[tuple[str, dict[str, Any]]] = [("hgrn1", {"variant": "fla"}), ("base_conv", {"long": "all"}), ("retnet", {"rotate": False})]
NAMES = [name for name in registry.models() if name not in ("attention", "hybrid")]
CASES = [(name, SMALL.get(name, {})) for name in NAMES] + FORMS
IDS = ["-".join([name, *map(str, settings.values())]) for name, settings in CASES]

Ways = Callable[[int], list[list[int]]]
"""For a position the paths that end in it."""


def spec(scan: str = "both", conv: int = 0, **changes: Any) -> MixerSpec:
    return MixerSpec(D, layer=0, num_layers=2, conv=conv, scan=scan, max_len=64, **changes)


def build(name: str, made: MixerSpec, seed: int = 0) -> Mixer:
    """A mixer in float64 and far from its start, where low ranks and bonuses do something."""
    torch.manual_seed(seed)
    mixer = registry.load(name)(made).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def inputs(batch: int = 2, length: int = T) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def context(**fields: Any) -> Context:
    return Context(shared={"lower_bound": torch.linspace(0, 0.6, 2 * D).double().view(2, D)}, **fields)


def pair(name: str, settings: dict[str, Any], scan: str, conv: int, backend: str = "chunked") -> tuple[Mixer, Mixer]:
    """A mixer under a scan, and the same weights in a causal one on `reference`."""
    return build(name, spec(scan, conv, backend=backend, settings=settings)), build(
        name, spec("causal", conv, backend="reference", settings=settings)
    )


def by_loops(twin: Mixer, x_BTD: Tensor, ways: Ways) -> Tensor:
    """Each position from the last outputs of the recurrence on every path that ends in it; skip terms and the like are their mean."""
    outputs = []
    for t in range(x_BTD.shape[1]):
        found, skips, asides = [], [], []
        for path in ways(t):
            ctx = context()
            o, skip = twin.recur(x_BTD[:, path], ctx)
            found.append(o[:, -1:])
            skips += [] if skip is None else [skip[:, -1:]]
            asides.append({key: kept[:, -1:] for key, kept in ctx.aside.items()})
        aside = {key: torch.stack([each[key] for each in asides]).mean(0) for key in asides[0]}
        total = torch.stack(found).sum(0) + (torch.stack(skips).mean(0) if skips else 0)
        outputs.append(twin.finish(total, x_BTD[:, t : t + 1], context(aside=aside)))
    return torch.cat(outputs, 1)


def along_time(t: int) -> list[list[int]]:
    return [list(range(t + 1)), list(range(T - 1, t - 1, -1))]


def along_height(t: int) -> list[list[int]]:
    row, column = divmod(t, W)
    return [[i * W + column for i in range(row + 1)], [i * W + column for i in range(H - 1, row - 1, -1)]]


def along_width(t: int) -> list[list[int]]:
    row, column = divmod(t, W)
    return [[row * W + j for j in range(column + 1)], [row * W + j for j in range(W - 1, column - 1, -1)]]


def along_both(t: int) -> list[list[int]]:
    return along_height(t) + along_width(t)


LOOPS: dict[str, Sequence[Ways]] = {"both": [along_time], "2d_parallel": [along_both], "2d_series": [along_height, along_width]}


@torch.no_grad()
@pytest.mark.parametrize("scan", LOOPS)
@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_every_mixer_equals_loops_over_positions(name: str, settings: dict[str, Any], conv: int, scan: str) -> None:
    if conv and not registry.load(name).convolved:
        pytest.skip("takes no convolution")
    mixer, twin = pair(name, settings, scan, conv)
    want = x = inputs(1)
    for ways in LOOPS[scan]:
        want = by_loops(twin, want, ways)
    got = mixer(x, context(grid=GRID))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    assert (got - twin(x, context())).abs().max() > 1e-3


@torch.no_grad()
def test_the_present_token_counts_once_for_each_order_and_a_skip_term_once() -> None:
    x = inputs(2, 1)
    for scan, times in (("both", 2), ("2d_parallel", 4)):
        mixer, twin = pair("mamba", {}, scan, 0)
        o, skip = twin.recur(x, context())
        assert skip is not None
        torch.testing.assert_close(mixer(x, context(grid=(1, 1))), twin.readout(times * o + skip, x))


@torch.no_grad()
def test_skip_terms_and_gates_prefer_no_direction() -> None:
    for name in ("rwkv6", "rwkv7", "mamba"):
        mixer, x = build(name, spec(conv=3)), inputs()
        torch.testing.assert_close(mixer(x.flip(1), context()), mixer(x, context()).flip(1))


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_a_mixer_that_says_so_projects_each_token_the_same_wherever_it_stands(name: str, settings: dict[str, Any]) -> None:
    mixer, x = build(name, spec("causal", settings=settings)), inputs()
    if not mixer.position_free:
        return
    flipped = families.over_time(mixer.project(x, context()), lambda t: t.flip(1))
    again = mixer.project(x.flip(1), context())
    for field in dataclasses.fields(flipped):  # type: ignore[arg-type]
        one, other = getattr(flipped, field.name), getattr(again, field.name)
        if field.name != "skip" and isinstance(one, Tensor):
            torch.testing.assert_close(one, other, msg=lambda m, name=field.name: f"{name}: {m}")


def test_those_that_shift_or_rotate_do_not_say_so() -> None:
    apart = {name for name in NAMES if not registry.load(name).position_free}
    assert apart == {"retnet", "rwkv6", "rwkv7", "base_conv"}


# Padding


def model(name: str, scan: str = "both", conv: int = 3, settings: dict[str, Any] | None = None, **changes: Any) -> SequenceModel:
    torch.manual_seed(0)
    config = ModelConfig(d_model=D, num_layers=2, conv=conv, scan=scan, embed_std=1.0, **changes)
    return SequenceModel(config, registry.load(name), settings or SMALL.get(name, {}), "chunked", 11, 32).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, "attention", "hybrid"])
def test_a_padded_example_gives_what_it_gives_alone(name: str) -> None:
    lengths = [T, 9, 2, 1]
    tokens = torch.randint(11, (len(lengths), T), generator=torch.Generator().manual_seed(2))
    rope = {"positions": "rope"} if registry.load(name).rotary else {}
    built = model(name, **rope)
    padded = built(tokens, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = built(tokens[row : row + 1, :length])
        torch.testing.assert_close(padded[row : row + 1, :length], alone, rtol=0, atol=1e-5)
    assert (built(tokens)[1, :9] - padded[1, :9]).abs().max() > 1e-3


def test_a_row_is_flipped_within_its_length() -> None:
    x = torch.arange(10).view(2, 5)
    lines = directions.Lines("time", lengths_B=torch.tensor([3, 5]))
    assert lines.flip(x).tolist() == [[2, 1, 0, 3, 4], [9, 8, 7, 6, 5]]
    assert torch.equal(lines.flip(lines.flip(x)), x)


@torch.no_grad()
def test_a_mixer_is_told_the_true_lengths_in_both_directions() -> None:
    class RunningShare(Mixer):
        def recur(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, None]:
            assert ctx.lengths_B is not None
            return x_BTD.cumsum(1) / ctx.lengths_B[:, None, None], None

        def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
            return o

    x, lengths = inputs(), torch.tensor([4, T])
    got = RunningShare(spec())(x, context(lengths_B=lengths))
    for row, length in enumerate(lengths.tolist()):
        mine = x[row, :length]
        torch.testing.assert_close(got[row, :length], (mine.sum(0) + mine) / length)


CONTRACT = (contract.shape, contract.gradients, contract.determinism, contract.padding, contract.autocast, contract.batch_independence)


@pytest.mark.parametrize("name", [*NAMES, "attention", "hybrid"])
def test_what_the_contract_promises_apart_from_decoding_holds_both_ways(name: str) -> None:
    subject = Subject(registry.load(name), spec(conv=3, settings=SMALL.get(name, {})), shake=0.02)
    for promise in CONTRACT:
        (functools.partial(promise, lengths=(1, 17)) if promise in (contract.shape, contract.gradients) else promise)(subject)
    for promise in (contract.causality, contract.decoding, contract.two_chunks, contract.state_bytes):
        with pytest.raises(DoesNotApplyError, match="scan=both reads both ways"):
            promise(subject)


@pytest.mark.parametrize("name", ["hgrn2", "hgrn1", "rwkv6"])
def test_reference_and_chunked_agree_both_ways_with_gradients(name: str) -> None:
    contract.backends(Subject(registry.load(name), spec(conv=3)))


# Softmax, hybrids, layers that share


@torch.no_grad()
@pytest.mark.parametrize("scan", LOOPS)
def test_softmax_attends_once_to_all_positions(scan: str) -> None:
    made = {"conv": 3, "positions": "rope"}
    mixer, x = build("attention", spec(scan, **made)), inputs()
    free = build("attention", spec("causal", **made, settings={"causal": False}))
    torch.testing.assert_close(mixer(x, context(grid=GRID)), free(x, context()))
    assert mixer.op_flops(T) == free.op_flops(T)
    assert mixer.effective() == free.effective()
    assert mixer.effective()["causal"] is False


def test_a_users_softmax_mixer_loses_its_mask_too() -> None:
    class Own(Mixer):
        family: ClassVar[str] = "softmax"

        def project(self, x_BTD: Tensor, ctx: Context) -> families.SoftmaxInputs:
            return families.SoftmaxInputs(*[x_BTD[:, :, None]] * 3, scale=1.0)

        def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
            return o.flatten(-2)

    x = inputs()
    want = (x @ x.mT).softmax(-1) @ x
    torch.testing.assert_close(Own(spec())(x), want)


@torch.no_grad()
@pytest.mark.parametrize("scan", LOOPS)
def test_a_hybrid_hands_the_scan_to_its_parts(scan: str) -> None:
    for layer, part in enumerate(("hgrn2", "attention")):
        made = dataclasses.replace(spec(scan, conv=3), layer=layer)
        hybrid, alone, x = build("hybrid", made), build(part, made), inputs()
        torch.testing.assert_close(hybrid(x, context(grid=GRID)), alone(x, context(grid=GRID)), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("scan", LOOPS)
@pytest.mark.parametrize("name", ["rwkv7", "retnet"])
def test_layers_share_values_and_tables_of_one_order(name: str, scan: str) -> None:
    built, x = model(name, scan).double(), torch.randint(11, (2, T), generator=torch.Generator().manual_seed(2))
    built.grid = GRID
    want_BTD, (first, second) = built.embed(x), built.blocks
    carry: dict[str, Any] = {}
    for block in (first, second):  # tables of its own for each layer, which is what sharing them must not change
        want_BTD = block(want_BTD, Context(carry=carry, grid=GRID))
    torch.testing.assert_close(built(x), built.norm(want_BTD))


def first_values(mixer: Mixer, x_BTD: Tensor) -> Tensor:
    ctx = context()
    mixer.recur(x_BTD, ctx)
    values: Tensor = ctx.carry["values"]
    return values


@torch.no_grad()
def test_the_values_of_a_first_layer_go_to_the_same_order_of_a_later_one() -> None:
    x, made = inputs(), spec(conv=3)
    first, later = build("rwkv7", made), build("rwkv7", dataclasses.replace(made, layer=1))
    plain = dataclasses.replace(made, scan="causal")
    first_twin, twin = build("rwkv7", plain), build("rwkv7", dataclasses.replace(plain, layer=1))
    found = []
    for way in (x, x.flip(1)):
        ctx = context(carry={"values": first_values(first_twin, way)})
        o, _ = twin.recur(way, ctx)
        found.append((o, ctx.aside))
    (o, aside), (back, back_aside) = found
    mean = {name: (kept + back_aside[name].flip(1)) / 2 for name, kept in aside.items()}
    carry: dict[str, Any] = {}
    first(x, context(carry=carry))
    torch.testing.assert_close(later(x, context(carry=carry)), twin.finish(o + back.flip(1), x, context(aside=mean)))


# What rows say


def test_rows_name_the_scan_and_have_no_state() -> None:
    words = {
        "both": "both (2 along time, summed)",
        "2d_parallel": "2d_parallel (4 along height and width, summed)",
        "2d_series": "2d_series (2 along height, summed; then 2 along width, summed)",
    }
    for scan, text in words.items():
        built = model("hgrn2", scan)
        facts = measure.effective(built)
        assert (facts["scan"], facts["causal"]) == (text, False)
        assert measure.state_bytes(built, T) is None
        assert measure.effective(model("attention", scan))["scan"] == f"{scan} (all positions at once)"
    causal = measure.effective(model("hgrn2", "causal"))
    assert "scan" not in causal
    assert directions.describe(model("hgrn2", "causal").mixers[0]) == "causal"
    assert measure.state_bytes(model("hgrn2", "causal"), T) is not None


def linear(features: int) -> int:
    return 2 * features * D


@pytest.mark.parametrize(
    ("name", "conv", "scan", "project", "readout", "recurrences"),
    [
        ("hgrn2", 0, "causal", 1, 1, 1),
        ("hgrn2", 0, "both", 1, 1, 2),
        ("hgrn2", 0, "2d_parallel", 1, 1, 4),
        ("hgrn2", 0, "2d_series", 2, 2, 4),
        ("hgrn2", 3, "both", 2, 1, 2),
        ("hgrn2", 3, "2d_parallel", 4, 1, 4),
        ("hgrn2", 3, "2d_series", 4, 2, 4),
        ("attention", 3, "2d_parallel", 1, 1, 1),
        ("hybrid", 3, "both", 2, 1, 2),
    ],
)
def test_flops_count_what_is_done_again(name: str, conv: int, scan: str, project: int, readout: int, recurrences: int) -> None:
    built = model(name, scan, conv, {"layers": ("hgrn2",)} if name == "hybrid" else None)
    mixer = built.mixers[0]
    per_token = project * 3 * (linear(D) + 2 * conv * D) + readout * linear(D) + recurrences * mixer.op_flops(T)
    assert measure.train_flops_per_token(built, T) == 3 * (2 * per_token + 2 * D * 11)


def test_flops_know_which_modules_the_read_out_has() -> None:
    for name in NAMES:
        mixer, called = build(name, spec("causal")), set[str]()
        for child, module in mixer.named_children():
            module.register_forward_hook(lambda *_, child=child, called=called: called.add(child))
        o, skip = mixer.recur(inputs(), ctx := context())
        before = set(called)
        called.clear()
        mixer.finish(directions.with_skip(o, skip), inputs(), ctx)
        matrices = {child for child, m in mixer.named_children() if measure.matrix_weights(m)}
        assert called & matrices == matrices & set(mixer.in_readout), name
        assert not before & called & matrices, name


def cell(*words: str) -> Any:
    (found,) = make_plan(["suite=mqar", "preset=test", "task=len16_kv2", "seed=0", *words], "cpu").cells
    return found


def test_the_default_scan_leaves_the_key_of_a_cell_as_it_is() -> None:
    assert cell("model=hgrn2").key == cell("model=hgrn2", "scan=causal").key != cell("model=hgrn2", "scan=both").key


def test_a_plan_describes_a_model_that_cannot_decode() -> None:
    described = cell("model=hgrn2", "scan=both")
    about = engine.describe(described, engine.build(described))
    assert about.state_bytes is None
    assert about.effective["scan"] == "both (2 along time, summed)"


def test_nothing_is_matched_to_a_state_that_is_not_there() -> None:
    matched = cell("model=hgrn2", "scan=both", "match=state", "match_target=100")
    with pytest.raises(ConfigError, match="match=state has nothing to match: scan=both has no decoding"):
        matching.solve(matched, ())


# Refusals


@pytest.mark.parametrize("name", ["hgrn2", "rwkv6", "attention", "hybrid"])
def test_decoding_is_refused_in_one_line(name: str) -> None:
    mixer, x = build(name, spec()), inputs()
    for call in (lambda: mixer.step(x[:, 0], None), lambda: mixer(x, context(return_state=True))):
        with pytest.raises(ConfigError, match=r"^scan=both cannot decode: every output depends on the tokens to come$"):
            call()


def test_attention_decodes_in_place_under_no_such_scan_either() -> None:
    mixer, x = build("attention", spec()), inputs()
    state = {"op": (x[:, :, None], x[:, :, None])}
    with pytest.raises(ConfigError, match="attention with scan=both cannot decode"):
        mixer.step_in_place(x[:, 0], context(state=state, position=torch.tensor([1])))


@pytest.mark.parametrize("name", ["hgrn2", "attention"])
def test_a_2d_scan_needs_a_whole_image(name: str) -> None:
    mixer, x = build(name, spec("2d_series")), inputs()
    with pytest.raises(ConfigError, match="scan=2d_series needs images: this task gives sequences"):
        mixer(x, context())
    with pytest.raises(ValueError, match="scan=2d_series: 15 tokens are no image of 4 x 4"):
        mixer(x, context(grid=(4, 4)))
    with pytest.raises(ValueError, match="scan=2d_series reads whole images"):
        mixer(x, context(grid=GRID, lengths_B=torch.tensor([3, 15])))


def test_a_mixer_with_a_forward_of_its_own_reads_in_one_order() -> None:
    class Own(Mixer):
        def forward(self, x_BTD: Tensor, ctx: Context | None = None) -> Tensor:
            return x_BTD

    for cls in (Own, recomputing(type("Own", (nn.Linear,), {"__init__": lambda self, d: nn.Linear.__init__(self, d, d)}))):
        assert cls(spec("causal"))
        with pytest.raises(ConfigError, match=r"Own has a `forward` of its own, so it reads in one order only: give Own\.scan=causal"):
            cls(spec())


def test_check_looks_at_no_image() -> None:
    with pytest.raises(ConfigError, match="scan=2d_series needs images: check looks at scan=causal and scan=both"):
        check.layers_of(make_plan(["suite=lra", "task=image", "model=hgrn2", "scan=2d_series"], "cpu").cells[0])
    assert check.layers_of(cell("model=hgrn2", "scan=both"))[0].spec.scan == "both"
