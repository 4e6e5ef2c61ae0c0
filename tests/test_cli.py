"""The program as a user types it, in processes of its own: words, errors, exit codes, resume after a kill, two runs at once."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from hgrn2_bench import cli
from hgrn2_bench.plan import make_plan
from hgrn2_bench.results import Row, find_rows

TEST = ("run", "suite=mqar", "preset=test")
SLOW = (*TEST, "model=hgrn2", "train_examples=32_000", "--workers", "1")  # 1,000 steps, several seconds


def command(*words):
    return [sys.executable, "-m", "hgrn2_bench", *map(str, words)]


def first_on_path(folder):
    """An environment in which a folder's modules come first, and the others from where this process has them."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}


def bench(*words, cwd, env=None, timeout=120):
    return subprocess.run(command(*words), capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}, timeout=timeout)


def stable(rows):
    """Rows without times, memory and host."""
    kept = [{k: v for k, v in json.loads(row.to_json()).items() if k not in Row.VOLATILE} for row in rows]
    return sorted(kept, key=lambda row: (row["cell"], row["split"], row["metric"]))


def rows_of(folder):
    rows, problems = find_rows(folder, "mqar")
    assert not problems
    return rows


def wait_for(condition, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["list", "mqar"],
        ["list", "hgrn2"],
        ["--help"],
        ["run", "--help"],
        ["warm", "--help"],
        ["check", "--help"],
        ["compare", "--help"],
        ["status"],
    ],
)
def test_light_commands_import_neither_torch_nor_fla_nor_pandas(words, tmp_path):
    (tmp_path / "results/local").mkdir(parents=True)
    script = f"""
        import sys
        from hgrn2_bench.cli import main
        sys.argv = ["hgrn2_bench", *{words!r}]
        try:
            main()
        except SystemExit as end:
            assert not end.code, end.code
        heavy = {{"torch", "fla", "pandas", "triton", "scipy", "transformers"}} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr


def test_warm_without_a_gpu_is_one_line_and_exit_code_2(tmp_path):
    done = bench("warm", "suite=mqar", cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: warm compiles for a GPU; the driver shows none\n"


def test_the_words_of_a_preset_are_listed_once_each_and_give_its_cells(tmp_path):
    listed = bench("list", "mqar", cwd=tmp_path).stdout.split("preset=short:")[1].split("words: ")[1].split("\n")[0].split()
    names = [word.partition("=")[0] for word in listed]
    assert len(set(names)) == len(names)
    words = ["suite=mqar", "preset=short", "seed=0", "task=len64_kv4"]
    typed = [word for word in listed if not word.startswith(("seed=", "task="))]
    assert [cell.key for cell in make_plan([*words, *typed], "cpu").cells] == [cell.key for cell in make_plan(words, "cpu").cells]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["suite=mqarr"], "Did you mean 'mqar'?"),
        (["suite=mqar", "modle=gla"], "Did you mean 'model'?"),
        (["suite=mqar", "model=hgnr2"], "Did you mean 'hgrn2'?"),
        (["suite=mqar", "preset=smoek"], "Did you mean 'smoke'?"),
        (["suite=mqar", "d_model=abc"], "d_model=abc: expected a whole number"),
        (["suite=mqar", "lr_=1e-3"], "Did you mean 'lr'?"),
        (["suite=mqar", "--track", "tensorbord"], "Did you mean 'tensorboard'?"),
        (["suite=mqar", "model=HGRN2"], "Did you mean 'hgrn2'?"),
        (["suite=mqar", "d_model=1000000000"], "at most 65536"),
        (["suite=mqar", "lr=1e300"], "at most 1000"),
        (["suite=mqar", "+model.hiden=64"], "model.hiden"),
        (["suite=mqar", "seq_len=63"], "62 or 64"),
        (["suite=mqar", "seq_len=16", "num_pairs=5"], "num_pairs at most 4"),
        (["suite=mqar", "vocab_size=8", "num_pairs=4"], "vocab_size at least 10"),
        (["suite=mqar", "num_passes=2"], "Unknown key 'num_passes'"),
        (["suite=mqar", "--device", "tpu"], "Unknown device 'tpu'"),
        (["nonsense"], "expected key=value"),
        (["suite=mqar", "model=./missing.py:Net"], "no file ./missing.py"),
        (["suite=mqar", "backend=fla", "--device", "cpu"], "backend=fla needs a CUDA device"),
        (["suite=mqar", "first_layer=bse_conv"], "Did you mean 'base_conv'?"),
    ],
)
def test_bad_words_give_one_line_and_exit_code_2_without_torch(words, told, tmp_path):
    script = f"""
        import sys
        from hgrn2_bench.cli import main
        sys.argv = ["hgrn2_bench", "run", *{words!r}]
        try:
            main()
        finally:
            assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_illegal_combination_that_only_the_mixer_knows_is_refused_before_any_cell(tmp_path):
    done = bench(*TEST, "model=hgrn2,attention", "d_model=16", "hgrn2.expand_ratio=5", cwd=tmp_path)
    assert done.returncode == 2
    assert "heads = d_model / expand_ratio" in done.stderr
    assert "4 or 8" in done.stderr
    assert not list(tmp_path.glob("results/local/cells/mqar/*/rows.jsonl"))


def test_first_run_writes_rows_and_the_second_prints_the_same_table_from_them(tmp_path):
    first = bench(*TEST, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "results/local"
    written = {path: path.stat().st_mtime_ns for path in folder.glob("cells/mqar/*/rows.jsonl")}
    assert len(written) == 5
    again = bench(*TEST, cwd=tmp_path)
    assert again.stdout == first.stdout
    assert "cells to run" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.glob("cells/mqar/*/rows.jsonl")} == written
    for word in ("recall-free guess", "1/|values|", "not learned in this budget", "tokens/s", "state", "non-embedding"):
        assert word in first.stdout
    table = bench("table", "mqar", cwd=tmp_path)
    assert table.stdout == first.stdout
    lines = bench("table", "mqar", "--format", "jsonl", cwd=tmp_path).stdout.splitlines()
    assert len(lines) == 20


def test_command_of_a_row_repeats_exactly_that_row(tmp_path):
    bench(*TEST, "model=hgrn2,attention", "lr=1e-3,1e-2", "hgrn2.expand_ratio=8", "--workers", "1", cwd=tmp_path)
    rows = rows_of(tmp_path / "results/local")
    chosen = next(row for row in rows if row.model == "hgrn2" and row.settings["lr"] == 1e-2)
    words = chosen.command.removeprefix("python -m hgrn2_bench ").split()
    done = bench(*words, "--results", "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    same = [row for row in rows if row.cell == chosen.cell]
    ours, theirs = stable(rows_of(tmp_path / "again")), stable(same)
    assert [row | {"command": ""} for row in ours] == [row | {"command": ""} for row in theirs]


def test_a_grid_tuned_on_the_first_seed_runs_its_best_point_alone_on_the_others(tmp_path):
    words = (*TEST, "model=attention", "lr=1e-3,1e-2", "seed=0,1", "tune_on=first_seed")
    planned = bench(*words, "--dry-run", cwd=tmp_path)
    assert "3 (3 to run)" in planned.stdout
    assert "3 cells, cpu" in planned.stdout
    first = bench(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "2 cells to run" in first.stderr
    assert "1 cells to run (2 finished before)" in first.stderr
    assert "lr chosen on validation data of the first seed" in first.stdout
    tested = [row for row in rows_of(tmp_path / "results/local") if row.metric == "accuracy"]
    cells = {(row.settings["lr"], row.seed): row.value for row in tested if row.split == "validation"}
    best = max((1e-3, 1e-2), key=lambda lr: (cells[lr, 0], -lr))
    assert set(cells) == {(1e-3, 0), (1e-2, 0), (best, 1)}
    (line,) = [line for line in first.stdout.splitlines() if line.startswith("| attention")]
    shown = [row.value for seed in (0, 1) for row in tested if (row.split, row.settings["lr"], row.seed) == ("test", best, seed)]
    assert ", ".join(f"{value:.3f}" for value in shown) in line
    again = bench(*words, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert "cells to run" not in again.stderr
    assert len(rows_of(tmp_path / "results/local")) == 3 * 4
    assert "3 (0 to run)" in bench(*words, "--dry-run", cwd=tmp_path).stdout
    more = bench(*words[:-2], "seed=0,1,2", words[-1], "--dry-run", cwd=tmp_path)
    assert "4 (1 to run)" in more.stdout


def test_on_a_gpu_the_bare_command_names_the_preset_for_it():
    plan = make_plan(["suite=mqar", "model=attention", "backend=chunked"], "cuda")
    for words, hinted in ((["suite=mqar"], True), (["suite=mqar", "preset=smoke"], False)):
        assert ("on this GPU try preset=short: three settings" in cli._hint(words, plan)) == hinted
    assert cli._hint(["suite=mqar"], make_plan(["suite=mqar", "model=attention"], "cpu")) == ""


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    done = bench(*TEST, "model=hgrn2,mamba", "seed=0,1", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 (2 to run)" in done.stdout
    assert "estimate" in done.stdout
    assert not (tmp_path / "results").exists()


def start_killed_run(tmp_path, folder, *words):
    """Start a run, wait for its first checkpoint, and kill -9 the parent only, as the kernel or an operator would."""
    script = "import hgrn2_bench.trainer as t; t.CHECKPOINT_EVERY_S = 0.2"
    (tmp_path / "sitecustomize.py").write_text(script)  # checkpoints often enough for a short test
    env = {**os.environ, **first_on_path(tmp_path)}
    process = subprocess.Popen(command(*words, "--results", folder), cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(folder.glob("cells/mqar/*/checkpoint.pt")))
    process.send_signal(signal.SIGKILL)
    process.wait()


def curve(path):
    """The records of a training curve without what depends on the clock."""
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in path.read_text().splitlines()]


@pytest.mark.parametrize("how", [(), ("micro_batch=12", "schedule=inverse_sqrt", "warmup=0", "warmup_steps=30", "decay_all=true")])
def test_killed_sweep_continues_bit_for_bit_and_reruns_nothing_finished(tmp_path, how):
    words = (*SLOW, *how, "model=attention,hgrn2")
    words = tuple(w for w in words if w != "model=hgrn2")
    whole = bench(*words, "--results", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "killed"
    bench(*(w for w in words if w != "model=attention,hgrn2"), "model=attention", "--results", folder, cwd=tmp_path)
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("cells/mqar/*/rows.jsonl")}
    start_killed_run(tmp_path, folder, *words)
    assert "interrupted" in bench("status", "--results", folder, cwd=tmp_path).stdout
    (checkpoint,) = folder.glob("cells/mqar/*/checkpoint.pt")
    done = bench(*words, "--results", folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(1 finished before)" in done.stderr
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    assert stable(rows_of(folder)) == stable(rows_of(tmp_path / "whole"))
    for path in folder.glob("cells/mqar/*/metrics.jsonl"):
        assert curve(path) == curve(tmp_path / "whole" / path.relative_to(folder))
    assert not checkpoint.exists()


def test_two_runs_at_once_share_a_folder_and_lose_nothing(tmp_path):
    words = (*SLOW[:3], "model=hgrn2,attention", "train_examples=32_000", "seed=0,1", "--workers", "1", "--results", "both")
    first = subprocess.Popen(command(*words), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    second = subprocess.Popen(command(*words), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert outputs[0][0] == outputs[1][0]
    rows = rows_of(tmp_path / "both")
    assert len(rows) == 16
    assert len({row.cell for row in rows}) == 4


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_a_polite_kill_checkpoints_and_the_next_run_continues(tmp_path, sign):
    folder = tmp_path / "stopped"
    process = subprocess.Popen(command(*SLOW, "--results", folder), cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: list(folder.glob("cells/mqar/*/metrics.jsonl")))
    os.killpg(process.pid, sign)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in said
    assert "Traceback" not in said
    assert len(list(folder.glob("cells/mqar/*/checkpoint.pt"))) == 1
    assert bench(*SLOW, "--results", folder, cwd=tmp_path).returncode == 0
    whole = bench(*SLOW, "--results", "whole", cwd=tmp_path)
    assert whole.returncode == 0
    assert stable(rows_of(folder)) == stable(rows_of(tmp_path / "whole"))


MATCHED = (*TEST, "model=hgrn2,attention,gla", "match=params", "match_tolerance=0.05")


def test_matched_run_tells_its_residuals_keeps_them_and_repeats_each_row_alone(tmp_path):
    plan = bench(*MATCHED, "--dry-run", cwd=tmp_path)
    done = bench(*MATCHED, cwd=tmp_path)
    assert (plan.returncode, done.returncode) == (0, 0), done.stderr
    told = [line for line in plan.stdout.splitlines() if "| non-embedding parameters |" in line]
    assert [line.split("|")[2].strip() for line in told] == ["hgrn2", "attention", "gla"]
    assert set(told) < set(done.stderr.splitlines())
    rows = {row.model: row for row in rows_of(tmp_path / "results/local")}
    assert {row.settings["match_target"] for row in rows.values()} == {rows["hgrn2"].non_embedding_parameters}
    for row in rows.values():
        assert row.effective["match_reached"] == row.non_embedding_parameters
        assert f"{row.effective['match_residual']:+.2%}" in next(line for line in told if f" {row.model} " in line)
        assert f"{row.effective['match_residual']:+.2%}" in next(
            line for line in done.stdout.splitlines() if line.startswith(f"| {row.model} ")
        )
    assert rows["gla"].settings["d_model"] != rows["hgrn2"].settings["d_model"] == 16
    again = bench(*rows["gla"].command.removeprefix("python -m hgrn2_bench ").split(), "--results", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    ours, theirs = stable(rows_of(tmp_path / "again")), stable(r for r in rows_of(tmp_path / "results/local") if r.model == "gla")
    assert [row | {"command": ""} for row in ours] == [row | {"command": ""} for row in theirs]


def test_match_beyond_the_tolerance_is_refused_before_anything_runs(tmp_path):
    for option in ([], ["--dry-run"]):
        done = bench(*TEST, "model=hgrn2,mamba", "match=state", "mamba.d_state=16", *option, cwd=tmp_path)
        assert done.returncode == 2
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: mamba (mamba.d_state=16 as given) has 2432 bytes of state, +52.0% of the target 1600 in len16_kv2")
        assert "beyond match_tolerance=0.02" in last
        assert not (tmp_path / "results").exists()


def test_table_of_rows_beyond_their_tolerance_is_refused_and_the_rows_stay(tmp_path):
    assert bench(*MATCHED, cwd=tmp_path).returncode == 0
    paths = list(tmp_path.glob("results/local/cells/mqar/*/rows.jsonl"))
    for path in paths:
        path.write_text(path.read_text().replace('"match_tolerance": 0.05', '"match_tolerance": 0.03'))
    for words in (["table", "mqar"], MATCHED):
        done = bench(*words, cwd=tmp_path)
        assert done.returncode == 1
        assert "refused: gla has 1309 for a target of 1376, a miss of -4.87%, beyond match_tolerance=0.03" in done.stdout
        assert "tokens/s" not in done.stdout
    assert bench("table", "mqar", "--format", "jsonl", cwd=tmp_path).returncode == 0
    assert all(path.exists() for path in paths)


def test_table_without_rows_and_unknown_formats_are_refused(tmp_path):
    assert "no rows of mqar" in bench("table", "mqar", cwd=tmp_path).stderr
    bad = bench("table", "mqar", "--format", "xls", cwd=tmp_path)
    assert (bad.returncode, "Available: csv, html, jsonl, latex, md" in bad.stderr) == (2, True)


def test_published_values_come_with_a_verdict(tmp_path):
    done = bench("table", "mqar", "--published", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not comparable because" in done.stdout
    assert "HazyResearch/zoology" in done.stdout


KEPT = Path(__file__).parent.parent / "results"


def test_plot_writes_figures_with_the_same_bytes_and_says_what_it_leaves_out(tmp_path):
    pytest.importorskip("matplotlib")
    written = []
    for out in ("one", "two"):
        done = bench("plot", "mqar", "--results", KEPT, "--preset", "smoke", "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{out}/mqar_smoke_v1_float32_state.png (and .svg, .csv)\n"
        assert "note: no mqar_smoke_v1_float32_width: its rows give only d_model 64\n" in done.stderr
        written.append({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()})
    assert sorted(written[0]) == [f"mqar_smoke_v1_float32_state.{kind}" for kind in ("csv", "png", "svg")]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["mqar", "--results", "nowhere"], "no rows of mqar in nowhere: run suite=mqar first"),
        (
            ["mqar", "--results", str(KEPT), "--preset", "based"],
            f"no rows of mqar preset based in {KEPT}: run suite=mqar preset=based first",
        ),
        (["mqar", "--preset", "smoek"], "Did you mean 'smoke'?"),
        (["mqra"], "Did you mean 'mqar'?"),
        (["mqar", "--results", str(KEPT), "--out", "file/inside"], "cannot write figures to file/inside"),
    ],
)
def test_plot_refuses_bad_words_in_one_line(words, told, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("in the way")
    done = bench("plot", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_plot_without_matplotlib_is_one_line_with_the_install_command(tmp_path):
    (tmp_path / "sitecustomize.py").write_text('import sys; sys.modules["matplotlib"] = None')
    done = bench("plot", "mqar", "--results", KEPT, cwd=tmp_path, env=first_on_path(tmp_path))
    assert done.returncode == 2
    assert done.stderr == 'error: plot needs matplotlib: pip install "matplotlib>=3.8"\n'
    assert not list(tmp_path.glob("**/*.png"))


def test_data_is_the_same_for_every_model_and_every_hash_seed(tmp_path):
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed}
        bench(*TEST, "model=attention,gla,hgrn1", "--results", f"hash{seed}", cwd=tmp_path, env=env)
    rows = [row for seed in "12" for row in rows_of(tmp_path / f"hash{seed}")]
    assert len({row.cell for row in rows}) == 3
    assert len({row.data_hash for row in rows}) == 1
    assert stable(rows_of(tmp_path / "hash1")) == stable(rows_of(tmp_path / "hash2"))
