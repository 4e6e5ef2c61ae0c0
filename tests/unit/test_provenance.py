"""What is known of the machine without torch."""

import os

import pytest

from hgrn2_bench import provenance

SMI = """#!/bin/sh
case $1 in
    --query-gpu=*) echo 'GPU-11, 580.1, 345, 1980, 1593, 700.00, 30, 0' ; echo 'GPU-22, 580.1, 1980, 1980, 2619, 700.00, 55, 97' ;;
    *) echo 'GPU-22, 11' ; echo 'GPU-22, 13' ;;
esac
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Put a made-up nvidia-smi first in the path."""

    def put(text):
        (tmp_path / "nvidia-smi").write_text(text)
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return put


def test_a_gpu_s_state_is_that_of_the_gpu_asked_for(smi):
    smi(SMI)
    quiet, busy = provenance.gpu_state("11"), provenance.gpu_state("22")
    assert (quiet["driver_version"], quiet["clocks.sm"], quiet["power.limit"], quiet["processes"]) == ("580.1", "345", "700.00", "0")
    assert (busy["clocks.sm"], busy["utilization.gpu"], busy["processes"]) == ("1980", "97", "2")


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 9\n", "#!/bin/sh\necho nonsense\n"])
def test_what_nvidia_smi_does_not_tell_is_left_out(smi, text):
    smi(text)
    assert provenance.gpu_state("11") == {}


def test_the_processor_has_a_name():
    assert provenance.device_name("cpu")
    assert "\n" not in provenance.device_name("cpu")


def test_no_gpu_is_called_none(monkeypatch):
    provenance.device_name.cache_clear()
    monkeypatch.setattr(provenance, "cuda_devices", lambda: 0)
    assert provenance.device_name("cuda") == "none"
    provenance.device_name.cache_clear()
