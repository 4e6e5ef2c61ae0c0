"""lm-eval knows `hgrn2_bench` after `pip install`: the line that Python runs at its start, in processes of their own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = ROOT / "hgrn2_bench" / "lm_eval.pth"
START = "import site, sys; site.addsitedir(sys.argv[1]); "
"""Runs the line as Python's start does."""


def python(code: str, site: Path, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-c", START + code, str(site)]
    return subprocess.run(command, env=os.environ | own, cwd=site, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "zz_hgrn2_bench_lm_eval.pth").write_text(LINE.read_text())
    return tmp_path


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")
@pytest.mark.parametrize(
    "first",
    ["import lm_eval.api.registry, lm_eval.models", "import lm_eval.models; from hgrn2_bench import lm_eval_hook as h; h.install()"],
)
def test_the_name_is_registered_once_lm_eval_knows_its_own_models(site, first):
    code = f"{first}; from lm_eval.api.registry import model_registry as r; print(r._objs['hgrn2_bench'], r._objs['hf'])"
    done = python(code, site)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["suites.zeroshot.lm:BenchLM", "lm_eval.models.huggingface:HFLM"]


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")
def test_the_name_stands_for_the_class(site):
    code = "import lm_eval.models; from lm_eval.api.registry import get_model; print(get_model('hgrn2_bench').__name__)"
    done = python(code, site)
    assert done.stdout.split() == ["BenchLM"], done.stderr


def test_it_imports_next_to_nothing_and_says_nothing(site):
    code = "print(sorted(m for m in sys.modules if m.split('.')[0] in ('hgrn2_bench', 'lm_eval', 'torch', 'typing')))"
    done = python(code, site)
    assert done.stdout.strip() == "['hgrn2_bench', 'hgrn2_bench.lm_eval_hook']"
    assert done.stderr == ""


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a broken file"])
def test_where_the_package_is_half_removed_python_starts_as_ever(site, tmp_path, left):
    other = tmp_path / "packages"
    (other / "hgrn2_bench").mkdir(parents=True)
    if left == "nothing":
        (other / "hgrn2_bench").rmdir()
    if left == "a broken file":
        (other / "hgrn2_bench" / "lm_eval_hook.py").write_text("def install(: cut short")
    done = python("print('started')", site, str(other))
    assert (done.stdout, done.stderr) == ("started\n", "")


def test_a_version_of_lm_eval_without_the_registry_is_left_alone(site, tmp_path):
    package = tmp_path / "old" / "lm_eval"
    (package / "api").mkdir(parents=True)
    for name, text in (("__init__.py", ""), ("models.py", "MADE = 1"), ("api/__init__.py", ""), ("api/registry.py", "MODEL_REGISTRY = {}")):
        (package / name).write_text(text)
    done = python(
        "import lm_eval.models; print(lm_eval.models.MADE, lm_eval.models.__spec__.loader.name)", site, f"{tmp_path / 'old'}:{ROOT}"
    )
    assert done.stdout.split() == ["1", "lm_eval.models"], done.stderr


def test_it_is_installed_with_a_wheel_and_with_an_editable_install():
    import tomllib

    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"hgrn2_bench/lm_eval.pth": "zz_hgrn2_bench_lm_eval.pth"}
