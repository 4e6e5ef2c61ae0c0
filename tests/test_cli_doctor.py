"""The command `doctor` as a user types it."""

import resource
import subprocess
import sys
import textwrap

import torch
from test_cli import bench, first_on_path

LIMIT_S = 10.0


def test_doctor_is_quick_without_a_gpu_and_imports_nothing_heavy(tmp_path):
    script = """
        import sys
        from hgrn2_bench.cli import main
        sys.argv = ["hgrn2_bench", "doctor"]
        try:
            main()
        except SystemExit as end:
            code = end.code
        assert not {"torch", "fla", "triton", "pandas"} & set(sys.modules)
        sys.exit(code)
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1].startswith("doctor: "), done.stderr
    problems = [line for line in done.stdout.splitlines() if line.startswith("PROBLEM")]
    assert done.returncode == bool(problems), done.stdout + done.stderr
    if not torch.cuda.is_available():
        assert problems == []
        assert "chunked agrees with reference in 10 cases" in done.stdout
        # Time of the processor: that of the clock depends on what other tests do at the same time.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < LIMIT_S
    assert list(tmp_path.iterdir()) == []


def test_doctor_fails_where_rows_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = bench("doctor", "--results", "file/results", cwd=tmp_path, timeout=600)
    assert done.returncode == 1, done.stdout
    (problem,) = [line for line in done.stdout.splitlines() if "file/results" in line]
    assert problem.startswith("PROBLEM  results folder file/results (not there yet)")
    assert problem.endswith("cannot be written to: change its permissions, or name another with --results")


def test_doctor_names_a_package_that_hides_ours_and_looks_at_the_rest_too(tmp_path):
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines/__init__.py").write_text("")
    done = bench("doctor", cwd=tmp_path, env=first_on_path(tmp_path), timeout=600)
    assert done.returncode == 1, done.stdout
    (problem,) = [line for line in done.stdout.splitlines() if "intruder" in line]
    assert problem.startswith("PROBLEM  not every model and suite can be found: package 'baselines' is ")
    assert "Python" in done.stdout
    assert bench("list", cwd=tmp_path, env=first_on_path(tmp_path)).returncode == 2
