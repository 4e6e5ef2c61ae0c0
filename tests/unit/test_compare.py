"""Two models over shared rows: what is paired, what is claimed from how many pairs, and what is said where things are not equal."""

from dataclasses import replace

import pytest
from test_results import failed, row

from hgrn2_bench.compare import Names, compare_models, holdings
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.protocol import Protocol
from hgrn2_bench.render import render

NAMES = Names("hgrn2", "gla")
FIVE = (0.8, 0.81, 0.82, 0.83, 0.84)


def protocol(**changes):
    fields = {"name": "mqar", "version": 1, "metric": "accuracy", "unit": "fraction", "higher_is_better": True}
    return Protocol(**fields | {"data_schema": object, "name_task": str, "presets": {}, "solved": 0.99} | changes)


def runs(model, *values, settings=None, start=0, **changes):
    """The rows of one model: a value per seed, None for a run that failed; every model's own setting is among its settings."""
    own = {f"{model}.heads": 1} | (settings or {})
    found = []
    for seed, value in enumerate(values, start):
        fields = {"model": model, "seed": seed, "data_hash": f"d{seed}"} | changes
        if value is None:
            found.append(failed("diverged", "loss nan", settings=own, **fields))
        else:
            found += [row(own, value=value, split=split, **fields) for split in ("validation", "test")]
    return found


def minus(values, gap):
    return [value - gap for value in values]


def reports(rows, of=None, names=NAMES):
    return compare_models(rows, {"mqar": of or protocol()}, names)


def only(rows, of=None):
    (report,) = reports(rows, of)
    return report


def lines(report):
    return [dict(zip((c.name for c in report.table.columns), line, strict=True)) for line in report.table.lines]


def line(rows, of=None):
    (found,) = lines(only(rows, of))
    return found


# what is claimed


def test_five_pairs_apart_are_better_with_an_interval():
    rows = [*runs("hgrn2", *FIVE), *runs("gla", 0.7, 0.7, 0.7, 0.7, 0.7)]
    # differences 0.10 .. 0.14: standard deviation 0.0158114; t(0.975, 4) = 2.776445, so 2.776445 * 0.0158114 / sqrt(5) = 0.019632
    assert line(rows) == {
        "task": "len32_kv4",
        "setting": "–",
        "hgrn2": "0.820",
        "gla": "0.700",
        "hgrn2 - gla": "+0.120 ± 0.020",
        "pairs": 5,
        "finding": "hgrn2 is better",
    }
    assert only(rows).sentence == (
        "hgrn2 is better than gla (higher accuracy) on 1 of 1 mqar task (len32_kv4); "
        "mean difference +0.120 over 5 pairs, 95% interval +0.100 to +0.140 over 5 seeds."
    )


def test_the_other_order_is_worse():
    rows = [*runs("hgrn2", *FIVE), *runs("gla", 0.7, 0.7, 0.7, 0.7, 0.7)]
    (report,) = reports(rows, names=Names("gla", "hgrn2"))
    assert lines(report)[0]["finding"] == "gla is worse"
    assert "gla is better than hgrn2 (higher accuracy) on 0 of 1 mqar task; worse on 1 (len32_kv4)" in report.sentence


def test_a_metric_where_lower_is_better_is_respected():
    changes = {"metric": "ppl", "higher_is_better": False, "floors": {}}
    rows = [*runs("hgrn2", 20.0, 20.1, 20.2, 20.3, 20.4, **changes), *runs("gla", 22.0, 22.1, 22.2, 22.3, 22.5, **changes)]
    report = only(rows, protocol(metric="ppl", unit="ppl", higher_is_better=False, solved=None))
    assert lines(report)[0]["finding"] == "hgrn2 is better"
    assert report.sentence.startswith("hgrn2 is better than gla (lower ppl) on 1 of 1")
    assert "mean difference -2.020" in report.sentence


def test_noise_over_five_pairs_is_not_distinguishable():
    found = only([*runs("hgrn2", *FIVE), *runs("gla", 0.84, 0.83, 0.82, 0.81, 0.8)])
    assert lines(found)[0]["finding"] == "not distinguishable"
    assert "not distinguishable on 1 (len32_kv4)" in found.sentence


@pytest.mark.parametrize(("count", "difference"), [(1, "+0.100"), (2, "+0.100"), (3, "+0.100 ± 0.000"), (4, "+0.100 ± 0.000")])
def test_below_five_pairs_nothing_is_claimed_and_below_three_no_interval_is_given(count, difference):
    found = only([*runs("hgrn2", *[0.875] * count), *runs("gla", *[0.775] * count)])
    assert lines(found)[0]["hgrn2 - gla"] == difference
    assert lines(found)[0]["finding"] == "no claim (under 5 paired seeds)"
    assert "on 0 of 1 mqar task; no claim (under 5 paired seeds) on 1 (len32_kv4)" in found.sentence
    assert ("no interval under 3 seeds" in found.sentence) == (count < 3)


def test_seeds_that_differ_are_compared_unpaired_and_nothing_is_claimed():
    found = only([*runs("hgrn2", *FIVE), *runs("gla", *minus(FIVE, 0.2), start=5)])
    assert (lines(found)[0]["pairs"], lines(found)[0]["hgrn2 - gla"]) == (0, "+0.200")
    assert lines(found)[0]["finding"] == "no claim (unpaired: no seed in common)"
    assert "no pair that both finished" in found.sentence


def test_only_common_seeds_are_paired():
    found = line([*runs("hgrn2", *FIVE, 0.1), *runs("gla", *minus(FIVE, 0.1))])
    assert (found["hgrn2"], found["pairs"]) == ("0.820", 5)


def test_where_both_solve_or_neither_learned_there_is_nothing_to_tell_apart():
    assert line([*runs("hgrn2", *[0.999] * 5), *runs("gla", *[0.995] * 5)])["finding"] == "both solve it"
    assert line([*runs("hgrn2", *[0.3] * 5), *runs("gla", *[0.2] * 5)])["finding"] == "neither learned"
    assert line([*runs("hgrn2", *[0.9] * 5), *runs("gla", *[0.2] * 5)])["finding"] == "hgrn2 is better"


@pytest.mark.parametrize(
    ("theirs", "finding", "told"),
    [
        ([0.7, None, 0.7, 0.7, 0.7], "hgrn2 is better", "0.700 (1 of 5 failed)"),
        ([0.9, None, 0.9, 0.9, 0.9], "not distinguishable", "0.900 (1 of 5 failed)"),
        ([None] * 5, "hgrn2 is better", "– (5 of 5 failed)"),
    ],
)
def test_failed_runs_count_against_their_model(theirs, finding, told):
    found = only([*runs("hgrn2", *FIVE), *runs("gla", *theirs)])
    assert (lines(found)[0]["finding"], lines(found)[0]["gla"]) == (finding, told)
    assert "±" not in lines(found)[0]["hgrn2 - gla"]
    assert "a failed run counts as worse than any value" in " ".join(found.table.notes)
    assert "95%" not in found.sentence


def test_skipped_cells_never_ran():
    skipped = failed("skipped", "no package", settings={"gla.heads": 1}, model="gla", seed=4)
    found = line([*runs("hgrn2", *FIVE), *runs("gla", *minus(FIVE, 0.1)[:4]), skipped])
    assert (found["pairs"], found["gla"]) == (4, "0.715")


# several tasks


def test_the_interval_over_tasks_is_over_seeds():
    easy = [*runs("hgrn2", *FIVE), *runs("gla", *minus(FIVE, 0.1))]
    hard = [*runs("hgrn2", *FIVE, task="len32_kv8"), *runs("gla", *minus(FIVE, 0.3), task="len32_kv8")]
    found = only(easy + hard)
    assert [each["task"] for each in lines(found)] == ["len32_kv4", "len32_kv8"]
    # within every seed the mean over the two tasks is 0.2: no spread, although the ten differences have one
    assert (
        "on 2 of 2 mqar tasks (len32_kv4, len32_kv8); mean difference +0.200 over 10 pairs, 95% interval +0.200 to +0.200" in found.sentence
    )


def test_tasks_with_other_seeds_have_no_common_interval():
    easy = [*runs("hgrn2", *FIVE), *runs("gla", *minus(FIVE, 0.1))]
    hard = [*runs("hgrn2", *FIVE[:3], task="len32_kv8"), *runs("gla", *minus(FIVE, 0.3)[:3], task="len32_kv8")]
    assert "over 8 pairs, no interval because the seeds are not the same everywhere" in only(easy + hard).sentence


# what is paired


def test_shared_settings_must_agree_and_lines_left_out_are_counted():
    rows = [each for width in (64, 128) for each in runs("hgrn2", *FIVE, settings={"d_model": width})]
    found = only([*rows, *runs("gla", *minus(FIVE, 0.1), settings={"d_model": 128})])
    assert len(found.table.lines) == 1
    assert "left out, no partner under the same settings: 1 of hgrn2" in found.table.notes


def test_settings_that_vary_are_shown_and_own_settings_are_no_bar():
    rows = [
        each
        for width in (64, 128)
        for heads in (1, 2)
        for each in [
            *runs("hgrn2", *FIVE, settings={"d_model": width, "hgrn2.heads": heads}),
            *(runs("gla", *minus(FIVE, 0.1), settings={"d_model": width}) if heads == 1 else ()),
        ]
    ]
    found = only(rows)
    assert {each["setting"] for each in lines(found)} == {f"d_model={width} hgrn2.heads={heads}" for width in (64, 128) for heads in (1, 2)}
    assert "on 4 of 4 mqar settings" in found.sentence


def test_each_model_takes_part_at_the_learning_rate_that_selection_chose():
    rows = runs("gla", *[0.7] * 5)
    for lr, selection, value in ((1e-3, 0.9, 0.8), (1e-2, 0.5, 0.95)):
        for each in runs("hgrn2", *[value] * 5, settings={"lr": lr}):
            rows.append(
                each if each.split == "test" else row({"hgrn2.heads": 1, "lr": lr}, value=selection, split="validation", seed=each.seed)
            )
    found = only(rows)
    assert lines(found)[0]["hgrn2"] == "0.800"
    assert "lr chosen on validation data for hgrn2 only" in found.table.notes


@pytest.mark.parametrize("changes", [{"preset": "paper"}, {"dtype": "bfloat16"}, {"protocol_version": 2}, {"task": "len64_kv4"}])
def test_other_presets_precisions_protocols_and_tasks_are_never_paired(changes):
    with pytest.raises(ConfigError, match="no rows with the same settings: hgrn2 has mqar"):
        reports([*runs("hgrn2", *FIVE, **changes), *runs("gla", *FIVE)])


def test_other_data_of_one_seed_are_never_paired():
    with pytest.raises(ConfigError, match="no rows with the same settings"):
        reports([*runs("hgrn2", 0.8, data_hash="one"), *runs("gla", 0.7, data_hash="other")])


def matched(target, width, **more):
    return {
        "match": "params",
        "match_target": target,
        "match_len": 0,
        "match_tolerance": 0.02,
        "d_model": width,
        "channel_width": width,
        **more,
    }


def test_models_matched_in_parameters_are_paired_whatever_their_widths():
    found = only([*runs("hgrn2", *FIVE, settings=matched(9000, 64)), *runs("gla", *minus(FIVE, 0.1), settings=matched(9000, 56))])
    assert lines(found)[0]["pairs"] == 5
    assert found.table.title.endswith(", matched to 9000 non-embedding parameters")
    assert "not equal: d_model is 64 for hgrn2, 56 for gla" in found.table.notes
    with pytest.raises(ConfigError, match="no rows with the same settings"):
        reports([*runs("hgrn2", *FIVE, settings={"d_model": 64}), *runs("gla", *FIVE, settings={"d_model": 56})])


def test_rows_of_another_match_have_a_report_of_their_own():
    rows = [each for model in ("hgrn2", "gla") for target in (9000, 12000) for each in runs(model, *FIVE, settings=matched(target, 64))]
    rows += [each for model in ("hgrn2", "gla") for each in runs(model, *FIVE, settings={"d_model": 64})]
    titles = sorted(report.table.title.partition("better)")[2] for report in reports(rows))
    assert titles == ["", ", matched to 12000 non-embedding parameters", ", matched to 9000 non-embedding parameters"]


def test_presets_have_reports_of_their_own():
    rows = [each for preset in ("smoke", "paper") for model in ("hgrn2", "gla") for each in runs(model, *FIVE, preset=preset)]
    assert [report.table.title.split(":")[0] for report in reports(rows)] == ["mqar, preset paper", "mqar, preset smoke"]


def test_settings_a_model_cannot_take_are_paired_with_a_note_where_no_equal_partner_is():
    plain = runs("gla", *minus(FIVE, 0.1), settings={"conv": 0})
    found = only([*runs("hgrn2", *FIVE), *plain])
    assert "not equal: conv is 4 for hgrn2, 0 for gla" in found.table.notes
    both = only([*runs("hgrn2", *FIVE), *runs("hgrn2", *FIVE, settings={"conv": 0}), *plain])
    assert len(both.table.lines) == 1
    assert not any("not equal" in note for note in both.table.notes)


def test_settings_that_both_models_have_bind_where_others_cannot_be_equal():
    ours = [each for conv in (0, 4) for bias in (0.0, 3.0) for each in runs("hgrn2", *FIVE, settings={"conv": conv, "forget_bias": bias})]
    theirs = [
        each
        for conv in (0, 4)
        for kind in ("learned", "rope")
        for each in runs("gla", *minus(FIVE, 0.1), settings={"conv": conv, "forget_bias": 0.0, "positions": kind})
    ]
    found = only([*ours, *theirs])
    labels = {f"conv={conv} gla positions={kind}" for conv in (0, 4) for kind in ("learned", "rope")}
    assert {each["setting"] for each in lines(found)} == labels
    assert "left out, no partner under the same settings: 2 of hgrn2" in found.table.notes
    assert "not equal: positions is none for hgrn2, rope for gla" in found.table.notes


def test_a_first_layer_that_one_model_lacks_is_no_bar():
    found = only([*runs("hgrn2", *FIVE, settings={"first_layer": "base_conv"}), *runs("gla", *FIVE, settings={"first_layer": "none"})])
    assert "not equal: first_layer is base_conv for hgrn2, none for gla" in found.table.notes


def test_a_grid_tuned_on_the_first_seed_is_compared_at_its_best_point():
    rows = [*runs("gla", *[0.7] * 5), *runs("hgrn2", 0.9, settings={"lr": 1e-3}), *runs("hgrn2", *FIVE, settings={"lr": 1e-2})]
    selection = {(1e-3, 0): 0.6, (1e-2, 0): 0.7}  # the other seeds ran at the best point only: 0.1 there is no vote against it
    rows = [
        each if each.split == "test" or each.model == "gla" else replace(each, value=selection.get((each.settings["lr"], each.seed), 0.1))
        for each in rows
    ]
    found = only([replace(each, settings=each.settings | {"tune_on": "first_seed"}) for each in rows])
    assert (lines(found)[0]["pairs"], lines(found)[0]["hgrn2"]) == (5, "0.820")
    assert "lr chosen on validation data of the first seed for hgrn2 only" in found.table.notes


# what is said beside


def test_unequal_depth_and_parameters_are_stated_beyond_a_tenth():
    deep = only([*runs("hgrn2", *FIVE, parameters=45_400), *runs("gla", *FIVE, parameters=41_234, settings={"num_layers": 4})])
    assert "not equal: hgrn2 has 45.4k parameters, gla 41.2k" in deep.table.notes
    assert "not equal: num_layers is 2 for hgrn2, 4 for gla" in deep.table.notes
    near = only([*runs("hgrn2", *FIVE, parameters=45_300), *runs("gla", *FIVE, parameters=41_234)])
    assert not any("not equal" in note for note in near.table.notes)


def test_speed_is_compared_on_one_device_only():
    rows = [*runs("hgrn2", *FIVE, tokens_per_s=5e4), *runs("gla", *FIVE, tokens_per_s=1e5)]
    assert "speed: hgrn2 trains at 0.50 times the tokens/s of gla (median of 5 pairs, A processor)" in only(rows).table.notes
    apart = [*runs("hgrn2", *FIVE), *runs("gla", *FIVE, device_name="Another")]
    assert "no speed: no pair was measured on one device" in only(apart).table.notes


def test_a_metric_that_is_a_speed_is_never_compared_across_devices():
    rows = [
        each for name in ("A", "B") for model in ("hgrn2", "gla") for each in runs(model, *FIVE, device_name=name, cell=f"{model}{name}")
    ]
    found = reports([*rows], protocol(speed=True))
    assert [report.table.notes[0].split(";")[0] for report in found] == [f"protocol version 1, float32, {name}" for name in ("A", "B")]


def test_unknown_and_equal_models_are_refused():
    rows = [*runs("hgrn2", *FIVE), *runs("gla", *FIVE)]
    with pytest.raises(ConfigError, match=r"Unknown model 'gal'. Did you mean 'gla'\?"):
        reports(rows, names=Names("hgrn2", "gal"))
    with pytest.raises(ConfigError, match="not 'gla' twice"):
        reports(rows, names=Names("gla", "gla"))
    with pytest.raises(ConfigError, match="mamba has no rows"):
        compare_models(rows, {"mqar": protocol()}, Names("hgrn2", "mamba"), registered=["mamba"])


def test_holdings_are_told_in_one_line_however_many():
    assert holdings(runs("gla", 0.5, 0.6), "gla") == "gla has mqar smoke len32_kv4 (seeds 0, 1)"
    many = [each for task in range(10) for each in runs("gla", 0.5, task=f"t{task}")]
    assert holdings(many, "gla").endswith("mqar smoke t7 (seed 0) and 2 more")


def test_a_report_does_not_depend_on_the_order_of_rows():
    rows = [each for task in ("a", "b") for model in ("hgrn2", "gla") for each in runs(model, *FIVE, task=task)]
    one, other = only(rows), only(rows[::-1])
    assert (render(one.table, "md"), one.sentence) == (render(other.table, "md"), other.sentence)
