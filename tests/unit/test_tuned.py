"""Shipped choices: when they are used, how they are made, and that fla's own loader finds them."""

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest
import triton
import triton.language as tl
from triton.runtime.autotuner import Autotuner

from hgrn2_bench.ops import autotune, fla, tuned

HERE = {"gpu": "Made-up GPU 9000 (80GB)", "fla": "0.6.0", "triton": "3.8.0"}
FLOATS = ("torch.float32", "torch.bfloat16")


def config(block, warps=4):
    return triton.Config({"B": block}, num_warps=warps)


def tuner(configs, name="some_kernel", keys=("D",), prune=None):
    """A kernel of a given name with these configurations, on Triton's own autotuner."""

    def kernel(x, D, B: tl.constexpr):
        pass

    kernel.__name__ = name
    pruning = prune and {"early_config_prune": prune}
    return Autotuner(triton.jit(kernel), ["x", "D", "B"], configs, list(keys), None, None, prune_configs_by=pruning)


def finished(cache, timings, key=(64, *FLOATS), kernel="some_kernel"):
    """A finished tuning as Triton leaves it in its cache folder."""
    folder = cache / f"HASH{len(list(cache.iterdir()))}"
    folder.mkdir()
    content = [[vars(each), [ms, ms / 2, ms * 2]] for each, ms in timings.items()]
    (folder / f"{kernel}.autotune.json").write_text(json.dumps({"key": list(key), "configs_timings": content}))


def chosen(cache, *tuners):
    best, left_out = tuned.choose(tuned.timings(cache), tuners)
    return {(kernel, key[0]): found.kwargs["B"] for kernel, choices in best.items() for key, found in choices.items()}, left_out


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of choices for the made-up GPU, in a package that holds no other, and an environment without fla's variables."""
    for name in (*tuned.VARIABLES, "HGRN2_BENCH_TUNING"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever the code under test sets
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "fla", raising=False)
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "tuned")
    monkeypatch.setattr(tuned, "installed", lambda: dict(HERE))
    folder = tmp_path / "tuned" / "Made_up_GPU_9000_80GB"
    tuned.write({"some_kernel": {(64, *FLOATS): config(32)}}, folder)
    return folder


def environment():
    return {name: os.environ[name] for name in tuned.VARIABLES if name in os.environ}


def test_choices_of_this_gpu_are_named_to_fla_and_told_in_the_row(shipped):
    tuned.point()
    assert environment() == {"FLA_CONFIG_DIR": str(shipped), "FLA_CACHE_MODE": "strict"}
    assert tuned.thoroughness() == "tuned for Made-up GPU 9000 (80GB), else 4 configurations a kernel"
    tuned.point()  # a child process inherits the environment
    assert tuned.in_use() == shipped


@pytest.mark.parametrize(("name", "value"), [("gpu", "Other GPU"), ("gpu", "Made-up GPU 9000 80GB"), ("fla", "0.7.0"), ("triton", "3.9.0")])
def test_choices_made_elsewhere_are_not_used(name, value, shipped, monkeypatch):
    monkeypatch.setattr(tuned, "installed", lambda: HERE | {name: value})
    tuned.point()
    assert environment() == {}
    assert tuned.thoroughness() == "4 configurations a kernel"


def test_nothing_is_told_that_came_too_late(shipped, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", object())
    tuned.point()
    assert environment() == {}
    assert tuned.thoroughness() == "4 configurations a kernel"


def test_full_tuning_uses_no_choices(shipped, monkeypatch):
    monkeypatch.setenv("HGRN2_BENCH_TUNING", "full")
    tuned.point()
    assert environment() == {}
    assert tuned.thoroughness() == "full"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"FLA_CONFIG_DIR": "/mine", "FLA_CACHE_MODE": "fuzzy"}, "FLA_CONFIG_DIR /mine, FLA_CACHE_MODE fuzzy"),
        ({"FLA_CONFIG_DIR": "/mine"}, "FLA_CONFIG_DIR /mine"),
        ({"FLA_CACHE_MODE": "disabled"}, "FLA_CACHE_MODE disabled"),
    ],
)
def test_what_the_user_sets_stands_and_is_told(given, told, shipped, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    kernel = tuner([config(16), config(32)])
    monkeypatch.setattr(autotune, "autotuners", lambda: iter([kernel]))
    tuned.point()
    tuned.fill()
    assert environment() == given
    assert tuned.thoroughness() == f"{told}, else 4 configurations a kernel"
    assert kernel.cache == {}


def test_kernels_on_tritons_own_autotuner_get_the_choices_too(shipped, monkeypatch):
    same, other = tuner([config(16), config(32)]), tuner([config(16), config(64)])
    monkeypatch.setattr(autotune, "autotuners", lambda: iter([same, other]))
    tuned.fill()
    assert same.cache == {}  # nothing points to the folder yet
    tuned.point()
    tuned.fill()
    assert same.cache == {(64, *FLOATS): config(32)}
    assert other.cache == {}  # of the same name, without this configuration


def test_the_fastest_of_all_configurations_is_chosen_for_each_key(tmp_path):
    kernel = tuner([config(16), config(32), config(64)])
    finished(tmp_path, {config(16): 3.0, config(32): 1.0, config(64): 2.0})
    finished(tmp_path, {config(16): 3.0, config(32): float("inf"), config(64): 4.0}, key=(128, *FLOATS))
    finished(tmp_path, {config(16): 3.0, config(32): 1.5, config(64): 0.5})  # the first key, timed once more
    assert chosen(tmp_path, kernel) == ({("some_kernel", 64): 64, ("some_kernel", 128): 16}, [])


def test_tunings_that_did_not_try_all_are_refused(tmp_path):
    kernel = tuner([config(16), config(32), config(64)])
    finished(tmp_path, {config(16): 3.0, config(64): 2.0})
    finished(tmp_path, {config(16): 3.0, config(32): 2.0}, kernel="unknown_kernel")
    found, left_out = chosen(tmp_path, kernel)
    assert found == {}
    assert [line.partition(" ")[0] for line in left_out] == ["some_kernel", "unknown_kernel"]
    assert "2 configurations are not all that it admits" in left_out[0]


def test_all_means_all_that_the_kernel_admits_at_the_key(tmp_path):
    kernel = tuner(
        [config(16), config(32), config(64)], prune=lambda configs, nargs, **_: [c for c in configs if c.kwargs["B"] < nargs["D"]]
    )
    finished(tmp_path, {config(16): 3.0, config(32): 2.0})
    finished(tmp_path, {config(16): 3.0, config(32): 2.0}, key=(128, *FLOATS))
    found, left_out = chosen(tmp_path, kernel)
    assert found == {("some_kernel", 64): 32}
    assert len(left_out) == 1
    assert "[128," in left_out[0]


def test_a_key_that_two_kernels_of_one_name_share_is_left_out(tmp_path):
    kernels = tuner([config(16), config(32)]), tuner([config(64), config(128)])
    for _ in range(2):
        finished(tmp_path, {config(16): 3.0, config(32): 2.0})
        finished(tmp_path, {config(64): 3.0, config(128): 2.0})
    finished(tmp_path, {config(16): 3.0, config(32): 2.0}, key=(128, *FLOATS))
    found, left_out = chosen(tmp_path, *kernels)
    assert found == {("some_kernel", 128): 32}
    assert len(left_out) == 1
    assert "two kernels of this name" in left_out[0]


def test_files_say_what_they_were_made_with(shipped):
    made = json.loads((shipped / "made_with.json").read_text())
    assert made.pop("date")[:2] == "20"
    assert made == HERE
    assert json.loads((shipped / "some_kernel.json").read_text())["triton_version"] == "3.8.0"


def test_writing_leaves_no_file_made_before(shipped):
    tuned.write({"other_kernel": {(64, *FLOATS): config(32)}}, shipped)
    assert sorted(path.name for path in shipped.iterdir()) == ["made_with.json", "other_kernel.json"]


@pytest.mark.parametrize("tried", [(16, 32), (16,)])
def test_the_maker_writes_the_folder_of_this_gpu_or_says_why_not(tried, shipped, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fla, "load_all", lambda: None)
    monkeypatch.setattr(autotune, "autotuners", lambda: iter([tuner([config(16), config(32)])]))
    monkeypatch.setattr(sys, "argv", ["tuned", str(tmp_path / "cache")])
    (tmp_path / "cache").mkdir()
    finished(tmp_path / "cache", {config(block): 1.0 / block for block in tried}, key=(128, *FLOATS))
    if len(tried) == 1:
        with pytest.raises(SystemExit, match="2"):
            tuned.main()
        assert "tried all configurations" in capsys.readouterr().err
        return
    tuned.main()
    assert f"1 choices of 1 kernels in {shipped}; 0 tunings left out" in capsys.readouterr().out
    (entry,) = json.loads((shipped / "some_kernel.json").read_text())["autotune_entries"].values()
    assert (entry["autotune_key"][0], entry["config"]["kwargs"]) == (128, {"B": 32})


def test_making_needs_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tuned, "installed", lambda: HERE | {"gpu": "cpu"})
    monkeypatch.setattr(sys, "argv", ["tuned", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        tuned.main()
    assert "torch sees no GPU" in capsys.readouterr().err


FLAS_OWN = """
    import json, sys
    from pathlib import Path
    from hgrn2_bench.ops import autotune, fla, tuned

    cache, folder = map(Path, sys.argv[1:])
    fla.load_all()
    from fla.ops.utils import cache as flas

    kernels = {tuner.base_fn.__name__: tuner for tuner in autotune.autotuners()}
    kernel, plain = kernels["chunk_gla_bwd_kernel_dv"], kernels["layer_norm_fwd_kernel"]
    key = (64, False, 32, 64, "torch.bfloat16", "torch.float32")
    admitted = kernel.early_config_prune(kernel.configs, {"K": 32, "V": 64})
    best = admitted[5]
    assert len(admitted) < len(kernel.configs)

    def finished(name, key, configs, best):
        (cache / name).mkdir(parents=True)
        timings = [[vars(each), [0.1 if each == best else 0.2] * 3] for each in configs]
        (cache / name / f"{name}.autotune.json").write_text(json.dumps({"key": key, "configs_timings": timings}))

    norm = (64, 10, False, False, True, "torch.float32")
    finished("chunk_gla_bwd_kernel_dv", key, admitted, best)
    finished("layer_norm_fwd_kernel", norm, plain.configs, plain.configs[3])
    finished("chunk_gla_fwd_kernel_o", key, kernels["chunk_gla_fwd_kernel_o"].configs[:4], plain.configs[0])
    chosen, left_out = tuned.choose(tuned.timings(cache), list(autotune.autotuners()))
    tuned.write(chosen, folder)

    asked = flas.AutotuneKey(key)
    assert flas.KernelConfigFile.from_file(folder / "chunk_gla_bwd_kernel_dv.json").lookup_exact(asked) is not None
    assert flas.load_cached_config("chunk_gla_bwd_kernel_dv", flas.AutotuneKey((128, *key[1:]))) is None
    kernel.maybe_load_cached_config(asked, {"K": 32, "V": 64}, {})
    assert kernel.cache == {key: best}, kernel.cache
    tuned.SHIPPED = folder.parent
    tuned.fill()
    assert plain.cache == {norm: plain.configs[3]}, plain.cache
    assert "chunk_gla_fwd_kernel_o" in left_out[0] and len(left_out) == 1
    print(tuned.thoroughness())
"""


@pytest.mark.skipif(find_spec("fla") is None, reason="flash-linear-attention is not installed (it exists for Linux only)")
def test_flas_own_loader_finds_what_was_made(tmp_path):
    cache, folder = tmp_path / "cache", tmp_path / "tuned" / "cpu"
    env = os.environ | {"FLA_CONFIG_DIR": str(folder), "FLA_CACHE_MODE": "strict", "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("HGRN2_BENCH_TUNING", None)
    command = [sys.executable, "-c", textwrap.dedent(FLAS_OWN), str(cache), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tuned for ")


def test_a_kernel_whose_key_does_not_tell_what_it_admits_gets_no_choice(tmp_path):
    def prune(configs, nargs, **_):
        return configs if nargs["absent"] else configs[:1]

    finished(tmp_path, {config(16): 3.0, config(32): 2.0})
    assert chosen(tmp_path, tuner([config(16), config(32)], prune=prune))[0] == {}


def test_a_machine_without_fla_has_no_choices(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert tuned.installed()["fla"] == "not installed"
