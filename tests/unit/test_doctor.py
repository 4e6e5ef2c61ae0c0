"""Findings from made-up facts: each rule seen to fire, and to keep still."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from hgrn2_bench import doctor
from hgrn2_bench.doctor import NOTE, OK, PROBLEM, REQUIRED, Finding, findings, kernel_findings, numbers, summary
from hgrn2_bench.machine import Comparison, Driver, Facts, Folder, Gpu, TorchFacts

H100 = Gpu("NVIDIA H100 80GB HBM3", 85_000_000_000, (9, 0), "GPU-1", used_bytes=4_000_000)
VERSIONS = REQUIRED | {"triton": "3.8.0", "torch": "2.11.0"}
CPU = Facts(
    python=(3, 11, 7),
    system="Linux",
    versions=VERSIONS,
    modules=frozenset({"matplotlib", "mamba_ssm", "PIL", "pyarrow", "tokenizers"}),
    variables={},
    driver=Driver(),
    torch=TorchFacts("2.11.0", "12.8", available=False),
    torch_fault="",
    comparisons=(Comparison("softmax", "softmax", "chunked.softmax", "float32", 1e-7, "o"),),
    registry_faults=(),
    models_of={"scalar_decay": ("retnet",), "delta_rule": ("delta_net",), "softmax": ("attention",)},
)
GPU = replace(CPU, driver=Driver((12, 8), "570.86.15", gpus=(H100,)), torch=TorchFacts("2.11.0", "12.8", available=True))
ALWAYS = {"fla's chunk_hgrn", "fla's layers of HGRN2"}
"""What is noted wherever fla is installed."""


def bad(facts: Facts) -> list[Finding]:
    """All but the findings that say ok, and the notes that are always there."""
    return [each for each in findings(facts) if each.mark != OK and not any(each.text.startswith(words) for words in ALWAYS)]


def the_one(facts: Facts) -> Finding:
    (found,) = bad(facts)
    assert found.remedy
    return found


@pytest.mark.parametrize("facts", [CPU, GPU], ids=["cpu", "gpu"])
def test_a_good_machine_has_neither_problems_nor_notes_of_its_own(facts):
    assert bad(facts) == []
    assert {each.mark for each in findings(facts)} == {OK, NOTE}


@pytest.mark.parametrize(
    ("changes", "mark", "told", "remedy"),
    [
        ({"python": (3, 10, 1)}, PROBLEM, "Python 3.10.1", "3.11 or 3.12"),
        ({"python": (3, 13, 0)}, NOTE, "Python 3.13.0", "3.11 or 3.12"),
        ({"registry_faults": ("two suites are called 'a'; rename one",)}, PROBLEM, "model and suite", "rename one"),
        ({"versions": VERSIONS | {"torch": "2.7.1+cu126"}}, PROBLEM, "torch 2.7.1+cu126 is older than 2.8", 'pip install "torch>=2.8"'),
        ({"versions": VERSIONS | {"pandas": ""}}, PROBLEM, "pandas is not installed", 'pip install "pandas>=2.2"'),
        ({"variables": {"FLA_USE_FAST_OPS": "1"}}, NOTE, "FLA_USE_FAST_OPS", "unset FLA_USE_FAST_OPS"),
        ({"modules": CPU.modules - {"matplotlib"}}, NOTE, "matplotlib is not installed", "hgrn2_bench[report]"),
        ({"modules": CPU.modules - {"PIL"}}, NOTE, "pillow, pyarrow is not installed", "hgrn2_bench[lra]"),
        ({"modules": CPU.modules - {"tokenizers"}}, NOTE, "tokenizers is not installed", "hgrn2_bench[wikitext]"),
        ({"modules": CPU.modules - {"mamba_ssm"}}, NOTE, "without mamba-ssm", "never time those two layers"),
        ({"results": Folder("out", True, False, 1 << 40)}, PROBLEM, "results folder out", "--results"),
        ({"results": Folder("out", True, True, 1 << 20)}, PROBLEM, "0.0 GB free", "make room"),
        ({"results": Folder("out", True, True, 1 << 30)}, NOTE, "1.1 GB free, which is little", "make room"),
    ],
)
@pytest.mark.parametrize("facts", [CPU, GPU], ids=["cpu", "gpu"])
def test_what_is_wrong_on_any_machine(facts, changes, mark, told, remedy):
    found = the_one(replace(facts, **changes))
    assert found.mark == mark
    assert told in found.text
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"versions": {name: v for name, v in VERSIONS.items() if name != "triton"}}, "triton is not installed"),
        ({"versions": VERSIONS | {"triton": "3.2.0"}}, "triton 3.2.0 is older than 3.3"),
        ({"variables": {"TRITON_INTERPRET": "1"}}, "TRITON_INTERPRET is set"),
        ({"cache": Folder("cache", True, False, 1 << 40)}, "kernel cache cache"),
    ],
)
def test_what_only_a_gpu_needs_is_a_problem_there_and_a_note_elsewhere(changes, told):
    for facts, mark in ((CPU, NOTE), (GPU, PROBLEM)):
        found = the_one(replace(facts, **changes))
        assert (found.mark, told in found.text) == (mark, True)


def test_missing_fla_is_a_problem_on_a_gpu_only_and_unknown_elsewhere_than_on_linux():
    without = {name: version for name, version in VERSIONS.items() if name not in ("flash-linear-attention", "triton")}
    assert [each.mark for each in bad(replace(GPU, versions=without))] == [PROBLEM, PROBLEM]
    assert "or pass backend=chunked" in bad(replace(GPU, versions=without))[0].remedy
    assert [each.mark for each in bad(replace(CPU, versions=without))] == [NOTE, NOTE]
    assert bad(replace(CPU, versions=without, system="Darwin")) == []
    assert not any("fla's" in each.text for each in findings(replace(CPU, versions=without)))


@pytest.mark.parametrize(
    ("torch", "told", "remedy"),
    [
        (TorchFacts("2.11.0+cpu", "", False), "built for the CPU, but the driver shows a GPU", "CUDA build"),
        (TorchFacts("2.14.1", "13.0", False, "too old"), "the driver serves CUDA up to 12.8", "built for CUDA 12"),
        (TorchFacts("2.11.0", "12.9", False, "a reason of its own"), "cannot use the GPU (a reason of its own)", "nvidia-smi"),
        (None, "torch cannot be used (boom)", "install torch again"),
    ],
)
def test_torch_that_cannot_use_the_gpu_is_a_problem(torch, told, remedy):
    found = the_one(replace(GPU, torch=torch, torch_fault="" if torch else "boom"))
    assert found.mark == PROBLEM
    assert told in found.text
    assert remedy in found.remedy


def test_a_torch_that_is_missing_is_told_once():
    versions = {name: version for name, version in VERSIONS.items() if name != "torch"}
    found = the_one(replace(CPU, versions=versions, torch=None, torch_fault="No module named 'torch'", comparisons=()))
    assert (found.mark, found.text) == (PROBLEM, "torch is not installed")


def test_driver_without_gpus_or_that_does_not_start_is_noted():
    hidden, broken = (replace(CPU, driver=Driver((12, 8), fault=fault)) for fault in (0, 803))
    assert (the_one(hidden).mark, the_one(broken).mark) == (NOTE, NOTE)
    assert "CUDA_VISIBLE_DEVICES" in the_one(hidden).remedy
    assert "cuInit gives error 803" in the_one(broken).text


@pytest.mark.parametrize(
    ("used", "processes", "told"),
    [
        (30_000_000_000, 2, "30.0 GB taken by 2 other processes"),
        (300_000_000, 1, "0.3 GB taken by 1 other process"),
        (30_000_000_000, 0, "taken by processes that nvidia-smi does not show"),
    ],
)
def test_a_busy_gpu_is_noted(used, processes, told):
    busy = replace(GPU, driver=replace(GPU.driver, gpus=(H100, replace(H100, used_bytes=used, processes=processes))))
    found = the_one(busy)
    assert found.mark == NOTE
    assert found.text.startswith("GPU 1: NVIDIA H100 80GB HBM3, 85 GB, compute capability 9.0; busy: ")
    assert told in found.text


@pytest.mark.parametrize(
    ("triton", "capability", "refused"),
    [
        ("3.3.1", (9, 0), False),
        ("3.4.0", (9, 0), True),
        ("3.6.0+git1234", (9, 0), True),
        ("3.7.0", (9, 0), True),
        ("3.7.1", (9, 0), False),
        ("3.8.0", (9, 0), False),
        ("3.6.0", (8, 0), False),
        ("3.6.0", (10, 0), False),
    ],
)
def test_triton_that_miscompiles_a_gradient_on_hopper(triton, capability, refused):
    facts = replace(GPU, versions=VERSIONS | {"triton": triton}, driver=replace(GPU.driver, gpus=(replace(H100, capability=capability),)))
    assert bool(bad(facts)) == refused
    if refused:
        assert the_one(facts).mark == PROBLEM
        assert "(retnet, delta_net)" in the_one(facts).text
        assert 'pip install "triton>=3.7.1"' in the_one(facts).remedy
    assert bad(replace(facts, driver=Driver())) == []


@pytest.mark.parametrize(
    ("module", "variable", "capability", "expected"),
    [
        ("flash_qla", {}, (9, 0), True),
        ("flash_qla", {"FLA_FLASH_QLA": "1"}, (10, 0), True),
        ("flash_qla", {"FLA_FLASH_QLA": "0"}, (9, 0), False),
        ("flash_qla", {}, (8, 0), False),
        ("tilelang", {}, (9, 0), True),
        ("tilelang", {"FLA_TILELANG": "0"}, (9, 0), False),
        ("tilelang", {}, (8, 9), False),
    ],
)
def test_packages_to_which_fla_would_hand_its_kernels(module, variable, capability, expected):
    driver = replace(GPU.driver, gpus=(replace(H100, capability=capability),))
    facts = replace(GPU, modules=GPU.modules | {module}, variables=variable, driver=driver)
    assert bool(bad(facts)) == expected
    if expected:
        assert the_one(facts).mark == NOTE
        assert the_one(facts).remedy.endswith("=0")


def comparison(error=1e-4, dtype="float32", fault="", case="delta_rule without decay"):
    return Comparison(case, case.partition(" ")[0], "fla.chunk_delta_rule", dtype, error, "dv_BTHV", fault)


def test_kernels_that_agree_on_a_gpu_get_a_line_a_case_with_the_worst_error():
    given = [comparison(4e-3), comparison(1.5e-2, "bfloat16"), comparison(1e-3, case="softmax")]
    first, second = kernel_findings(given, GPU, "cuda")
    assert str(first) == (
        "ok       delta_rule without decay: fla.chunk_delta_rule agrees with reference, "
        "worst relative error 4.0e-03 in float32, 1.5e-02 in bfloat16"
    )
    assert (second.mark, second.text[:8]) == (OK, "softmax:")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (comparison(6e-3), "is off by 0.006 in dv_BTHV (relative; at most 0.005)"),
        (comparison(3e-2, "bfloat16"), "fla.chunk_delta_rule in bfloat16 is off by 0.03"),
        (comparison(float("inf")), "is off by inf"),
        (comparison(float("nan")), "is off by nan"),
        (comparison(fault="RuntimeError: no kernel image"), "fla.chunk_delta_rule float32 RuntimeError: no kernel image"),
    ],
)
def test_a_kernel_that_is_wrong_is_a_problem_which_names_the_models(given, told):
    (found,) = kernel_findings([comparison(), given], GPU, "cuda")
    assert found.mark == PROBLEM
    assert told in found.text
    assert "1e-04" not in found.text  # the dtype that is right
    assert "no run of delta_net here" in found.remedy
    assert "backend=chunked" in found.remedy


def test_on_a_cpu_one_line_tells_of_all_that_agree_and_the_tolerance_is_strict():
    given = [comparison(1e-7), comparison(1e-6, case="softmax"), comparison(1e-3, case="scalar_decay")]
    given = [replace(each, kernel=f"chunked.{each.family}") for each in given]
    wrong, right = kernel_findings(given, CPU, "cpu")
    assert (wrong.mark, right.mark) == (PROBLEM, OK)
    assert wrong.text.startswith("scalar_decay: ")
    assert "another version of torch" in wrong.remedy
    assert right.text == "chunked agrees with reference in 2 cases, forward and backward, worst relative error 1.0e-06 in float32"


def test_a_self_test_that_ended_early_is_a_problem():
    found = the_one(replace(CPU, torch_fault="its process ended with signal 11"))
    assert (found.mark, "signal 11" in found.text) == (PROBLEM, True)


def test_every_finding_is_one_line_and_all_but_ok_name_a_remedy():
    for facts in (CPU, replace(GPU, variables={"TRITON_INTERPRET": "1"})):
        for each in findings(facts):
            assert (each.mark == OK) == (not each.remedy)
            assert len(str(each).splitlines()) == 1


def test_the_summary_counts():
    assert summary([Finding(OK, "a"), Finding(NOTE, "b", "c")]) == "doctor: no problem, 1 note, 1 ok"
    assert summary([Finding(PROBLEM, "a", "b")] * 2 + [Finding(OK, "c")]) == "doctor: 2 PROBLEMs, 0 notes, 1 ok"


@pytest.mark.parametrize(("gpu", "error", "well"), [(False, 0.0, True), (True, 1e-3, True), (True, 1.0, False)])
def test_examine_compares_on_a_gpu_and_says_whether_all_is_well(monkeypatch, capsys, gpu, error, well):
    monkeypatch.setattr(doctor, "gather", lambda results, names: GPU if gpu else CPU)
    monkeypatch.setattr(doctor, "compare_on_gpu", lambda cases: [comparison(error)])
    assert doctor.examine(Path("out")) == well
    printed = capsys.readouterr().out
    assert ("fla.chunk_delta_rule" in printed) == gpu
    assert printed.splitlines()[-1].startswith("doctor: no problem" if well else "doctor: 1 PROBLEM, ")


def test_oldest_versions_are_those_of_pyproject():
    lines = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split("[>=]", line)[0]: re.search(r">=([\d.]+)", line)[1] for line in lines} == REQUIRED


@pytest.mark.parametrize(
    ("version", "expected"), [("2.14.1+cu130", (2, 14, 1)), ("3.7.0.post1", (3, 7, 0)), ("3.8.0rc1", (3, 8)), ("13", (13,))]
)
def test_numbers_of_a_version(version, expected):
    assert numbers(version) == expected
