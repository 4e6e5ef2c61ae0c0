"""The cache of generated data: the same arrays however they were made, whole files only, nothing made twice, damage made good."""

import functools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from suites.lra import shards
from suites.lra.shards import Source, generate, path_of

ROOT = Path(__file__).parents[2]


def make(log, pause_s, items):
    """Item i: an image of i's, a label, and i mod 3 tokens; notes each call."""
    with log.open("a") as file:
        file.write(f"{items.start}-{items.stop}\n")
    time.sleep(pause_s)
    numbers = np.arange(items.start, items.stop)
    images = np.broadcast_to(numbers[:, None, None], (len(items), 4, 5)).astype(np.uint8)
    return {"images": images, "labels": (numbers % 2).astype(np.uint8), "tokens": np.repeat(numbers, numbers % 3)}


def source(folder, pause_s=0.0, shard=10, **key):
    return Source("items", {"seed": 0, **key}, functools.partial(make, folder / "log", pause_s), shard)


def calls(folder):
    return sorted((folder / "log").read_text().split())


def files(folder, given):
    return sorted(path.name for path in given.folder(folder).glob("*.npz*"))


def check(arrays, items):
    want = make(Path(os.devnull), 0, items)
    assert arrays.keys() == want.keys()
    for name, array in want.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize(("shard", "workers"), [(10, 1), (7, 1), (100, 1), (10, 2)])
def test_arrays_do_not_depend_on_shards_or_workers(tmp_path, shard, workers):
    check(generate(tmp_path, source(tmp_path, shard=shard), range(35), workers), range(35))
    check(generate(tmp_path, source(tmp_path, shard=shard), range(12, 31), workers), range(12, 31))


def test_what_is_there_is_not_made_again_and_progress_says_what_is_there(tmp_path):
    seen = []
    generate(tmp_path, source(tmp_path), range(20), progress=lambda *each: seen.append(each))
    generate(tmp_path, source(tmp_path), range(35), progress=lambda *each: seen.append(each))
    generate(tmp_path, source(tmp_path), range(35), progress=lambda *each: seen.append(each))
    assert calls(tmp_path) == ["0-10", "10-20", "20-30", "30-35"]
    assert seen == [(10, 20), (20, 20), (30, 35), (35, 35)]


def test_every_key_has_a_folder_of_its_own_which_says_the_key(tmp_path):
    first, second = source(tmp_path), source(tmp_path, depth=6)
    assert first.folder(tmp_path) != second.folder(tmp_path) == source(tmp_path, depth=6).folder(tmp_path)
    generate(tmp_path, second, range(5))
    assert (second.folder(tmp_path) / "key.json").read_text() == '{\n "depth": 6,\n "seed": 0\n}'


def remade(tmp_path, given):
    with pytest.warns(UserWarning, match=r"000000010-000000020\.npz is damaged; it is made again"):
        check(generate(tmp_path, given, range(20)), range(20))
    assert calls(tmp_path).count("10-20") == 2
    check(generate(tmp_path, given, range(20)), range(20))


@pytest.mark.parametrize("damage", [lambda content: content[:-30], lambda content: content[:40], lambda content: b""])
def test_a_truncated_shard_is_made_again_with_a_warning(tmp_path, damage):
    given = source(tmp_path)
    generate(tmp_path, given, range(20))
    path = path_of(given.folder(tmp_path), range(10, 20))
    path.write_bytes(damage(path.read_bytes()))
    remade(tmp_path, given)


@pytest.mark.parametrize(("key", "shard"), [({"depth": 6}, range(10, 20)), ({}, range(10))])
def test_a_shard_of_another_key_or_range_is_made_again(tmp_path, key, shard):
    given, other = source(tmp_path), source(tmp_path / "other", **key)
    (tmp_path / "other").mkdir()
    generate(tmp_path, given, range(20))
    generate(tmp_path / "other", other, shard)
    path = path_of(given.folder(tmp_path), range(10, 20))
    path.write_bytes(path_of(other.folder(tmp_path / "other"), shard).read_bytes())
    remade(tmp_path, given)


def test_a_flipped_byte_is_noticed_wherever_it_is(tmp_path):
    given, shard = source(tmp_path), range(0, 10)
    generate(tmp_path, given, shard)
    path = path_of(given.folder(tmp_path), shard)
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        assert shards._read(given.folder(tmp_path), shard) is None


def test_a_failing_generator_passes_through_and_finished_shards_stay(tmp_path):
    def broken(items):
        if items.start == 20:
            raise ZeroDivisionError("item 20")
        return make(tmp_path / "log", 0, items)

    with pytest.raises(ZeroDivisionError, match="item 20"):
        generate(tmp_path, Source("items", {"seed": 0}, broken, 10), range(40))
    check(generate(tmp_path, source(tmp_path), range(40)), range(40))
    assert calls(tmp_path) == ["0-10", "10-20", "20-30", "30-40"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_that_names_the_file_and_leaves_nothing_half_written(tmp_path, workers):
    given = Source("items", {"seed": 0}, noise, 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))  # children inherit it
    try:
        with pytest.raises(OSError, match=r"^\[Errno 27\] File too large: '.*/000000\d00-000000\d00\.npz'$"):
            generate(tmp_path, given, range(100 * workers), workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path, given) == []
    assert len(generate(tmp_path, given, range(100))["noise"]) == 100


def noise(items):
    return {"noise": np.random.default_rng(items.start).integers(256, size=(len(items), 100), dtype=np.uint8)}


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_shards import check, generate, source
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    check(generate(folder, source(folder, float(sys.argv[3])), range(60), int(sys.argv[2])), range(60))
"""


def start(tmp_path, workers, pause_s):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent)))
    words = [sys.executable, str(script), str(tmp_path), str(workers), str(pause_s)]
    return subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)


def test_a_killed_run_leaves_whole_shards_and_no_process_and_the_next_makes_the_rest(tmp_path):
    given, run = source(tmp_path), start(tmp_path, 2, 0.3)
    while len(files(tmp_path, given)) < 2:
        assert run.poll() is None
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # its children die with it: nobody is left in its session
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("a child outlives its parent")
    begun, kept = calls(tmp_path), [name for name in files(tmp_path, given) if name.endswith(".npz")]  # a kill may leave half a file too
    (given.folder(tmp_path) / f"{path_of(given.folder(tmp_path), range(50, 60)).name}.tmp1").write_bytes(b"half")
    check(generate(tmp_path, given, range(60)), range(60))
    assert len(kept) < 6
    assert len(calls(tmp_path)) == len(begun) + 6 - len(kept)
    assert len(files(tmp_path, given)) == 6  # the half-written file is gone


def test_processes_that_share_a_folder_share_the_work(tmp_path):
    for run in [start(tmp_path, workers, 0.2) for workers in (1, 1)]:
        assert run.wait(timeout=60) == 0
    assert calls(tmp_path) == [f"{i}-{i + 10}" for i in range(0, 60, 10)]


def test_a_daemonic_process_makes_its_shards_itself(tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=generate, args=(tmp_path, source(tmp_path), range(30), 2), daemon=True)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert len(files(tmp_path, source(tmp_path))) == 3
