"""Rows on disk: what is written comes back, what is damaged or foreign is named and left out."""

import dataclasses
import json
import lzma
import math

import pytest

from hgrn2_bench import results
from hgrn2_bench.results import OUTCOMES, SCHEMA_VERSION, Row, archived, find_rows, frame, parse_row, read_rows

SETTINGS = {
    "d_model": 64,
    "num_layers": 2,
    "conv": 4,
    "positions": "none",
    "channel_mixer": "none",
    "lr": 1e-3,
    "batch_size": 32,
    "epochs": 1,
    "weight_decay": 0.1,
    "warmup": 0.1,
    "schedule": "cosine",
    "stop_at": 0.0,
    "select": "validation",
    "vocab_size": 32,
}


def row(settings=None, **changes):
    """A row of one finished cell; `settings` are changes to the usual ones. The cell's key follows from all that makes a cell."""
    fields = {
        "suite": "mqar",
        "protocol_version": 1,
        "preset": "smoke",
        "task": "len32_kv4",
        "model": "hgrn2",
        "settings": SETTINGS | (settings or {}),
        "effective": {"heads": 1, "kernel": "chunked"},
        "seed": 0,
        "split": "test",
        "metric": "accuracy",
        "value": 0.9,
        "unit": "fraction",
        "higher_is_better": True,
        "num_items": 3000,
        "floors": {"recall-free guess": 0.31},
        "parameters": 41_234,
        "non_embedding_parameters": 39_186,
        "state_bytes": 32_768,
        "train_flops_per_token": 250_000.0,
        "steps": 1500,
        "tokens": 1_536_000,
        "wall_s": 60.0,
        "compile_s": 0.1,
        "step_s": 0.04,
        "tokens_per_s": 25_600.0,
        "peak_bytes": 400_000_000,
        "device": "cpu",
        "device_name": "A processor",
        "threads": 1,
        "processes": 1,
        "workers": 1,
        "backend": "chunked",
        "dtype": "float32",
        "versions": {"python": "3.11.7", "torch": "2.8.0"},
        "data_hash": "d0",
        "truncated": 0,
        "skipped": 0,
        "weights_hash": "w0",
        "commit": "0123456789abcdef",
        "dirty": False,
        "status": "ok",
        "reason": "",
        "command": "python -m hgrn2_bench run suite=mqar",
        "time": "2025-01-01T00:00:00+00:00",
        "mixer_version": "1",
    } | changes
    made_of = ("preset", "task", "model", "seed", "backend", "device", "dtype", "protocol_version", "processes", "mixer_version")
    cell = json.dumps([*(fields[name] for name in made_of), fields["settings"]], sort_keys=True)
    return Row(**{"cell": cell} | fields)


def failed(status, reason, **changes):
    """The single row of a cell that came to nothing."""
    return row(status=status, reason=reason, value=None, num_items=0, floors={}, **changes)


def content(**changes):
    return json.loads(row().to_json()) | changes


def test_a_row_survives_its_line():
    for each in (row(), failed("oom", "out of memory", data_hash="", parameters=None, tokens_per_s=None), row(floors={"é": 0.1})):
        line = each.to_json()
        assert "\n" not in line
        assert parse_row(line) == each
        assert parse_row(line).to_json() == line


def test_a_row_is_written_with_all_fields_in_one_order():
    names = [f.name for f in dataclasses.fields(Row)]
    assert list(json.loads(row().to_json())) == names
    assert content()["schema_version"] == SCHEMA_VERSION
    assert set(Row.VOLATILE) < set(names)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["value", "settings", "floors"])
def test_a_row_never_writes_what_is_not_json(value, place):
    bad = row(value=value) if place == "value" else row(**{place: {"x": value}})
    with pytest.raises(ValueError, match="JSON compliant"):
        bad.to_json()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row().to_json()[:-20], "not a complete JSON line (truncated?)"),
        (row().to_json()[:1], "not a complete JSON line (truncated?)"),
        ("accuracy 0.93", "not a complete JSON line (truncated?)"),
        ("[1, 2]", "not a JSON object"),
        ("3", "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"accuracy": 0.93}', "not a result row: no field suite, protocol_version, preset"),
        (json.dumps({k: v for k, v in content().items() if k != "seed"}), "not a result row: no field seed"),
        (json.dumps(content(schema_version=SCHEMA_VERSION + 1)), f"schema version {SCHEMA_VERSION + 1} is newer"),
        (json.dumps(content(schema_version="1")), "not a result row: schema version '1'"),
        (json.dumps(content(schema_version=None)), "not a result row: schema version None"),
        (json.dumps(content(status="great")), "unknown status 'great'"),
        (json.dumps(content(status=["ok"])), "not a result row: status is ['ok']"),
        (json.dumps(content(settings="x")), "not a result row: settings is 'x'"),
        (json.dumps(content(card="window 0")), "not a result row: card is 'window 0'"),
        (json.dumps(content(value="0.9")), "not a result row: value is '0.9'"),
        (json.dumps(content(value=math.nan)), "NaN is not JSON"),
        (json.dumps(content(value=-math.inf)), "-Infinity is not JSON"),
    ],
)
def test_parse_row_says_what_is_wrong(line, message):
    with pytest.raises(ValueError) as caught:
        parse_row(line)
    assert str(caught.value).startswith(message)


def test_parse_row_takes_a_newer_schema_by_no_means_but_unknown_fields_by_all():
    assert parse_row(json.dumps(content(colour="blue"))) == row()
    newer = json.dumps({"schema_version": SCHEMA_VERSION + 1, "everything": "else"})
    with pytest.raises(ValueError, match="update hgrn2_bench"):
        parse_row(newer)


def test_parse_row_takes_older_rows_without_later_fields():
    old = content()
    for name in ("schema_version", "mixer_version", "details", "card"):
        del old[name]
    assert parse_row(json.dumps(old)) == row(mixer_version="", cell=row().cell)


@pytest.mark.parametrize("status", OUTCOMES)
def test_parse_row_takes_every_outcome(status):
    assert parse_row(json.dumps(content(status=status))).status == status


def test_read_rows_keeps_good_lines_and_names_bad_ones(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [row(seed=0).to_json(), "", "{}", row(seed=1).to_json(), "   ", row(seed=2).to_json()[:50]]
    path.write_text("\n".join(lines))
    rows, problems = read_rows(path)
    assert rows == [row(seed=0), row(seed=1)]
    assert problems == [
        f"{path}:3: not a result row: no field suite, protocol_version, preset; line left out",
        f"{path}:6: not a complete JSON line (truncated?); line left out",
    ]


def test_read_rows_names_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe" + row().to_json().encode())
    for name, fault in [("missing", "No such file or directory"), ("folder", "Is a directory"), ("bytes", "can't decode byte")]:
        rows, problems = read_rows(tmp_path / name)
        assert rows == []
        assert len(problems) == 1
        assert problems[0].startswith(f"{tmp_path / name}: ")
        assert fault in problems[0]


def test_read_rows_of_an_empty_file_is_empty(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    assert read_rows(tmp_path / "rows.jsonl") == ([], [])


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(each.to_json() + "\n" for each in rows))


def test_find_rows_gathers_cells_and_files_and_counts_a_row_once(tmp_path):
    write(tmp_path / "cells/mqar/k0/rows.jsonl", row(seed=0), row(seed=0, split="validation"))
    write(tmp_path / "cells/mqar/k1/rows.jsonl", row(seed=1))
    write(tmp_path / "rows/mqar.jsonl", row(seed=1), row(seed=2))
    write(tmp_path / "rows/deep/more.jsonl", row(seed=2), row(seed=3, suite="lra"))
    write(tmp_path / "cells/lra/k2/rows.jsonl", row(seed=4, suite="lra"))
    write(tmp_path / "cells/mqar/k3/metrics.jsonl", row(seed=5))
    rows, problems = find_rows(tmp_path, "mqar")
    assert problems == []
    assert [(r.seed, r.split) for r in rows] == [(0, "test"), (0, "validation"), (1, "test"), (2, "test")]
    assert [r.seed for r in find_rows(tmp_path, "lra")[0]] == [4, 3]


def test_find_rows_keeps_both_runs_of_a_cell(tmp_path):
    write(tmp_path / "cells/mqar/k0/rows.jsonl", row())
    write(tmp_path / "rows/old.jsonl", row(time="2024-01-01T00:00:00+00:00"))
    assert len(find_rows(tmp_path, "mqar")[0]) == 2


def test_find_rows_leaves_out_folders_set_aside_or_being_written(tmp_path):
    write(tmp_path / "cells/mqar/k0/rows.jsonl", row(seed=0))
    write(tmp_path / "cells/mqar/k1.damaged-17/rows.jsonl", row(seed=1))
    write(tmp_path / "cells/mqar/k2.tmp99/rows.jsonl", row(seed=2))
    assert [r.seed for r in find_rows(tmp_path, "mqar")[0]] == [0]


def test_find_rows_names_damage_and_goes_on(tmp_path):
    path = tmp_path / "cells/mqar/k0/rows.jsonl"
    write(path, row(seed=0))
    path.write_text(path.read_text() + '{"half')
    (tmp_path / "cells/mqar/k1/rows.jsonl").mkdir(parents=True)
    rows, problems = find_rows(tmp_path, "mqar")
    assert rows == [row(seed=0)]
    assert len(problems) == 2
    assert all(str(tmp_path) in problem and "\n" not in problem for problem in problems)


def test_find_rows_of_a_folder_without_any_is_empty(tmp_path):
    assert find_rows(tmp_path, "mqar") == ([], [])
    assert find_rows(tmp_path / "missing", "mqar") == ([], [])


def test_find_rows_reads_compressed_files(tmp_path):
    (tmp_path / "rows").mkdir()
    packed = lzma.compress("".join(row(seed=seed).to_json() + "\n" for seed in range(3)).encode())
    (tmp_path / "rows/many.jsonl.xz").write_bytes(packed)
    rows, problems = find_rows(tmp_path, "mqar")
    assert ([r.seed for r in rows], problems) == ([0, 1, 2], [])
    for damaged in (packed[: len(packed) // 2], b"no archive"):
        (tmp_path / "rows/many.jsonl.xz").write_bytes(damaged)
        rows, problems = find_rows(tmp_path, "mqar")
        assert (rows, len(problems)) == ([], 1)
        assert "many.jsonl.xz" in problems[0]


def test_frame_spreads_settings_and_effective_values():
    table = frame([row(seed=0), row({"gla.num_heads": 2}, seed=1, model="gla")])
    assert list(table["seed"]) == [0, 1]
    assert list(table["settings.d_model"]) == [64, 64]
    assert list(table["effective.heads"]) == [1, 1]
    assert table["settings.gla.num_heads"].isna().tolist() == [True, False]
    assert "settings" not in table.columns
    best = table.groupby("model")["value"].mean()
    assert best["gla"] == 0.9


def test_frame_of_nothing_is_empty():
    assert frame([]).empty


def test_the_module_declares_what_it_requires():
    assert results.OUTCOMES == ("ok", "failed", "skipped", "oom", "diverged", "timeout")
    for name in results._REQUIRED:
        with pytest.raises(ValueError, match=name):
            parse_row(json.dumps({k: v for k, v in content().items() if k != name}))


def test_archived_rows_are_the_newest_of_each_cell(tmp_path):
    (tmp_path / "rows").mkdir()
    old, new = row(cell="a", time="2026-01-01", value=0.1), row(cell="a", time="2026-02-01", value=0.2)
    other, foreign = row(cell="b", time="2026-01-01"), row(cell="c", suite="lra")
    (tmp_path / "rows/one.jsonl").write_text("".join(r.to_json() + "\n" for r in (new, other, foreign)))
    (tmp_path / "rows/two.jsonl").write_text(old.to_json() + "\n")
    assert archived(tmp_path, "mqar") == ({"a": [new], "b": [other]}, [])
    assert archived(tmp_path / "nowhere", "mqar") == ({}, [])
    (tmp_path / "rows/two.jsonl").write_text(old.to_json()[:50])
    rows, problems = archived(tmp_path, "mqar")
    assert rows == {"a": [new], "b": [other]}
    assert len(problems) == 1
    assert "two.jsonl" in problems[0]
