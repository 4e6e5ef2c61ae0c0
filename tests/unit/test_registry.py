"""Names from files, entry points and a user's own file: read as text, refused in one line, imported only to run."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hgrn2_bench import registry
from hgrn2_bench.errors import ConfigError

ROOT = Path(__file__).parents[2]

MIXER = '''
"""My mixer, first line.

Second paragraph.
"""
from typing import ClassVar, Literal

import a_package_that_is_not_installed
from hgrn2_bench.interfaces import Mixer


class Helper:
    pass


class MyMixer(Mixer):
    """Not this line: the file has one."""

    version: ClassVar[int] = 3
    gated: ClassVar[bool] = True
    backends: ClassVar[tuple[str, ...]] = ("reference",)
    note: ClassVar[str] = "x" + "y"

    width: int = 4
    share: float = 1
    flag: bool = False
    name: str = "n"
    depth: int | None = None
    scale: float | None = 2
    kind: Literal["a", "b"] = "b"
    maybe: Literal["a", "b"] | None = None
    words: tuple[str, ...] = ("a", "b")
    unannotated = 5


class Plain(Helper):
    """A plain module."""

    def __init__(self, d_model: int = 8, heads: int = 2, free=3, *, rate: float = 0.5, kind: Literal["x", "y"] = "x"):
        pass
'''

MODULE = '''
import torch
from torch import nn


class Twice(nn.Module):
    """Doubles its input."""

    def __init__(self, d_model: int, factor: float = 2.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x
'''


@pytest.fixture
def fresh(monkeypatch):
    """The registry without what earlier calls remembered, before and after."""
    caches = (registry.models, registry.suites, registry._user_model)
    for cache in caches:
        cache.cache_clear()
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def refusal(function, *args):
    with pytest.raises(ConfigError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def python(script, *path, check=True):
    """Run a script in a process of its own, with folders ahead on the module path."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    return subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(script)], capture_output=True, text=True, env=env, timeout=60, check=check
    )


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def read(tmp_path, body, header=""):
    """A Mixer whose class body is given, as the registry reads it."""
    source = f"{header}\nclass M(Mixer):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
    return registry.read_model(write(tmp_path / "m.py", source), "m", "m")


def settings(model):
    return {f.name: (f.type, f.default, tuple(f.metadata.get("choices", ()))) for f in dataclasses.fields(model.settings)}


# names


def test_models_are_hgrn2_and_the_files_of_baselines():
    files = {path.stem for path in (ROOT / "baselines").glob("*.py")} - {"__init__"}
    assert set(registry.models()) == files | {"hgrn2"}
    assert list(registry.models()) == sorted(registry.models())


def test_models_are_called_after_their_file_and_point_to_their_class():
    for name, model in registry.models().items():
        assert model.name == name
        assert model.module.endswith(f".{name}")
        assert model.is_mixer
        assert model.class_name.lower() == name.replace("_", "")


def test_models_are_summarised_by_their_first_docstring_line():
    for name, model in registry.models().items():
        path = ROOT / (f"baselines/{name}.py" if name != "hgrn2" else "hgrn2_bench/hgrn2.py")
        assert path.read_text().startswith((f'"""{model.summary}\n', f'"""{model.summary}"""\n'))
        assert len(model.summary) > 10


def test_suites_are_the_folders_with_a_protocol():
    assert registry.suites() == {path.parent.name: f"suites.{path.parent.name}" for path in (ROOT / "suites").glob("*/protocol.py")}
    for name in registry.suites():
        assert registry.protocol(name).name == name
        assert registry.suite_summary(name)
        assert "\n" not in registry.suite_summary(name)


def test_unknown_names_are_answered_with_the_nearest():
    assert refusal(registry.model, "retnt").startswith("Unknown model 'retnt'. Did you mean 'retnet'? Available: attention, ")
    assert refusal(registry.protocol, "mqra").startswith("Unknown suite 'mqra'. Did you mean 'mqar'? Available: ")


def test_listing_and_protocols_import_nothing_heavy():
    python("""
        import sys
        from hgrn2_bench import registry
        registry.check_packages()
        for model in registry.models().values():
            model.summary, model.version
        for name in registry.suites():
            registry.suite_summary(name)
            registry.protocol(name)
        heavy = {"torch", "fla", "pandas", "triton", "scipy", "numpy", "hydra", "omegaconf"} & set(sys.modules)
        assert not heavy, heavy
        ours = [name for name in sys.modules if name.startswith("baselines") or name == "hgrn2_bench.hgrn2"]
        assert ours in ([], ["baselines"]), ours
    """)


# settings as text


def test_settings_are_read_from_the_source_without_importing_it(tmp_path):
    model = registry.model(f"{write(tmp_path / 'mine.py', MIXER)}:MyMixer")
    assert settings(model) == {
        "width": (int, 4, ()),
        "share": (float, 1.0, ()),
        "flag": (bool, False, ()),
        "name": (str, "n", ()),
        "depth": (int | None, None, ()),
        "scale": (float | None, 2.0, ()),
        "kind": (str, "b", ("a", "b")),
        "maybe": (str | None, None, ("a", "b")),
        "words": (tuple, ("a", "b"), ()),
    }
    assert type(settings(model)["share"][1]) is float
    assert model.facts == {"version": 3, "gated": True, "backends": ("reference",)}
    assert model.summary == "My mixer, first line."
    assert model.name == model.class_name == "MyMixer"
    assert model.is_mixer


def test_settings_of_a_plain_module_are_its_annotated_parameters(tmp_path):
    model = registry.model(f"{write(tmp_path / 'mine.py', MIXER)}:Plain")
    assert settings(model) == {"heads": (int, 2, ()), "rate": (float, 0.5, ()), "kind": (str, "x", ("x", "y"))}
    assert not model.is_mixer
    assert model.facts == {"backends": ("module",)}


def test_settings_of_a_plain_module_without_parameters_are_none(tmp_path):
    path = write(tmp_path / "m.py", "class A:\n    pass\nclass B:\n    def __init__(self, d_model):\n        pass\n")
    assert settings(registry.model(f"{path}:A")) == settings(registry.model(f"{path}:B")) == {}


def test_settings_of_positional_only_parameters_are_read(tmp_path):
    path = write(tmp_path / "m.py", "class A:\n    def __init__(self, d_model: int = 8, /, heads: int = 2):\n        pass\n")
    assert settings(registry.model(f"{path}:A")) == {"heads": (int, 2, ())}


@pytest.mark.parametrize("base", ["Mixer", "interfaces.Mixer", "hgrn2_bench.interfaces.Mixer"])
def test_a_mixer_is_known_by_its_base(tmp_path, base):
    model = registry.read_model(write(tmp_path / "m.py", f"class M({base}):\n    a: int = 1\n"), "m", "m")
    assert list(settings(model)) == ["a"]


def test_summary_falls_back_to_the_class(tmp_path):
    assert read(tmp_path, '"""What it is.\n\nMore."""\na: int = 1').summary == "What it is."


@pytest.mark.parametrize(
    "annotation",
    [
        "list",
        "list[int]",
        "int | float",
        "dict",
        "Optional[int]",
        "'int'",
        "int | str | None",
        "Tensor",
        "tuple",
        "tuple[int, ...]",
        "tuple[str, ...] | None",
    ],
)
def test_settings_of_other_types_are_refused(tmp_path, annotation):
    message = refusal(read, tmp_path, f"a: {annotation} = None")
    assert message.startswith("M: setting 'a' must be int, float, bool, str, Literal")
    assert message.endswith(f"not {annotation}")


@pytest.mark.parametrize("choices", ["1, 2", "'a', 1", "'a', None", "NAME", "True"])
def test_settings_with_choices_that_are_no_words_are_refused(tmp_path, choices):
    assert "setting 'a' must be" in refusal(read, tmp_path, f"a: Literal[{choices}] = 'a'")


@pytest.mark.parametrize("default", ["WIDTH", "2 * 3", "f()", "-x", "[i for i in y]"])
def test_settings_need_a_literal_default(tmp_path, default):
    assert refusal(read, tmp_path, f"a: int = {default}") == "M: the default of 'a' must be a literal"


def test_settings_need_a_default(tmp_path):
    assert refusal(read, tmp_path, "a: int") == "M: setting 'a' needs a default"


@pytest.mark.parametrize(
    ("annotation", "default"),
    [
        ("int", "'x'"),
        ("int", "1.5"),
        ("int", "True"),
        ("bool", "1"),
        ("str", "1"),
        ("float", "'x'"),
        ("int", "None"),
        ("Literal['a']", "'b'"),
        ("tuple[str, ...]", "'a'"),
        ("tuple[str, ...]", "('a', 1)"),
        ("tuple[str, ...]", "['a']"),
    ],
)
def test_settings_need_a_default_of_their_type(tmp_path, annotation, default):
    message = refusal(read, tmp_path, f"a: {annotation} = {default}")
    assert message == f"M: the default of 'a' is {default}, not {annotation}"


@pytest.mark.parametrize("fact", ["version: ClassVar[int] = VERSION", "backends = (FLA,)", "gated: ClassVar[bool] = not False"])
def test_facts_that_planning_needs_must_be_literal(tmp_path, fact):
    assert "must be a literal" in refusal(read, tmp_path, fact)


def test_facts_that_planning_does_not_need_may_be_anything(tmp_path):
    assert read(tmp_path, "version: ClassVar[int] = 2\nno_weight_decay: ClassVar[tuple] = (A, B)\ntable = make()").facts == {"version": 2}


@pytest.mark.parametrize("body", ["", "layers: int = 2", "layers: str = 'a'", "others: tuple[str, ...] = ('a',)"])
def test_parts_names_a_setting_that_takes_a_list(tmp_path, body):
    message = refusal(read, tmp_path, f"parts: ClassVar[str] = 'layers'\n{body}")
    assert message == "M: 'parts' must name a setting of type tuple[str, ...], not 'layers'"


def test_parts_are_the_listed_models_each_once():
    hybrid = registry.model("hybrid")
    assert [part.name for part in hybrid.parts({"layers": ("gla", "hgrn2", "gla")})] == ["gla", "hgrn2"]
    assert registry.model("gla").parts({}) == ()


def test_a_full_version_names_the_versions_of_the_parts(monkeypatch):
    settings = {"layers": ("gla", "hgrn2", "gla")}
    versions = {name: registry.model(name).version for name in ("hybrid", "gla", "hgrn2")}
    first = registry.model("hybrid").full_version(settings)
    assert first == f"{versions['hybrid']} (gla {versions['gla']}, hgrn2 {versions['hgrn2']})"
    monkeypatch.setitem(registry.model("gla").facts, "version", 99)
    assert registry.model("hybrid").full_version(settings) == first.replace(f"gla {versions['gla']}", "gla 99")
    assert registry.model("gla").full_version({}) == "99"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "hybrid.layers=[] names no model"),
        (("hgrn2", "retnt"), "Unknown model in hybrid.layers 'retnt'. Did you mean 'retnet'? Available: attention, "),
        (("hgrn2", "hybrid"), "hybrid.layers: 'hybrid' is itself built of other models; name those"),
        (("./mine.py:Mine",), "Unknown model in hybrid.layers './mine.py:Mine'."),
    ],
)
def test_parts_that_cannot_be_listed_are_refused(names, message):
    refused = refusal(registry.model("hybrid").parts, {"layers": names})
    assert refused.startswith(message)
    assert "hybrid" not in refused.partition("Available")[2]


@pytest.mark.parametrize("number", [0, 2])
def test_a_registered_file_defines_one_mixer(tmp_path, number):
    source = "".join(f"class M{i}(Mixer):\n    pass\n" for i in range(number)) or "x = 1\n"
    path = write(tmp_path / "m.py", source)
    assert f"must define exactly one subclass of Mixer, not {number}" in refusal(registry.read_model, path, "m", "m")


# a file of the user's own


@pytest.mark.parametrize(
    ("source", "ref", "part"),
    [
        (MIXER, "mine.py", "name the class too, as in {path}:MyMixer"),
        (MIXER, "mine.py:", "name the class too"),
        (MIXER, "mine.py:1x", "name the class too"),
        (MIXER, "mine.py:a.b", "name the class too"),
        (MIXER, "other.py:MyMixer", "no file {folder}/other.py"),
        (MIXER, "mine.py:MyMixr", "'MyMixr'. Did you mean 'MyMixer'? Available: Helper, MyMixer, Plain."),
        ("x = 1\n", "mine.py:MyMixer", "defines no class"),
        ("class gla(Mixer):\n    pass\n", "mine.py:gla", "'gla' is already a registered model; rename the class"),
        ("x = 1\nclass A(:\n", "mine.py:A", "cannot read {path}, line 2: invalid syntax"),
        ("class A(Mixer):\n    a: list = 1\n", "mine.py:A", "setting 'a' must be"),
    ],
    ids=["no class", "empty class", "no name", "dotted", "no file", "typo", "no classes", "taken", "syntax", "type"],
)
def test_a_file_that_holds_no_model_is_refused(tmp_path, source, ref, part):
    path = write(tmp_path / "mine.py", source)
    assert part.format(path=path, folder=tmp_path) in refusal(registry.model, f"{tmp_path}/{ref}")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mine.py").write_bytes(b"\xff\xfe\x00class A: pass")
    assert "cannot read" in refusal(registry.model, f"{tmp_path}/mine.py:A")


def test_a_files_version_is_the_hash_of_its_text(tmp_path, fresh):
    first = registry.model(f"{write(tmp_path / 'a.py', MIXER)}:MyMixer")
    moved = registry.model(f"{write(tmp_path / 'deep/b.py', MIXER)}:MyMixer")
    changed = registry.model(f"{write(tmp_path / 'c.py', MIXER + '# a remark')}:MyMixer")
    assert first.version == moved.version != changed.version
    assert len(first.version) == 16
    assert registry.model("hgrn2").version == str(registry.model("hgrn2").facts["version"])


def test_load_wraps_a_plain_module(tmp_path):
    import torch

    from hgrn2_bench.interfaces import Mixer, MixerSpec

    cls = registry.load(f"{write(tmp_path / 'mine.py', MODULE)}:Twice")
    assert issubclass(cls, Mixer)
    assert cls.__name__ == "Twice"
    mixer = cls(MixerSpec(d_model=4, settings={"factor": 3.0}))
    x = torch.randn(2, 5, 4)
    assert torch.equal(mixer(x), 3 * x)


def test_load_gives_registered_mixers():
    from hgrn2_bench.interfaces import Mixer

    for name, model in registry.models().items():
        cls = registry.load(name)
        assert issubclass(cls, Mixer)
        assert cls.__name__ == model.class_name
        assert set(cls.setting_names()) == set(settings(model))
        assert {f.name: f.default for f in dataclasses.fields(model.settings)} == {n: getattr(cls, n) for n in cls.setting_names()}
        assert all(getattr(cls, fact) == value for fact, value in model.facts.items())


def test_load_refuses_a_mixer_whose_base_hides_it(tmp_path):
    source = "from hgrn2_bench.interfaces import Mixer as Base\nclass Mine(Base):\n    a: int = 1\n"
    assert "must name Mixer itself as its base" in refusal(registry.load, f"{write(tmp_path / 'mine.py', source)}:Mine")


def test_load_keeps_files_of_one_name_apart(tmp_path):
    one = write(tmp_path / "a/mine.py", "class A:\n    value = 1\n")
    other = write(tmp_path / "b/mine.py", "class A:\n    value = 2\n")
    assert registry._import_file(one).A.value == 1
    assert registry._import_file(other).A.value == 2
    assert "mine" not in sys.modules


def test_load_of_a_broken_file_fails_alike_each_time(tmp_path):
    path = write(tmp_path / "mine.py", MIXER)
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
            registry.load(f"{path}:MyMixer")


# packages of others


def distribution(folder, group, name, value):
    """An installed distribution with one entry point."""
    write(folder / "third-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: third\nVersion: 1.0\n")
    write(folder / "third-1.0.dist-info/entry_points.txt", f"[hgrn2_bench.{group}]\n{name} = {value}\n")


PROTOCOL = """
    from dataclasses import dataclass
    from hgrn2_bench.protocol import Preset, Protocol

    @dataclass(frozen=True)
    class Data:
        length: int = 8

    PRESETS = {"smoke": Preset("s", "s", ("model=hgrn2",), {"length8": ()})}
    PROTOCOL = Protocol("copying", 1, "accuracy", "fraction", True, Data, lambda data: f"length{data.length}", PRESETS)
"""


def test_an_entry_point_adds_a_model(tmp_path):
    distribution(tmp_path, "baselines", "rwkv", "third.rwkv")
    write(tmp_path / "third/__init__.py", '"""Third."""\n')
    write(
        tmp_path / "third/rwkv.py",
        '"""RWKV, summarised."""\nimport torch\nfrom hgrn2_bench.interfaces import Mixer\nclass RWKV(Mixer):\n    a: int = 1\n',
    )
    script = """
        import sys
        from hgrn2_bench import registry
        model = registry.model("rwkv")
        assert "torch" not in sys.modules
        print(model.module, model.summary, "hgrn2" in registry.models(), registry.load("rwkv").__name__)
    """
    assert python(script, tmp_path).stdout.strip() == "third.rwkv RWKV, summarised. True RWKV"


def test_an_entry_point_adds_a_suite(tmp_path):
    distribution(tmp_path, "suites", "copying", "third_suite")
    write(tmp_path / "third_suite/__init__.py", '"""Copying, summarised."""\n')
    write(tmp_path / "third_suite/protocol.py", PROTOCOL)
    script = """
        import json
        import sys
        from hgrn2_bench import registry
        from hgrn2_bench.plan import Cell, make_plan
        print(registry.suites()["copying"], registry.suite_summary("copying"), "mqar" in registry.suites())
        (cell,) = make_plan(["suite=copying", "length=16"], "cpu").cells
        print(cell.task, Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell)
        assert "torch" not in sys.modules
    """
    assert python(script, tmp_path).stdout.splitlines() == ["third_suite Copying, summarised. True", "length16 True"]


@pytest.mark.parametrize(
    ("group", "name", "value", "part"),
    [
        ("baselines", "gla", "third.gla", "two models are called 'gla': baselines.gla and third.gla; rename one"),
        ("suites", "mqar", "third", "two suites are called 'mqar': suites.mqar and third; rename one"),
        ("baselines", "rwkv", "third.gone", "entry point 'rwkv': module 'third.gone' is missing"),
        ("baselines", "rwkv", "gone.rwkv", "entry point 'rwkv': module 'gone.rwkv' is missing"),
        ("baselines", "rwkv", "third.gla:GLA", "entry point 'rwkv': module 'third.gla:GLA' is missing"),
        ("suites", "lost", "gone", "suite 'lost': cannot import gone.protocol"),
        ("suites", "lost", "third", "suite 'lost': cannot import third.protocol"),
        ("suites", "odd", "third.odd", "third.odd.protocol: PROTOCOL must be a hgrn2_bench.protocol.Protocol named 'odd'"),
        ("suites", "other", "third.named", "third.named.protocol: PROTOCOL must be a hgrn2_bench.protocol.Protocol named 'other'"),
    ],
)
def test_an_entry_point_that_clashes_or_leads_nowhere_is_refused(tmp_path, group, name, value, part):
    distribution(tmp_path, group, name, value)
    write(tmp_path / "third/__init__.py", "")
    write(tmp_path / "third/gla.py", "class GLA(Mixer):\n    pass\n")
    write(tmp_path / "third/odd/protocol.py", "x = 1\n")
    write(tmp_path / "third/named/protocol.py", PROTOCOL)
    script = f"""
        from hgrn2_bench import registry
        from hgrn2_bench.errors import ConfigError
        try:
            registry.models()
            registry.protocol({name if group == "suites" else "mqar"!r})
        except ConfigError as error:
            print(error)
    """
    output = python(script, tmp_path).stdout
    assert part in output
    assert output.count("\n") == 1


@pytest.mark.parametrize("package", ["baselines", "suites"])
@pytest.mark.parametrize("form", ["package", "module"])
def test_check_packages_names_the_intruder(tmp_path, package, form):
    intruder = write(tmp_path / (f"{package}/__init__.py" if form == "package" else f"{package}.py"), "")
    script = """
        from hgrn2_bench import registry
        from hgrn2_bench.errors import ConfigError
        try:
            registry.check_packages()
        except ConfigError as error:
            print(error)
    """
    output = python(script, tmp_path).stdout
    assert output.startswith(f"package {package!r} is {intruder}, not the one beside ")
    assert output.count("\n") == 1


def test_check_packages_is_content_with_ours(tmp_path):
    registry.check_packages()
    (tmp_path / "suites").mkdir()  # a folder of the user's own, without __init__.py, hides nothing
    python("from hgrn2_bench import registry; registry.check_packages()", tmp_path)


def test_registry_names_do_not_depend_on_the_working_folder(tmp_path):
    script = "import json; from hgrn2_bench import registry; print(json.dumps([list(registry.models()), list(registry.suites())]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True)
    assert json.loads(done.stdout) == [list(registry.models()), list(registry.suites())]
