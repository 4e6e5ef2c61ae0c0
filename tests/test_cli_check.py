"""The commands `check` and `compare` as a user types them: what they print, what they refuse, and their exit codes."""

import pytest
from test_cli import TEST, bench
from test_cli_failures import BAD_MIXERS


def test_check_prints_a_line_per_check_and_its_exit_code_says_whether_all_passed(tmp_path):
    (tmp_path / "mine.py").write_text(BAD_MIXERS)
    few = (
        "train_examples=64",
        "validation_examples=64",
        "test_examples=64",
        "d_model=16",
    )  # so few that nobody learns: no fault of the mixer's
    good = bench("check", "./mine.py:Good", *few, "Good.width=4", cwd=tmp_path)
    assert good.returncode == 0, good.stdout
    outcomes = {line[:13].strip(): line[13:22].strip() for line in good.stdout.splitlines()[:-1]}
    assert [name for name, outcome in outcomes.items() if outcome == "skipped"] == ["padding", "backends", "FLOPs", "learning"]
    assert set(outcomes.values()) == {"pass", "skipped"}
    assert good.stdout.splitlines()[-1] == "Good: all is well; 12 checks passed, 4 skipped"
    bad = bench("check", "./mine.py:NotANumber", *few, cwd=tmp_path)
    assert bad.returncode == 1, bad.stderr
    assert "learning     FAIL     diverged after 1 steps of len16_kv3: loss nan at step 1 of 2" in bad.stdout
    assert "parameters   pass" in bad.stdout
    assert "checks FAILED (shape, gradients, causality" in bad.stdout.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["mine.py"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hgnr2"], "Did you mean 'hgrn2'?"),
        (["./missing.py:Net"], "no file ./missing.py"),
        (["hgrn2", "d_model=32,64"], "one setting at a time"),
        (["hgrn2", "d_modle=32"], "Did you mean 'd_model'?"),
        (["hgrn2", "--device", "tpu"], "Unknown device 'tpu'"),
        (["./broken.py:Net"], "cannot import it: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_check_refuses_bad_words_and_unreadable_files_in_one_line(words, told, tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_package\n\nclass Net: ...\n")
    done = bench("check", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_compare_prints_a_table_and_a_sentence_for_rows_in_common(tmp_path):
    ran = bench(*TEST, "model=hgrn2,gla", "seed=0,1", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    done = bench("compare", "hgrn2", "gla", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "**mqar, preset test: hgrn2 against gla, accuracy" in done.stdout
    assert (
        "hgrn2 is better than gla (higher accuracy) on 0 of 1 mqar task; neither learned on 1 (len16_kv2)" in done.stdout.splitlines()[-2]
    )
    for words, told in (
        (["hgrn2", "mmaba"], "Did you mean 'mamba'?"),
        (["hgrn2", "mamba"], "hgrn2 has mqar test len16_kv2 (seeds 0, 1); mamba has no rows"),
        (["hgrn2", "gla", "--preset", "smoke"], "hgrn2 has no rows; gla has no rows"),
    ):
        bad = bench("compare", *words, cwd=tmp_path)
        assert (bad.returncode, bad.stdout) == (2, ""), bad.stdout
        assert told in bad.stderr
        assert len(bad.stderr.strip().splitlines()) == 1
