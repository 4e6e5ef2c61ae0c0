"""What on this machine would make runs fail or numbers wrong, with the remedy: facts in, findings out.

`hgrn2_bench.machine` gathers the facts; here nothing is asked of the machine, so that every rule can be tried with made-up facts.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hgrn2_bench.machine import Comparison, Facts, Folder, Gpu, compare_on_gpu, gather

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
GB = 1e9
REQUIRED = {
    "torch": "2.8",
    "triton": "3.3",
    "flash-linear-attention": "0.6",
    "numpy": "1.26",
    "hydra-core": "1.3.2",
    "omegaconf": "2.3",
    "typer": "0.15",
    "rich": "13",
    "pandas": "2.2",
    "scipy": "1.13",
    "tabulate": "0.9",
    "safetensors": "0.4.3",
}
"""The oldest version of each dependency, as pyproject.toml has them."""
TESTED_PYTHON = ((3, 11), (3, 12))
KERNEL_PACKAGES = ("triton", "flash-linear-attention")
"""Needed on a GPU only, and made for Linux only."""
HOPPER = 9
REFUSING_TRITON = ((3, 4), (3, 7, 1))
"""From, and up to but not including: on Hopper fla 0.6 refuses the gradient of a decay per head, which these miscompile."""
QLA_GPUS = ((9, 0), (10, 0), (10, 3), (12, 0))
"""Compute capabilities for which fla 0.6 would hand the gated delta rule to flash_qla."""
TOLERANCES = {
    ("cuda", "float32"): 5e-3,  # products may run in TF32
    ("cuda", "bfloat16"): 2e-2,
    ("cpu", "float32"): 1e-4,
    ("cpu", "bfloat16"): 2e-2,
}
"""Largest relative error of an output or a gradient, by device and dtype."""
BUSY_BYTES = 1e9
"""Memory taken on an idle GPU is less."""
LEAST_FREE, LITTLE_FREE = 0.2 * GB, 5 * GB
OPTIONAL = {
    "matplotlib": (("matplotlib",), "plot draws figures", "report"),
    "pillow, pyarrow": (("PIL", "pyarrow"), "suites read images and parquet files", "lra"),
    "tokenizers": (("tokenizers",), "suite wikitext reads GPT-2's BPE", "wikitext"),
}
"""Packages with the modules they are, what they add, and the extra that installs them."""
UNUSED = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "flash_attn": "flash-attn"}
"""Kernel packages that nothing here calls, by module."""


@dataclass(frozen=True)
class Finding:
    """One thing found; all but OK say what to do."""

    mark: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        """One line."""
        return f"{self.mark:<9}{self.text}" + (f": {self.remedy}" if self.remedy else "")


def examine(results: Path) -> bool:
    """Look at everything and print a line for each finding; whether there was no problem."""
    began = time.monotonic()
    facts = gather(results, tuple(REQUIRED))
    found = list(findings(facts))
    print(*found, sep="\n", flush=True)
    if facts.torch is not None and facts.torch.available and facts.driver.gpus:
        print("comparing kernels; the first time they are compiled, for a minute or two", file=sys.stderr)
        compared = list(kernel_findings(compare_on_gpu(facts.torch.cases), facts, "cuda"))
        print(*compared, sep="\n")
        found += compared
    print(f"{summary(found)} ({time.monotonic() - began:.0f} s)")
    return all(each.mark != PROBLEM for each in found)


def summary(found: Sequence[Finding], title: str = "doctor") -> str:
    """How many findings of each kind."""
    counts = {mark: sum(each.mark == mark for each in found) for mark in (PROBLEM, NOTE, OK)}
    problems = counted(counts[PROBLEM], PROBLEM) if counts[PROBLEM] else "no problem"
    return f"{title}: {problems}, {counted(counts[NOTE], 'note')}, {counts[OK]} ok"


def counted(number: int, what: str, ending: str = "s") -> str:
    """`1 note`, `2 notes`."""
    return f"{number} {what}{ending if number != 1 else ''}"


def findings(facts: Facts) -> Iterator[Finding]:
    """All that follows from the facts; the comparisons on a GPU are judged by `kernel_findings` when they are there."""
    yield from python_findings(facts)
    yield from library_findings(facts)
    yield from gpu_findings(facts)
    yield from torch_findings(facts)
    yield from combination_findings(facts)
    yield from environment_findings(facts)
    yield from package_findings(facts)
    yield from folder_findings(facts)
    yield from kernel_findings(facts.comparisons, facts, "cpu")


def python_findings(facts: Facts) -> Iterator[Finding]:
    """The interpreter, and the packages that must lie beside this one."""
    text = f"Python {'.'.join(map(str, facts.python))} on {facts.system}"
    if facts.python[:2] < TESTED_PYTHON[0]:
        yield Finding(PROBLEM, text, "install Python 3.11 or 3.12")
    elif facts.python[:2] not in TESTED_PYTHON:
        yield Finding(NOTE, text, "not tested here; if something fails, try Python 3.11 or 3.12")
    else:
        yield Finding(OK, text)
    for fault in facts.registry_faults:
        yield Finding(PROBLEM, "not every model and suite can be found", fault)


def library_findings(facts: Facts) -> Iterator[Finding]:
    """Dependencies: missing, too old, or as they should be. Without a GPU the kernel packages may be missing."""
    well = []
    for name, least in REQUIRED.items():
        version = facts.versions.get(name, "")
        if version and numbers(version) >= numbers(least):
            well.append(f"{name} {version}")
            continue
        if name in KERNEL_PACKAGES and facts.system != "Linux":
            continue
        text = f"{name} {version} is older than {least}" if version else f"{name} is not installed"
        if name in KERNEL_PACKAGES and not facts.driver.gpus:
            yield Finding(NOTE, text, f'without a GPU nothing needs it; on one: pip install "{name}>={least}"')
        elif name in KERNEL_PACKAGES:
            yield Finding(PROBLEM, text, f'runs on the GPU need it: pip install "{name}>={least}", or pass backend=chunked')
        else:
            yield Finding(PROBLEM, text, f'pip install "{name}>={least}"')
    yield Finding(OK, ", ".join(well))


def gpu_findings(facts: Facts) -> Iterator[Finding]:
    """The driver and each GPU."""
    driver = facts.driver
    if driver.cuda is None:
        yield Finding(OK, "no NVIDIA driver: runs use the CPU")
        return
    text = f"NVIDIA driver {driver.release or 'of unknown release'}, up to CUDA {dotted(driver.cuda)}"
    if driver.fault:
        remedy = "see whether nvidia-smi works; a driver updated without a reboot, or a container without the GPU, gives this"
        yield Finding(NOTE, f"{text}, does not start (cuInit gives error {driver.fault}): runs use the CPU", remedy)
        return
    yield Finding(OK, text)
    if not driver.gpus:
        yield Finding(NOTE, "the driver shows no GPU: runs use the CPU", "see CUDA_VISIBLE_DEVICES, and the GPUs given to this container")
    for number, gpu in enumerate(driver.gpus):
        yield _one_gpu(number, gpu)


def _one_gpu(number: int, gpu: Gpu) -> Finding:
    text = f"GPU {number}: {gpu.name}, {gpu.memory_bytes / GB:.0f} GB, compute capability {dotted(gpu.capability)}"
    if not gpu.processes and gpu.used_bytes < BUSY_BYTES:
        return Finding(OK, text)
    users = counted(gpu.processes, "other process", "es") if gpu.processes else "processes that nvidia-smi does not show"
    return Finding(NOTE, f"{text}; busy: {gpu.used_bytes / GB:.1f} GB taken by {users}", "measure speed and memory on an idle GPU")


def torch_findings(facts: Facts) -> Iterator[Finding]:
    """What torch was built for, and whether it can use the GPU that the driver shows."""
    torch, driver = facts.torch, facts.driver
    if torch is None:
        if "torch" in facts.versions:
            yield Finding(PROBLEM, f"torch cannot be used ({facts.torch_fault})", "install torch again")
        return
    built = f"torch {torch.version}, built for {f'CUDA {torch.cuda}' if torch.cuda else 'the CPU'}"
    if not driver.gpus or torch.available:
        yield Finding(OK, f"{built}, {'uses the GPU' if torch.available else 'runs on the CPU'}")
    elif not torch.cuda:
        remedy = "install torch's CUDA build (pytorch.org names the command), or pass --device cpu"
        yield Finding(PROBLEM, f"{built}, but the driver shows a GPU", remedy)
    elif driver.cuda is not None and numbers(torch.cuda)[0] > driver.cuda[0]:
        text = f"{built}, but the driver serves CUDA up to {dotted(driver.cuda)}"
        yield Finding(PROBLEM, text, f"update the driver, or install a torch built for CUDA {driver.cuda[0]}")
    else:
        yield Finding(PROBLEM, f"{built}, cannot use the GPU ({torch.reason or 'it gives no reason'})", "see whether nvidia-smi works")
    if facts.torch_fault:
        yield Finding(PROBLEM, f"the self-test did not end: {facts.torch_fault}", "run python -m hgrn2_bench.selftest to see why")


def combination_findings(facts: Facts) -> Iterator[Finding]:
    """Versions that are known to go wrong together, and what of fla this project goes around."""
    capabilities = {gpu.capability for gpu in facts.driver.gpus}
    on_hopper = any(major == HOPPER for major, _ in capabilities)
    triton = numbers(facts.versions.get("triton", "0"))
    if on_hopper and REFUSING_TRITON[0] <= triton < REFUSING_TRITON[1]:
        models = ", ".join(facts.models_of.get("scalar_decay", ()) + facts.models_of.get("delta_rule", ()))
        text = f"Triton {facts.versions['triton']} on Hopper: fla refuses the gradient of a decay per head ({models})"
        yield Finding(PROBLEM, text, 'pip install "triton>=3.7.1"; tilelang, which fla names too, serves only some of them')
    elif on_hopper and "tilelang" in facts.modules and _set(facts, "FLA_TILELANG") != "0":
        text = "tilelang is installed: on Hopper fla takes a gradient of a decay per head from it, and rows would not say so"
        yield Finding(NOTE, text, "export FLA_TILELANG=0")
    if capabilities & set(QLA_GPUS) and "flash_qla" in facts.modules and _set(facts, "FLA_FLASH_QLA") != "0":
        text = "flash_qla is installed: in half precision fla hands it chunk_gated_delta_rule with heads of 128, and rows would not say so"
        yield Finding(NOTE, text, "export FLA_FLASH_QLA=0")
    if "flash-linear-attention" in facts.versions:
        text = "fla's chunk_hgrn is wrong past 256 steps of slow decay, and drops gradients of states; nothing here calls it"
        yield Finding(NOTE, text, "in code of your own call fused_recurrent_hgrn, as this project does")
        text = "fla's layers of HGRN2 and GLA change their kernel at 64 steps and scale by K^-0.5; the mixers here do neither unless told"
        yield Finding(NOTE, text, "compare with fla.layers above 64 steps only, and with the scale set")
        if "mamba_ssm" not in facts.modules:
            text = (
                "without mamba-ssm fla's layers of Mamba and Mamba2 run plain torch, which is slow, and only log it; the mixers here do not"
            )
            yield Finding(NOTE, text, "never time those two layers of fla on this machine")


def _set(facts: Facts, name: str) -> str:
    return facts.variables.get(name, "")


def environment_findings(facts: Facts) -> Iterator[Finding]:
    """Variables that change which kernels run, or how."""
    if _set(facts, "TRITON_INTERPRET") not in ("", "0"):
        mark = PROBLEM if facts.driver.gpus else NOTE
        yield Finding(mark, "TRITON_INTERPRET is set: Triton's kernels would run in its interpreter, on the CPU", "unset TRITON_INTERPRET")
    if _set(facts, "FLA_USE_FAST_OPS") == "1":
        text = "FLA_USE_FAST_OPS=1: fla's kernels take exp and log in a fast, less exact form, and rows would not say so"
        yield Finding(NOTE, text, "unset FLA_USE_FAST_OPS")


def package_findings(facts: Facts) -> Iterator[Finding]:
    """Optional packages, and those that one might expect to matter."""
    for package, (modules, adds, extra) in OPTIONAL.items():
        if facts.modules.issuperset(modules):
            yield Finding(OK, f"{package}: {adds}")
        else:
            yield Finding(NOTE, f"{package} is not installed: with it {adds}", f'pip install "hgrn2_bench[{extra}]"')
    there = [name for module, name in UNUSED.items() if module in facts.modules]
    yield Finding(OK, f"{', '.join(UNUSED.values())}: nothing here calls them (installed: {', '.join(there) or 'none'})")


def folder_findings(facts: Facts) -> Iterator[Finding]:
    """Where rows and compiled kernels go, and where data are looked for."""
    yield from _folder("results folder", facts.results, needed=True)
    yield from _folder("kernel cache", facts.cache, needed=bool(facts.driver.gpus))
    there = "" if facts.data.exists else " (not there; presets that read files need it: data_dir=DIR or HGRN2_BENCH_DATA)"
    yield Finding(OK, f"data folder {facts.data.path}{there}")


def _folder(what: str, folder: Folder, needed: bool) -> Iterator[Finding]:
    size = f", {folder.size_bytes / GB:.2f} GB in it" if folder.size_bytes else ""
    text = f"{what} {folder.path}{'' if folder.exists else ' (not there yet)'}{size}, {folder.free_bytes / GB:.1f} GB free"
    move = "name another with --results" if what == "results folder" else "name another with TRITON_CACHE_DIR"
    if not folder.writable:
        yield Finding(PROBLEM if needed else NOTE, f"{text}, cannot be written to", f"change its permissions, or {move}")
    elif folder.free_bytes < LEAST_FREE:
        yield Finding(PROBLEM if needed else NOTE, text, f"make room, or {move}")
    elif folder.free_bytes < LITTLE_FREE:
        yield Finding(NOTE, f"{text}, which is little", f"make room, or {move}")
    else:
        yield Finding(OK, text)


def kernel_findings(comparisons: Sequence[Comparison], facts: Facts, device: str) -> Iterator[Finding]:
    """A line for each case that is wrong; those that are right get one each on a GPU, and one for all on a CPU."""
    cases = {case: [each for each in comparisons if each.case == case] for case in dict.fromkeys(each.case for each in comparisons)}
    right = {case: compared for case, compared in cases.items() if all(agrees(each, device) for each in compared)}
    for case, compared in cases.items():
        if case not in right:
            models = ", ".join(facts.models_of.get(compared[0].family, ())) or "any model that has it"
            is_torch = compared[0].kernel.startswith(("chunked.", "torch."))
            advice = "try another version of torch" if is_torch else "pass backend=chunked, or try another version of triton"
            text = f"{case}: {'; '.join(told(each, device) for each in compared if not agrees(each, device))}"
            yield Finding(PROBLEM, text, f"trust no run of {models} here; {advice}")
        elif device == "cuda":
            yield Finding(OK, f"{case}: {compared[0].kernel} agrees with reference, {worst(compared)}")
    if right and device == "cpu":
        every = [each for compared in right.values() for each in compared]
        yield Finding(OK, f"chunked agrees with reference in {len(right)} cases, forward and backward, {worst(every)}")


def agrees(compared: Comparison, device: str) -> bool:
    """Whether a kernel gave what the reference gives, up to its dtype's tolerance; NaN is no agreement."""
    return not compared.fault and compared.error <= TOLERANCES[device, compared.dtype]


def told(compared: Comparison, device: str) -> str:
    """What is wrong with one comparison."""
    if compared.fault:
        return " ".join(filter(None, (compared.kernel, compared.dtype, compared.fault)))
    limit = TOLERANCES[device, compared.dtype]
    return f"{compared.kernel} in {compared.dtype} is off by {compared.error:.1g} in {compared.tensor} (relative; at most {limit:g})"


def worst(compared: Sequence[Comparison]) -> str:
    """The largest error of each dtype."""
    dtypes = dict.fromkeys(each.dtype for each in compared)
    largest = {dtype: max(each.error for each in compared if each.dtype == dtype) for dtype in dtypes}
    return "worst relative error " + ", ".join(f"{error:.1e} in {dtype}" for dtype, error in largest.items())


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.14.1+cpu` is (2, 14, 1)."""
    found: list[int] = []
    for part in version.partition("+")[0].split("."):
        if not part.isdecimal():
            break
        found.append(int(part))
    return tuple(found)


def dotted(version: tuple[int, int]) -> str:
    """`12.4` of (12, 4)."""
    return ".".join(map(str, version))
