"""What is read from the machine: a made-up driver, a made-up nvidia-smi, folders, and the self-test's process."""

import ctypes
from pathlib import Path

import pytest

from hgrn2_bench import machine, registry
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.machine import Comparison, Driver, cache_folder, compare_on_gpu, look_at, read_driver, read_registry, self_test

UUID = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"


class MadeUpDriver:
    """libcuda with one GPU, or whose start fails with `fault`."""

    def __init__(self, fault=0, count=1):
        self.fault, self.count = fault, count

    def cuInit(self, flags):
        return self.fault

    def cuDriverGetVersion(self, version):
        version._obj.value = 12080

    def cuDeviceGetCount(self, count):
        count._obj.value = self.count

    def cuDeviceGet(self, device, index):
        device._obj.value = index

    def cuDeviceGetName(self, name, length, device):
        name.value = b"Some GPU"

    def cuDeviceTotalMem_v2(self, memory, device):
        memory._obj.value = 80_000_000_000

    def cuDeviceGetUuid(self, identity, device):
        identity._obj[:] = range(16)

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 9, 76: 0}[attribute]


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Put a driver, and a script as nvidia-smi, in place of this machine's."""

    def use(library, smi):
        monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
        monkeypatch.setenv("PATH", str(tmp_path))
        if smi:
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
            (tmp_path / "nvidia-smi").chmod(0o755)
        return read_driver()

    return use


def test_driver_and_gpu_with_their_use(driver):
    smi = f"""case $1 in
        --query-gpu=*) echo 'GPU-other, 570.86.15, 9' ; echo '{UUID}, 570.86.15, 2048' ;;
        *) echo '{UUID}, 11' ; echo 'GPU-other, 12' ; echo '{UUID}, 13' ;;
    esac"""
    found = driver(MadeUpDriver(), smi)
    assert (found.cuda, found.release, found.fault) == ((12, 8), "570.86.15", 0)
    (gpu,) = found.gpus
    assert (gpu.name, gpu.memory_bytes, gpu.capability, gpu.uuid) == ("Some GPU", 80_000_000_000, (9, 0), UUID)
    assert (gpu.used_bytes, gpu.processes) == (2048 << 20, 2)


@pytest.mark.parametrize("smi", ["", "exit 9", "echo No devices were found", f"echo '{UUID}, [N/A], [N/A]'"])
def test_nvidia_smi_may_be_missing_fail_or_not_know(driver, smi):
    (gpu,) = driver(MadeUpDriver(), smi).gpus
    assert (gpu.name, gpu.used_bytes) == ("Some GPU", 0)


def test_a_driver_that_hides_its_gpus_or_does_not_start(driver):
    assert driver(MadeUpDriver(fault=100), "") == Driver((12, 8), fault=0)
    assert driver(MadeUpDriver(fault=803), "") == Driver((12, 8), fault=803)


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert read_driver() == Driver()


def test_folders(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/kernel").write_bytes(b"x" * 1000)
    (tmp_path / "a/file").write_bytes(b"x" * 10)
    there, later, inside = (look_at(tmp_path / name, measure=True) for name in ("a", "a/new/folder", "a/file/folder"))
    assert (there.exists, there.writable, there.size_bytes) == (True, True, 1010)
    assert (later.exists, later.writable, later.size_bytes) == (False, True, 0)
    assert (inside.exists, inside.writable) == (False, False)
    assert there.free_bytes > 0
    assert not (tmp_path / "a/new").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"TRITON_CACHE_DIR": "/cache"}, "/cache"), ({"TRITON_HOME": "/home"}, "/home/.triton/cache"), ({}, "~/.triton/cache")],
)
def test_cache_folder_is_the_one_triton_takes(environment, expected):
    assert str(cache_folder(environment)) == str(Path(expected).expanduser())


def test_registry_gives_models_by_family_and_faults(monkeypatch):
    faults, models_of = read_registry()
    assert faults == ()
    assert "hgrn2" in models_of["per_channel_decay"]

    def fails():
        raise ConfigError("an intruder; uninstall it")

    monkeypatch.setattr(registry, "check_packages", fails)
    assert read_registry() == (("an intruder; uninstall it",), models_of)


def test_a_self_test_that_fails_says_how():
    lines, fault = self_test("no_such_case")
    assert lines == []
    assert fault == "its process ended with code 1: KeyError: 'no_such_case'"


def test_a_self_test_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(machine, "TEST_WITHIN_S", 0.01)
    assert self_test("softmax") == ([], "no answer within 0.01 s")


def test_cases_run_side_by_side_and_a_crash_of_one_is_told(monkeypatch):
    said = {"case": "softmax", "family": "softmax", "kernel": "k", "dtype": "float32", "error": 0.1, "tensor": "o"}
    monkeypatch.setattr(machine, "self_test", lambda case: ([said], "") if case == "softmax" else ([], "signal 11"))
    found = compare_on_gpu(["softmax", "delta_rule without decay"])
    assert found == [Comparison(**said), Comparison("delta_rule without decay", "delta_rule", "", "", fault="signal 11")]
