"""The cache of tokenised splits: made once, whole after a kill, checked when opened, one line when the disk is full."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hgrn2_bench.caching import folder_of, locked
from hgrn2_bench.errors import ConfigError
from suites.wikitext import arrays
from suites.wikitext.tokenizers import Bytes, Words

ROOT = Path(__file__).parents[2]
LINES = ["the cat\n", "\n", "Ünï the\n"]


def lines():
    yield LINES[:2]
    yield LINES[2:]


def never():
    raise AssertionError("made again")


def test_a_split_is_made_once_and_counted(tmp_path):
    with locked(tmp_path):
        made = arrays.stored_split(tmp_path, "test", Words(["the", "cat"]), lines)
        again = arrays.stored_split(tmp_path, "test", Words(["the", "cat"]), never)
    assert made.ids_N.tolist() == again.ids_N.tolist() == [4, 5, 2, 2, 3, 4, 2]
    assert again.lines_L3.tolist() == [[3, 3, 8], [1, 1, 1], [3, 3, 10]]
    assert (again.counted.lines, again.counted.words) == (3, 7)
    assert made.hash == again.hash
    assert again.first(0) == (7, 19)
    assert again.first(5) == (5, 9 + 10 // 3)


def test_another_tokenizer_makes_its_own_ids(tmp_path):
    arrays.stored_split(tmp_path, "test", Words(["the", "cat"]), lines)
    with pytest.warns(UserWarning, match="is damaged; it is made again"):
        assert arrays.stored_split(tmp_path, "test", Words(["cat", "the"]), lines).ids_N[0] == 5


@pytest.mark.parametrize("name", ["test.ids", "test.lines", "test.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_seen_and_made_good(tmp_path, name, damage):
    first = arrays.stored_split(tmp_path, "test", Bytes(), lines).ids_N.tolist()
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    if (name, damage) == ("test.json", "gone"):
        assert arrays.stored_split(tmp_path, "test", Bytes(), lines).ids_N.tolist() == first
        return
    with pytest.warns(UserWarning, match="is damaged; it is made again"):
        assert arrays.stored_split(tmp_path, "test", Bytes(), lines).ids_N.tolist() == first
    arrays.stored_split(tmp_path, "test", Bytes(), never)


def test_words_are_kept_and_checked(tmp_path):
    assert arrays.stored_words(tmp_path, lambda: ["b", "a"]) == ["b", "a"]
    assert arrays.stored_words(tmp_path, never) == ["b", "a"]
    path = tmp_path / "words.txt"
    path.write_bytes(b"c" + path.read_bytes()[1:])
    with pytest.warns(UserWarning, match="words.txt is damaged"):
        assert arrays.stored_words(tmp_path, lambda: ["b", "a"]) == ["b", "a"]


def test_after_a_kill_finished_splits_stay_and_the_other_is_made(tmp_path):
    source = f"""
import time
from pathlib import Path
from hgrn2_bench.caching import locked
from suites.wikitext import arrays
from suites.wikitext.tokenizers import Bytes
folder = Path({str(tmp_path)!r})
def slow():
    yield ["half\\n"] * 100_000
    print("half", flush=True)
    time.sleep(60)
with locked(folder):
    arrays.stored_split(folder, "test", Bytes(), lambda: iter([["whole\\n"]]))
    arrays.stored_split(folder, "train", Bytes(), slow)
"""
    with subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        os.kill(process.pid, signal.SIGKILL)
    assert (tmp_path / "train.ids.tmp").exists()
    with locked(tmp_path):
        assert bytes(arrays.stored_split(tmp_path, "test", Bytes(), never).ids_N) == b"whole\n"
        assert bytes(arrays.stored_split(tmp_path, "train", Bytes(), lines).ids_N).decode() == "".join(LINES)
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_kill_before_the_record_makes_the_split_again(tmp_path):
    arrays.stored_split(tmp_path, "test", Bytes(), lambda: iter([["other\n"]]))
    (tmp_path / "test.json").unlink()
    assert bytes(arrays.stored_split(tmp_path, "test", Bytes(), lines).ids_N).decode() == "".join(LINES)


def test_a_folder_is_for_one_at_a_time(tmp_path):
    source = f"""
from pathlib import Path
from hgrn2_bench.caching import locked
from suites.wikitext import arrays
with locked(Path({str(tmp_path)!r})):
    print("in", flush=True)
"""
    with locked(tmp_path):
        process = subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE)
        time.sleep(1)
        assert process.poll() is None
    with process:
        assert process.communicate(timeout=30)[0] == b"in\n"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """`/dev/full` is not a folder: a limit on the size of files stands in for a disk without room."""
    source = f"""
import resource, signal
from pathlib import Path
from hgrn2_bench.caching import locked
from suites.wikitext import arrays
from suites.wikitext.tokenizers import Bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
folder = Path({str(tmp_path)!r})
with locked(folder):
    try:
        arrays.stored_split(folder, "train", Bytes(), lambda: iter([["line\\n"] * 10_000] * 100))
    except Exception as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"ConfigError cannot write {tmp_path / 'train'}.")
    assert "File too large; make room, or set HGRN2_BENCH_CACHE" in done.stdout
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*; make room, or set HGRN2_BENCH_CACHE"), locked(tmp_path / "file" / "x"):
        pass


def test_a_key_decides_the_folder(tmp_path):
    first = folder_of(tmp_path, "text", {"a": 1, "b": 2})
    assert first == folder_of(tmp_path, "text", {"b": 2, "a": 1})
    assert first != folder_of(tmp_path, "text", {"a": 1, "b": 3})
