"""Fair matching: what is counted, which setting changes, that the nearest legal value wins, and what is refused."""

import dataclasses
import json
import shlex

import pytest
import torch
from test_results import failed, row

from hgrn2_bench import engine, matching, measure, registry
from hgrn2_bench.config import MatchConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.matching import Match, Solution, nearest, refusal, report
from hgrn2_bench.plan import Cell, make_plan
from hgrn2_bench.protocol import Protocol
from hgrn2_bench.render import FORMATS, render
from hgrn2_bench.tables import make_tables

ALL = ",".join(registry.models())
SIZED = [name for name, model in registry.models().items() if model.facts.get("state_setting")]


def solver(asked):
    """What worker processes do, here."""
    return {cell.key: matching.solve(cell, free) for cell, free in asked}


def resolved(*words, device="cpu"):
    return matching.resolve(make_plan(["suite=mqar", "preset=test", *words], device), solver)


def matches(*words):
    return {match.cell.model: match for match in resolved(*words)[1]}


def size(cell):
    """What the match counts, of a model that is really built."""
    return matching.size(cell, engine.build(cell))


def sizes(cell, values):
    """Sizes of a cell with each of some values, illegal ones left out, by value."""
    found = {}
    for name, value in values:
        try:
            found[value] = size(cell.changed({name: value}))
        except ConfigError:
            continue
    return found


# the search


def brute(table, target):
    return min(table, key=lambda n: (abs(table[n] - target), n))


@pytest.mark.parametrize("step", [1, 3, 8, 50])
@pytest.mark.parametrize("grows", [True, False])
def test_nearest_is_what_trying_every_legal_number_finds(step, grows):
    table = {n: (7 * n if grows else 10**7 // n) for n in range(step, 401, step)}
    for target in (1, 6, 7, 8, 100, 333, 349, 350, 1000, 1400, 2799, 2800, 50_000, 10**6, 10**8):
        assert nearest(table.get, target, 60) == (brute(table, target), table[brute(table, target)]), target


@pytest.mark.parametrize("width", [60, 64, 97, 509, 720])
def test_nearest_finds_divisors_however_far_apart(width):
    table = {n: 4 * width * n for n in range(1, width + 1) if width % n == 0}
    for target in range(1, 5 * width**2, 997):
        assert nearest(table.get, target, 1024)[0] == brute(table, target)


def test_of_two_equally_near_numbers_the_smaller_is_taken():
    assert nearest(lambda n: 10 * n, 35, 10) == (3, 30)
    assert nearest({2: 20, 6: 60}.get, 40, 10) == (2, 20)
    assert nearest({2: 60, 6: 20}.get, 40, 10) == (2, 60)


def test_search_without_a_legal_number_ends():
    tried = []
    assert nearest(tried.append, 5, 100) is None
    assert len(tried) == 100


def test_search_for_what_no_number_reaches_ends_at_the_nearest():
    tried = []

    def saturated(n):
        tried.append(n)
        return min(n, 300)

    assert nearest(saturated, 1000, 100)[1] == 300
    assert len(set(tried)) < 100


# parameters


def test_params_without_a_channel_mixer_change_the_width():
    found = matches("match=params", "model=hgrn2,hgrn1", "match_tolerance=0.1")
    target = found["hgrn2"].reached
    cell = found["hgrn1"].cell
    table = sizes(cell, [("d_model", d) for d in range(1, 40)])
    assert target == measure.parameters(engine.build(found["hgrn2"].cell))[1]
    assert cell.model_config.d_model == brute(table, target) != 16
    assert found["hgrn1"].reached == table[cell.model_config.d_model]
    assert found["hgrn2"].residual == 0
    assert found["hgrn1"].how == f"d_model={cell.model_config.d_model}"


def test_widths_are_tried_in_steps_that_the_heads_allow():
    cell = matches("match=params", "model=hgrn2,gla", "gla.num_heads=4", "match_tolerance=1")["gla"].cell
    assert cell.model_config.d_model % 8 == 0  # keys of d_model / 2 channels in 4 heads


@pytest.mark.parametrize("mixer", ["mlp", "glu"])
def test_params_change_the_channel_mixer_first(mixer):
    found = matches("match=params", "model=attention,gla", f"channel_mixer={mixer}", "d_model=32")
    cell = found["gla"].cell
    table = sizes(cell, [("channel_width", w) for w in range(1, 200)])
    assert cell.model_config.channel_width == brute(table, found["attention"].reached)
    assert cell.model_config.d_model == 32
    assert found["attention"].cell.model_config.channel_width == 0
    assert abs(found["gla"].residual) < 0.02


def test_params_change_the_width_where_no_channel_width_is_small_enough():
    found = matches("match=params", "model=gla", "channel_mixer=mlp", "match_target=900", "match_tolerance=0.3")
    cell = found["gla"].cell
    assert min(sizes(cell, [("channel_width", 1), ("d_model", 16)]).values()) > 0
    assert size(cell.changed({"d_model": 16, "channel_width": 1})) > 900 * 1.3
    assert cell.model_config.d_model < 16
    assert cell.model_config.channel_width == 0


def test_embeddings_are_not_counted():
    small, large = (matches("match=params", "model=hgrn2", f"vocab_size={v}")["hgrn2"].reached for v in (16, 512))
    assert small == large


# state


@pytest.mark.parametrize("name", SIZED)
def test_state_changes_the_setting_that_the_mixer_names(name):
    own = registry.model(name).facts["state_setting"]
    target = 6000
    found = matches("match=state", f"model={name}", "d_model=24", f"match_target={target}", "match_tolerance=9")[name]
    ratio = registry.model(name).settings.__dataclass_fields__[own].type is float
    most = 800 if name == "lru" else 192  # the only state that does not grow with the width
    table = sizes(found.cell, [(f"{name}.{own}", n / 24 if ratio else n) for n in range(1, most + 1)])
    assert len(table) > 3
    assert found.reached == table[brute(table, target)]
    assert found.cell.settings[own] in (brute(table, target), None)  # None: the default is that value
    assert found.cell.model_config.d_model == 24


def test_a_model_that_is_illegal_as_it_is_gets_a_legal_value():
    cell = matches("match=state", "model=hgrn2,retnet", "d_model=24", "match_tolerance=9")["retnet"].cell
    assert cell.settings["expand_k"] * 24 % 16 == 0
    with pytest.raises(ConfigError, match=r"d_model \* expand_k / 2=12 must be a multiple of num_heads=8"):
        resolved("match=params", "model=hgrn2,retnet", "d_model=24", "match_tolerance=9")
    with pytest.raises(ConfigError, match="must be a multiple of num_heads=5"):
        resolved("match=state", "model=hgrn2,gla", "gla.num_heads=5", "match_tolerance=9")


def test_state_of_models_without_a_setting_stays_as_it_is():
    found = matches("match=state", "model=hgrn2,attention,hgrn1", "match_tolerance=9")
    for name in ("attention", "hgrn1"):
        assert found[name].how == f"no setting of {name} changes its state"
        assert found[name].reached == size(found[name].cell)


def test_a_default_that_is_nearest_stays_a_default():
    assert matches("match=state", "model=attention,hgrn2", "match_target=2000", "match_tolerance=1")["hgrn2"].cell.settings == {
        "expand_ratio": None,
        "variant": "paper",
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_counts_buffers_in_the_type_held(dtype):
    found = matches("match=state", "model=hgrn2", f"dtype={dtype}", "conv=4")["hgrn2"]
    assert found.reached == 4 * 16 * 16 + (4 if dtype == "float32" else 2) * 3 * 3 * 16


def test_state_is_counted_at_the_tasks_length_unless_another_is_given():
    task, longer = (matches("match=state", "model=attention", "conv=0", *words)["attention"] for words in ((), ("match_len=100",)))
    assert (task.cell.matching.match_len, task.reached) == (16, 4 * 2 * 16 * 16)
    assert (longer.cell.matching.match_len, longer.reached) == (100, 4 * 2 * 16 * 100)


# the target


def test_target_is_the_first_model_of_the_run_as_a_number():
    first, other = resolved("match=params", "model=hgrn2,gla", "match_tolerance=0.1")[0].cells
    assert first.matching.match_target == other.matching.match_target == size(first)
    first, other = resolved("match=params", "model=gla,hgrn2", "match_tolerance=0.1")[0].cells
    assert first.matching.match_target == size(first)
    assert (first.model, first.model_config.d_model) == ("gla", 16)


def test_target_may_be_a_number():
    found = matches("match=params", "model=hgrn2,gla", "match_target=5000", "match_tolerance=0.1")
    assert {m.cell.matching.match_target for m in found.values()} == {5000}
    assert found["hgrn2"].cell.model_config.d_model > 16


def test_each_point_of_a_shared_sweep_has_its_own_target():
    plan, _ = resolved("match=state", "model=hgrn2,mamba", "d_model=16,32", "lr=1e-3,1e-2", "seed=0,1", "match_tolerance=0.3")
    assert len(plan.cells) == 16
    targets = {(c.model, c.model_config.d_model): c.matching.match_target for c in plan.cells}
    assert targets["hgrn2", 16] == targets["mamba", 16] < targets["hgrn2", 32] == targets["mamba", 32]


def test_each_precision_has_its_own_target():
    plan, _ = resolved("match=state", "model=hgrn2,attention", "dtype=float32,bfloat16", "match_tolerance=9")
    targets = {(c.model, c.dtype): c.matching.match_target for c in plan.cells}
    assert targets["hgrn2", "bfloat16"] == targets["attention", "bfloat16"] < targets["attention", "float32"]


def test_kinds_may_be_swept():
    plan, found = resolved("match=none,params,state", "model=hgrn2,gla")
    assert [(c.model, c.matching.match) for c in plan.cells] == [(m, k) for m in ("hgrn2", "gla") for k in ("none", "params", "state")]
    assert len(found) == 4


def test_two_sizes_of_the_first_model_are_no_target():
    with pytest.raises(ConfigError) as caught:
        resolved("match=state", "model=hgrn2,gla", "hgrn2.expand_ratio=8,16")
    assert "needs one size of the first model, hgrn2, for each cell of gla" in str(caught.value)
    assert "1088 and 1600" in str(caught.value)
    assert "give match_target" in str(caught.value)


# what the user gives


def test_given_values_are_kept():
    found = matches("match=state", "model=hgrn2,gla", "gla.expand_k=0.25", "hgrn2.expand_ratio=8", "match_tolerance=9")
    assert (found["gla"].cell.settings["expand_k"], found["gla"].how) == (0.25, "gla.expand_k=0.25 as given")
    assert found["hgrn2"].cell.settings["expand_ratio"] == 8
    assert found["hgrn2"].residual == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["match=state", "model=hgrn2,gla", "gla.expand_k=0.25"], "gla (gla.expand_k=0.25 as given) has"),
        (["match=params", "model=hgrn2,hgrn1", "d_model=16"], "hgrn1 (d_model=16 as given) has"),
        (["match=params", "model=hgrn2,hgrn1", "hgrn1.d_model=16"], "hgrn1 (d_model=16 as given) has"),
    ],
)
def test_given_values_that_miss_the_target_are_refused_in_one_line(words, told):
    text = refusal(resolved(*words)[1])
    assert text.startswith(told)
    assert "beyond match_tolerance=0.02" in text
    assert "(hgrn2.key=value holds for hgrn2 only)" in text
    assert "\n" not in text


def test_words_for_one_model_do_not_match():
    with pytest.raises(ConfigError, match=r"'gla.match=none': a match holds for all models of a run; write match=value"):
        make_plan(["suite=mqar", "preset=test", "gla.match=none"], "cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["match_target=5"], "match_target=5 has no effect with match=none"),
        (["match_tolerance=0.1"], "match_tolerance=0.1 has no effect with match=none"),
        (["match=params", "match_len=64"], "match_len=64 has no effect with match=params"),
        (["match=params", "match_target=-1"], "match_target=-1 must not be negative"),
        (["match=state", "match_tolerance=-0.1"], "match_tolerance=-0.1 must not be negative"),
        (["match=flops"], "Unknown match 'flops'."),
    ],
)
def test_words_without_effect_are_refused(words, message):
    with pytest.raises(ConfigError) as caught:
        make_plan(["suite=mqar", "preset=test", *words], "cpu")
    assert str(caught.value).startswith(message)


# keys and commands


def test_a_key_changes_with_match_target_and_length_but_not_with_the_tolerance():
    cell = resolved("match=state", "model=hgrn2")[0].cells[0]
    others = [
        cell.changed(values) for values in ({"match_target": 7}, {"match_len": 7}, {"match": "none", "match_target": 0, "match_len": 0})
    ]
    assert len({cell.key, *(other.key for other in others)}) == 4
    assert cell.changed({"match_tolerance": 0.5}).key == cell.key


def test_matched_cells_survive_json():
    for cell in resolved("match=state", f"model={ALL}", "num_layers=2", "match_tolerance=9")[0].cells:
        back = Cell.from_json(json.loads(json.dumps(cell.to_json())))
        assert (back, back.key) == (cell, cell.key)


@pytest.mark.parametrize(
    "words",
    [
        (f"model={ALL}", "num_layers=2", "match=params", "match_tolerance=9"),
        (f"model={ALL}", "num_layers=2", "match=state", "match_tolerance=9"),
        ("model=gla,hgrn2,mamba", "match=params", "channel_mixer=glu", "lr=1e-3,1e-2"),
        ("model=gla", "match=params", "channel_mixer=mlp", "match_target=900", "match_tolerance=0.3"),
        ("model=hgrn2,mamba", "match=state", "d_model=16,32", "match_len=64", "match_tolerance=0.3", "seed=0,1"),
        ("model=gla,hgrn2", "match=state", "hgrn2.expand_ratio=null", "match_tolerance=1"),
        ("model=hgrn2,gla", "match=params", "hgrn2.d_model=32", "match_tolerance=0.1"),
    ],
    ids=" ".join,
)
def test_every_command_gives_its_cell_again_with_nothing_left_to_solve(words):
    plan, found = resolved(*words)
    assert not refusal(found)
    for cell in plan.cells:
        again, (match,) = matching.resolve(make_plan(shlex.split(cell.command)[4:-2], "cpu"), solver)
        assert [c.key for c in again.cells] == [cell.key], cell.command
        assert match.reached == next(m.reached for m in found if m.cell.key == cell.key)
        assert f"match_target={cell.matching.match_target}" in cell.command


def test_a_plan_without_a_match_is_left_alone():
    plan = make_plan(["suite=mqar", "preset=test"], "cpu")
    assert matching.resolve(plan, lambda asked: pytest.fail("nothing to solve")) == (plan, [])


# models of the user's own

MINE = '''
"""Mixers of a user."""
import torch
from torch import nn
from typing import ClassVar
from hgrn2_bench.interfaces import Mixer

class Plain(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        assert d_model % 4 == 0
        self.linear = nn.Linear(d_model, 3 * d_model)
        if self.linear.weight.sum().item() == 7: raise KeyError
    def forward(self, x):
        return self.linear(x)[..., :x.shape[-1]]

class Broken(nn.Module):
    def __init__(self, d_model):
        raise KeyError("no such thing")

class Wrong(Mixer):
    state_setting: ClassVar[str] = "kind"
    size: int = 3
    kind: str = "a"
'''


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_a_plain_module_is_matched_in_the_widths_that_it_takes(mine):
    found = matches("match=params", f"model=hgrn2,{mine}:Plain", "match_tolerance=0.2", "hgrn2.d_model=32")["Plain"]
    assert found.cell.model_config.d_model % 4 == 0
    table = {d: size(found.cell.changed({"d_model": d})) for d in range(4, 80, 4)}
    assert found.cell.model_config.d_model == brute(table, found.cell.matching.match_target)


def test_a_model_that_cannot_be_built_is_left_to_fail(mine):
    def careful(asked):
        fault = Solution(fault="KeyError: 'no such thing'")
        return {cell.key: fault if cell.model == "Broken" else matching.solve(cell, free) for cell, free in asked}

    def planned(models):
        return make_plan(["suite=mqar", "preset=test", "match=params", f"model={models}"], "cpu")

    plan, found = matching.resolve(planned(f"hgrn2,{mine}:Broken"), careful)
    broken = next(m for m in found if m.cell.model == "Broken")
    assert len(plan.cells) == 2
    assert (broken.reached, broken.residual, broken.missed) == (None, None, False)
    assert "no such thing" in broken.how
    with pytest.raises(ConfigError, match="Broken cannot be built, so nothing can be matched to it: KeyError"):
        matching.resolve(planned(f"{mine}:Broken,hgrn2"), careful)


def test_a_state_setting_must_be_a_setting_that_is_a_number(mine):
    with pytest.raises(ConfigError, match="Wrong: state_setting 'kind' is none of its settings that are numbers"):
        registry.model(f"{mine}:Wrong")


# what is told


def test_report_says_target_reached_and_residual_of_every_model_once():
    found = resolved("match=state", "model=hgrn2,mamba,attention", "lr=1e-3,1e-2", "match_tolerance=9")[1]
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in report(found).splitlines()]
    assert lines[0] == ["task", "model", "match", "by", "target", "reached", "residual"]
    body = {line[1]: line for line in lines[2:]}
    assert len(lines) == 2 + 3
    assert body["hgrn2"][2:] == ["bytes of state after 16 tokens", "as it is", "1600", "1600", "+0.00%"]
    assert body["mamba"][3].startswith("mamba.d_state=")
    assert body["attention"][-1] == "+64.00%"


def test_refusal_names_the_worst_model_and_the_others():
    cell = make_plan(["suite=mqar", "preset=test", "model=gla", "match=params", "match_target=1000"], "cpu").cells[0]
    others = [dataclasses.replace(cell, model=name) for name in ("mamba", "hgrn1")]
    found = [Match(cell, "as it is", 1010), Match(others[0], "d_model=9", 800), Match(others[1], "as it is", 1100)]
    assert refusal(found[:1]) == ""
    assert refusal([Match(cell, "as it is", 1020)]) == ""
    assert refusal([Match(cell, "as it is", 1021)]) != ""
    text = refusal(found)
    assert text.startswith("mamba (d_model=9) has 800 non-embedding parameters, -20.0% of the target 1000 in len16_kv2")
    assert "; hgrn1 too:" in text


def test_rows_get_what_was_reached():
    cell = resolved("match=state", "model=hgrn2,mamba", "match_tolerance=0.2", "match_len=50")[0].cells[1]
    effective = engine.describe(cell, engine.build(cell)).effective
    assert effective["match_reached"] == measure.state_bytes(engine.build(cell), 50)
    assert effective["match_residual"] == pytest.approx(effective["match_reached"] / cell.matching.match_target - 1, abs=1e-6)
    assert effective["match_by"] == f"mamba.d_state={cell.settings['d_state']}"
    assert {"match", "match_target", "match_tolerance", "match_len"} <= cell.fields().keys()
    unmatched = make_plan(["suite=mqar", "preset=test", "model=hgrn2"], "cpu").cells[0]
    assert not {k for k in engine.describe(unmatched, engine.build(unmatched)).effective if k.startswith("match")}


def test_a_cell_whose_target_is_open_does_not_run():
    cell = make_plan(["suite=mqar", "preset=test", "model=hgrn2", "match=params"], "cpu").cells[0]
    with pytest.raises(ConfigError, match="match=params has no target yet"):
        engine.describe(cell, engine.build(cell))


def test_counting_leaves_no_tensor_without_numbers_behind():
    matching.solve(
        make_plan(["suite=mqar", "preset=test", "model=mamba", "match=params", "match_target=900"], "cpu").cells[0], ("d_model",)
    )
    assert torch.zeros(1).device.type == "cpu"
    assert MatchConfig() == MatchConfig("none", 0, 0.02, 0)


# tables

PROTOCOL = Protocol("mqar", 1, "accuracy", "fraction", True, object, str, {}, solved=0.99)
MATCHED = {"match": "params", "match_target": 40_000, "match_len": 0, "match_tolerance": 0.02}


def matched_row(miss, settings=None, **changes):
    effective = {"heads": 1, "match_by": "d_model=64", "match_reached": round(40_000 * (1 + miss)), "match_residual": miss}
    return row(MATCHED | (settings or {}), effective=effective, **changes)


def columns(table):
    return [column.name for column in table.columns]


def test_a_matched_table_shows_target_and_misses():
    (table,) = make_tables([matched_row(0.0), matched_row(-0.0125, {"d_model": 60}, model="gla")], PROTOCOL)
    assert table.title.endswith("matched to 40000 non-embedding parameters")
    place = columns(table).index("off the match")
    shown = {line[0]: table.columns[place].show(line[place]) for line in table.lines}
    assert shown == {"hgrn2": "+0.00%", "gla": "-1.25%"}
    assert (
        "matched to 40000 non-embedding parameters: largest miss -1.25% (gla), match_tolerance 0.02; gla d_model=64; hgrn2 d_model=64"
        in table.notes
    )
    assert not [name for name in columns(table) if name.startswith("match")]


@pytest.mark.parametrize("miss", [0.021, -0.3])
def test_a_table_with_a_miss_beyond_the_tolerance_is_refused(miss):
    (table,) = make_tables([matched_row(0.0), matched_row(0.0201, model="hgrn1"), matched_row(miss, model="gla")], PROTOCOL)
    assert not table.lines
    told = table.notes[0]
    assert told.startswith(f"refused: gla has {round(40_000 * (1 + miss))} for a target of 40000, a miss of {100 * miss:+.2f}%")
    for form in set(FORMATS) - {"jsonl"}:
        text = render(table, form)
        assert "refused: gla" in text
        assert table.title.split("(")[0] in text
        assert "hgrn1" not in text


def test_a_miss_that_its_own_run_tolerates_is_shown():
    (table,) = make_tables([matched_row(0.0), matched_row(0.3, {"match_tolerance": 0.5}, model="gla")], PROTOCOL)
    assert len(table.lines) == 2
    assert any("largest miss +30.00% (gla), match_tolerance 0.02 or 0.5" in note for note in table.notes)


def test_states_after_other_lengths_have_tables_of_their_own():
    tables = make_tables([matched_row(0.0, {"match": "state", "match_len": length}) for length in (32, 64)], PROTOCOL)
    assert [table.title.split("matched to ")[1] for table in tables] == [f"40000 bytes of state after {n} tokens" for n in (32, 64)]


def test_seeds_with_other_tolerances_are_one_line():
    (table,) = make_tables([matched_row(0.0), matched_row(0.0, {"match_tolerance": 0.5}, seed=1)], PROTOCOL)
    assert len(table.lines) == 1


@pytest.mark.parametrize("other", [{"match": "none", "match_target": 0}, {"match": "state", "match_len": 32}, {"match_target": 40_001}])
def test_other_kinds_targets_and_lengths_have_tables_of_their_own(other):
    tables = make_tables([matched_row(0.0), matched_row(0.0, other)], PROTOCOL)
    assert len(tables) == 2
    assert len({table.title for table in tables}) == 2
    assert all(any("or of another match, are in a table of their own" in note for note in table.notes) for table in tables)


def test_rows_from_before_matching_are_unmatched():
    (table,) = make_tables([row(), row({"match": "none", "match_target": 0, "match_len": 0, "match_tolerance": 0.02}, seed=1)], PROTOCOL)
    assert len(table.lines) == 1
    assert "off the match" not in columns(table)
    assert "match" not in table.title


def test_a_matched_model_that_failed_is_a_line_with_its_reason():
    (table,) = make_tables([matched_row(0.0), failed("failed", "boom", settings=MATCHED, model="gla")], PROTOCOL)
    place = columns(table).index("off the match")
    assert {line[0]: table.columns[place].show(line[place]) for line in table.lines} == {"hgrn2": "+0.00%", "gla": "–"}


@pytest.mark.parametrize("rows", [[row()], [matched_row(0.0)], [failed("failed", "boom")]], ids=["plain", "matched", "failed"])
def test_costs_are_always_shown(rows):
    (table,) = make_tables(rows, PROTOCOL)
    assert {"parameters", "non-embedding", "state", "train FLOPs/token", "local mixing", "positions"} <= set(columns(table))
