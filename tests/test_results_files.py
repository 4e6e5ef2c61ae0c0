"""The rows and tables that the repository keeps: readable, clean, and made from each other."""

import json
import lzma
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from hgrn2_bench.lines import best_lines, comparable, learned
from hgrn2_bench.registry import protocol, suites
from hgrn2_bench.render import render
from hgrn2_bench.results import find_rows
from hgrn2_bench.tables import make_tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
NOT_YET_COMMITTED = ("9491baf875504b601d7d321370fc9fa56228f42c", "short")
"""Rows that ran before their code, commit 18cee4b, was committed; results/README.md says so too."""


@pytest.mark.parametrize("suite", sorted(suites()))
def test_kept_rows_are_readable_and_complete(suite):
    rows, problems = find_rows(RESULTS, suite)
    assert rows
    assert not problems
    for row in rows:
        assert not row.dirty or (row.commit, row.preset) == NOT_YET_COMMITTED
        assert len(row.commit) == 40
        assert row.command.startswith("python -m hgrn2_bench run ")
        assert row.status == "ok"


@pytest.mark.parametrize("suite", sorted(suites()))
def test_kept_tables_are_made_from_the_kept_rows(suite):
    rows, _ = find_rows(RESULTS, suite)
    made = "\n".join(render(table, "md") for table in make_tables(rows, protocol(suite)))
    assert (RESULTS / f"tables/{suite}.md").read_text().split() == made.split()


def test_readme_shows_the_kept_tables_of_its_first_command():
    readme, rows = (ROOT / "README.md").read_text(), find_rows(RESULTS, "mqar")[0]
    made = make_tables([row for row in rows if row.preset == "smoke"], protocol("mqar"))
    assert len(made) == 2
    for line in (line for table in made for line in render(table, "md").splitlines()):
        assert line in readme


def test_readme_shows_the_kept_table_of_the_recurrence():
    readme, rows = (ROOT / "README.md").read_text(), find_rows(RESULTS, "throughput")[0]
    (table,) = make_tables([row for row in rows if row.task == "op_training_4096"], protocol("throughput"))
    for line in render(table, "md").splitlines():
        assert line in readme or not line.startswith("|")


def test_readme_shows_the_medians_of_preset_short():
    """Model, then accuracy with and without a convolution on the three tasks; for hgrn2 at both forget biases."""
    readme, found = (ROOT / "README.md").read_text(), {}
    for part in comparable([row for row in find_rows(RESULTS, "mqar")[0] if row.preset == "short"], protocol("mqar"), "accuracy"):
        for line in best_lines(part.runs, protocol("mqar")):
            settings = line.first.settings
            found.setdefault(line.first.model, {})[part.task, settings["conv"], settings["forget_bias"]] = f"{line.middle:.2f}"
    assert len(found) == 10
    for model, medians in found.items():
        places = [(task, conv) for conv in (4, 0) for task in ("len64_kv4", "len128_kv8", "len256_kv16")]
        values = [" / ".join(medians[*place, bias] for bias in (0.0, 3.0) if (*place, bias) in medians) for place in places]
        assert f"| {model} | {' | '.join(values)} |" in readme


def test_readme_shows_the_milliseconds_of_throughput_short():
    """Model, then the median of its repeats at the lengths of three tasks."""
    readme, found = (ROOT / "README.md").read_text(), {}
    for row in find_rows(RESULTS, "throughput")[0]:
        if row.preset == "short" and row.metric == "latency":
            heads = row.settings.get("attention.num_heads")
            found.setdefault(f"{row.model}, {heads} heads" if heads else row.model, {}).setdefault(
                (row.settings["kind"], row.settings["seq_len"]), []
            ).append(row.value)
    assert len(found) == 8
    lengths = {"op": (512, 2048, 8192, 32768), "train": (2048, 8192), "decode": (1024, 4096, 16384, 65536)}
    for name, times in found.items():
        values = [f"{1e3 * statistics.median(times[kind, T]):.3g}" for kind, ts in lengths.items() for T in ts]
        assert f"| {name} | {' | '.join(values)} |" in readme


def test_readme_shows_the_accuracies_and_seconds_of_lra_short():
    """Model, then for each task accuracy and seconds without compiling, (2) beside one other cell."""
    readme, found = (ROOT / "README.md").read_text(), {}
    for part in comparable([row for row in find_rows(RESULTS, "lra")[0] if row.preset == "short"], protocol("lra"), "accuracy"):
        for line in best_lines(part.runs, protocol("lra")):
            row = line.first
            value = f"{row.value:.3f}" if learned(line) else "not learned"
            pair = " (2)" * (row.workers == 2)
            found.setdefault(row.model, {})[row.task] = f"{value}, {row.wall_s - row.compile_s:.0f} s{pair}"
    assert len(found) == 4
    for model, cells in found.items():
        values = [cells[task] for task in ("listops-500", "text", "image-jpeg", "pathfinder-6")]
        assert f"| {model} | {' | '.join(values)} |" in readme


def test_readme_shows_the_step_of_path_x():
    """Model, starred where other cells ran beside it, milliseconds, peak memory in GB."""
    readme, models = (ROOT / "README.md").read_text(), set()
    for row in find_rows(RESULTS, "lra")[0]:
        if row.preset == "standard":
            models.add(row.model)
            assert f"| {row.model}{'*' * (row.workers > 1)} | {1e3 * row.step_s:.0f} | {row.peak_bytes / 1e9:.1f} |" in readme
    assert len(models) == 18


def test_kept_curves_belong_to_the_kept_rows():
    """One curve for each cell of preset short, up to its last step; its last validation score is that of the row."""
    rows = {row.cell: row for row in find_rows(RESULTS, "lra")[0] if row.preset == "short" and row.split == "validation"}
    curves = {}
    for line in lzma.decompress((RESULTS / "curves/lra_short_h100.jsonl.xz").read_bytes()).splitlines():
        record = json.loads(line)
        curves.setdefault(record["cell"], []).append(record)
    assert curves.keys() == rows.keys()
    for cell, records in curves.items():
        row, scores = rows[cell], [record["validation_score"] for record in records if "validation_score" in record]
        assert {(record["task"], record["model"]) for record in records} == {(row.task, row.model)}
        assert max(record["step"] for record in records) == row.steps
        assert scores[-1] == pytest.approx(row.value, abs=1e-4)


def test_table_command_prints_the_kept_tables(tmp_path):
    words = [sys.executable, "-m", "hgrn2_bench", "table", "mqar", "--results", str(RESULTS)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == (RESULTS / "tables/mqar.md").read_text()


def test_readme_shows_the_language_models_of_preset_smoke():
    """Model, then means over seeds: perplexity, in a window, carried; excess on free tokens, on recalled ones in a window and carried."""
    readme, rows = (ROOT / "README.md").read_text(), find_rows(RESULTS, "wikitext")[0]
    names = ("perplexity", "perplexity_window", "perplexity_carried", "excess_free", "excess_recalled_window", "excess_recalled_carried")
    tested = [row for row in rows if row.preset == "smoke" and row.split == "test"]
    for model in {row.model for row in tested}:
        found = [[row.value for row in tested if (row.model, row.metric) == (model, name)] for name in names]
        shown = " | ".join(f"{statistics.fmean(values):.3f}" if values else "–" for values in found)
        assert f"| {model} | {shown} |" in readme
