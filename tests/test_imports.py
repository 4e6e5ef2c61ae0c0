"""Who may import whom, read from the source text: suites -> hgrn2_bench <- baselines, and what must stay light stays light."""

import ast
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("hgrn2_bench", "baselines", "suites")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
HEAVY = {"torch", "fla", "pandas", "scipy", "triton", "transformers", "numpy", "matplotlib"}
OURS = {
    "ops": ("hgrn2_bench.ops", "hgrn2_bench.errors"),
    "tables": (
        "hgrn2_bench.results",
        "hgrn2_bench.protocol",
        "hgrn2_bench.render",
        "hgrn2_bench.lines",
        "hgrn2_bench.fairness",
        "hgrn2_bench.speeds",
        "hgrn2_bench.averages",
        "hgrn2_bench.items",
        "hgrn2_bench.paired",
    ),
    "averages": ("hgrn2_bench.items", "hgrn2_bench.lines", "hgrn2_bench.protocol", "hgrn2_bench.render", "hgrn2_bench.results"),
    "items": ("hgrn2_bench.results",),
    "paired": ("hgrn2_bench.items", "hgrn2_bench.lines", "hgrn2_bench.results"),
    "speeds": ("hgrn2_bench.results", "hgrn2_bench.protocol", "hgrn2_bench.render", "hgrn2_bench.lines"),
    "lines": ("hgrn2_bench.results", "hgrn2_bench.protocol", "hgrn2_bench.render", "hgrn2_bench.fairness"),
    "fairness": ("hgrn2_bench.results",),
    "figures": (
        "hgrn2_bench.results",
        "hgrn2_bench.protocol",
        "hgrn2_bench.render",
        "hgrn2_bench.lines",
        "hgrn2_bench.fairness",
        "hgrn2_bench.published",
    ),
    "drawing": ("hgrn2_bench.figures", "hgrn2_bench.render"),
    "compare": (
        "hgrn2_bench.fairness",
        "hgrn2_bench.paired",
        "hgrn2_bench.lines",
        "hgrn2_bench.speeds",
        "hgrn2_bench.tables",
        "hgrn2_bench.results",
        "hgrn2_bench.protocol",
        "hgrn2_bench.render",
        "hgrn2_bench.errors",
    ),
    "render": (),
    "results": (),
    "provenance": (),
    "errors": (),
    "protocol": (),
}
"""Parts of the core, and the only modules of ours that each may import."""
LIGHT = (
    "cli",
    "config",
    "errors",
    "protocol",
    "registry",
    "trained",
    "foreign_config",
    "words",
    "backends",
    "plan",
    "backends",
    "matching",
    "fairness",
    "results",
    "lines",
    "items",
    "paired",
    "tables",
    "speeds",
    "compare",
    "render",
    "published",
    "published_tables",
    "figures",
    "drawing",
    "provenance",
    "cells",
    "executor",
    "markov_recipe",
    "text_tokenizers",
    "distributed",
    "together",
    "trackers",
    "running",
    "doctor",
    "machine",
    "warm",
    "status",
    "datacheck",
    "hub",
    "lm_eval_hook",
)


class Import(NamedTuple):
    """One module that a file imports, and where."""

    module: str
    line: int
    in_function: bool
    for_types: bool
    """Under `if TYPE_CHECKING`: never executed."""

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def imports(tree: ast.AST, in_function: bool = False, for_types: bool = False) -> Iterator[Import]:
    """Every import of a tree, `importlib.import_module("literal")` among them; `from a import b` counts as a and as a.b."""
    for node in ast.iter_child_nodes(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")) and node.args:
            modules = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        yield from (Import(module, node.lineno, in_function, for_types) for module in modules)
        function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types = for_types or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        yield from imports(node, function, types)


def name_of(path: Path) -> str:
    """Dotted name of a file's module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {name_of(path): ast.parse(path.read_text()) for path in FILES}
IMPORTS = {name: list(imports(tree)) for name, tree in TREES.items()}


def inside(module: str, *parents: str) -> bool:
    """Whether a module is one of `parents` or lies in one; `from a import b` names the package a on the way to a.b."""
    return any(module == parent or module.startswith(f"{parent}.") or parent.startswith(f"{module}.") for parent in parents)


def faults(name: str, found: list[Import]) -> list[str]:
    """What a module imports against the rules, in words."""
    package, _, rest = name.partition(".")
    light = rest in LIGHT if package == "hgrn2_bench" else package == "suites" and rest.endswith("protocol")
    rules: list[tuple[str, Callable[[Import], bool]]] = [
        (f"{package} may not", lambda i: i.package in PACKAGES and i.package not in (package, "hgrn2_bench")),
        ("only functions of ops/fla.py may", lambda i: i.package == "fla" and not (name == "hgrn2_bench.ops.fla" and i.in_function)),
        ("nothing heavy at the top", lambda i: light and i.package in HEAVY and not i.in_function and not i.for_types),
    ]
    part = rest.partition(".")[0] if package == "hgrn2_bench" else ""
    if part in OURS:
        text = f"of ours {part} may import {', '.join(OURS[part]) or 'nothing'}"
        rules.append((text, lambda i: i.package in PACKAGES and not inside(i.module, *OURS[part])))
    return [f"{name}:{i.line} imports {i.module}: {text}" for i in found for text, broken in rules if broken(i)]


@pytest.mark.parametrize("name", TREES)
def test_modules_import_only_what_they_may(name):
    assert faults(name, IMPORTS[name]) == []


@pytest.mark.parametrize("name", [name_of(path) for path in FILES if path.name == "__init__.py"])
def test_packages_hold_a_docstring_and_nothing_else(name):
    (only,) = TREES[name].body
    assert ast.get_docstring(TREES[name])
    assert isinstance(only, ast.Expr)


def at_start(name: str) -> set[str]:
    """Packages that importing one of our modules pulls in at once, through our other modules too."""
    seen, todo, packages = set(), [name], set()
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        for each in IMPORTS[module]:
            if not each.in_function and not each.for_types:
                packages.add(each.package)
                todo += [each.module] if each.module in IMPORTS else []
    return packages


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_pull_in_nothing_heavy_through_others(name):
    assert not at_start(f"hgrn2_bench.{name}") & HEAVY


def test_heavy_modules_are_seen_to_be_heavy():
    assert "torch" in at_start("hgrn2_bench.engine")
    assert "torch" in at_start("hgrn2_bench.hgrn2")
    assert set(LIGHT) <= {name.removeprefix("hgrn2_bench.") for name in TREES}


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("suites.mqar.runner", "import baselines.gla", "suites may not"),
        ("suites.mqar.runner", "def f():\n    from baselines import gla", "suites may not"),
        ("suites.mqar.runner", "import importlib\nimportlib.import_module('baselines.gla')", "suites may not"),
        ("suites.mqar.protocol", "import torch", "nothing heavy"),
        ("baselines.gla", "from suites.mqar import data", "baselines may not"),
        ("hgrn2_bench.engine", "def f():\n    import suites", "hgrn2_bench may not"),
        ("hgrn2_bench.model", "from baselines.gla import GLA", "hgrn2_bench may not"),
        ("hgrn2_bench.ops.chunked", "from hgrn2_bench import layers", "of ours ops may import"),
        ("hgrn2_bench.ops.chunked", "from hgrn2_bench.interfaces import Mixer", "of ours ops may import"),
        ("hgrn2_bench.results", "from hgrn2_bench.errors import ConfigError", "may import nothing"),
        ("hgrn2_bench.provenance", "def f():\n    from hgrn2_bench import errors", "may import nothing"),
        ("hgrn2_bench.tables", "from hgrn2_bench import plan", "of ours tables may import"),
        ("hgrn2_bench.tables", "import pandas", "nothing heavy"),
        ("hgrn2_bench.cli", "try:\n    import torch\nexcept ImportError:\n    pass", "nothing heavy"),
        ("hgrn2_bench.cli", "from torch import nn", "nothing heavy"),
        ("hgrn2_bench.config", "class A:\n    import scipy.stats", "nothing heavy"),
        ("hgrn2_bench.ops.fla", "import fla", "only functions of"),
        ("hgrn2_bench.ops.chunked", "def f():\n    from fla.ops import chunk_gla", "only functions of"),
        ("baselines.gla", "def f():\n    import importlib\n    importlib.import_module('fla.ops')", "only functions of"),
    ],
)
def test_these_rules_can_be_broken(name, source, fault):
    found = faults(name, list(imports(ast.parse(textwrap.dedent(source)))))
    assert len(found) >= 1
    assert all(fault in each for each in found)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "suites.mqar.runner",
            "import torch\nfrom hgrn2_bench import registry\nfrom suites.mqar import data\nfrom suites.mqar.protocol import MQAR",
        ),
        ("baselines.gla", "from hgrn2_bench.interfaces import Mixer\nimport torch"),
        (
            "hgrn2_bench.ops.fla",
            "def f():\n    import fla.ops\nfrom hgrn2_bench.errors import ConfigError\nfrom hgrn2_bench.ops import reference",
        ),
        ("hgrn2_bench.cli", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import pandas"),
        ("hgrn2_bench.plan", "from importlib.util import find_spec\ndef f():\n    return find_spec('fla')"),
        ("hgrn2_bench.measure", "def f():\n    from hgrn2_bench.ops import fla"),
        ("hgrn2_bench.tables", "from hgrn2_bench.results import Row\ndef f():\n    from scipy.stats import t"),
    ],
)
def test_these_rules_allow_what_is_right(name, source):
    assert faults(name, list(imports(ast.parse(source)))) == []


def test_relative_imports_are_refused():
    with pytest.raises(AssertionError, match="relative import"):
        list(imports(ast.parse("from . import data")))
