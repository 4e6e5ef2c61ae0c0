"""The grammar of the words, the types of every key, and the combinations that are refused."""

import dataclasses
import subprocess
import sys

import pytest

from hgrn2_bench.config import (
    PLAN_KEYS,
    CellConfig,
    ModelConfig,
    TrainConfig,
    convert,
    parse_words,
    require,
    schema_of,
    type_name,
)
from hgrn2_bench.errors import ConfigError
from suites.mqar.protocol import MQARConfig

SCHEMAS = (ModelConfig, TrainConfig, CellConfig, MQARConfig)
FIELDS = [(schema, field) for schema in SCHEMAS for field in dataclasses.fields(schema)]
KINDS = {kind: [(s, f) for s, f in FIELDS if f.type is kind and not f.metadata.get("choices")] for kind in (int, float, bool, str, tuple)}
CHOICES = [(s, f) for s, f in FIELDS if f.metadata.get("choices")]


def key(case):
    """A field's name as test id."""
    return case.name if isinstance(case, dataclasses.Field) else case.__name__ if isinstance(case, type) else None


def refusal(function, *args, **kwargs):
    """The text of the ConfigError that a call raises: one line, ending cleanly."""
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert text == text.strip()
    return text


def values(text):
    (word,) = parse_words([text])
    assert word.text == text
    assert word.plain
    return word.values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=1e-3", (1e-3,)),
        ("lr=1e-3,1e-2", (1e-3, 1e-2)),
        ("seed=range(3)", (0, 1, 2)),
        ("seed=range(1,7,2)", (1, 3, 5)),
        ("seed=choice(4,2)", (4, 2)),
        ("positions='learned'", ("learned",)),
        ('positions="none","learned"', ("none", "learned")),
        ("name='a,b'", ("a,b",)),
        ("name='12'", ("12",)),
        ("model=./a.py:C", ("./a.py:C",)),
        (r"model=./a.py\:C", ("./a.py:C",)),
        (r"model=hgrn2,./a.py:C,../b/c-d.py\:E", ("hgrn2", "./a.py:C", "../b/c-d.py:E")),
        ("model='./my dir/a.py:C'", ("./my dir/a.py:C",)),
        (r"model='a\:b'", (r"a\:b",)),
        ("expand_ratio=null", (None,)),
        ("expand_ratio=null,16", (None, 16)),
        ("train_examples=48_000", (48_000,)),
        ("tie_embeddings=false,True", (False, True)),
        ("lr=", ("",)),
        ("hybrid.layers=[gla]", (("gla",),)),
        ("hybrid.layers=[hgrn2,'a b'],[gla],mamba", (("hgrn2", "a b"), ("gla",), "mamba")),
        ("hybrid.layers=[]", ((),)),
    ],
)
def test_parse_words_reads_values_and_sweeps(text, expected):
    got = values(text)
    assert got == expected
    assert [type(v) for v in got] == [type(v) for v in expected]


@pytest.mark.parametrize(
    ("text", "owner", "name"),
    [("lr=1", "", "lr"), ("hgrn2.expand_ratio=1", "hgrn2", "expand_ratio"), ("a.b.c=1", "a.b", "c"), ("a/b=1", "", "a/b")],
)
def test_parse_words_splits_owner_and_key(text, owner, name):
    (word,) = parse_words([text])
    assert (word.owner, word.key) == (owner, name)
    assert word.name == text.removesuffix("=1")


@pytest.mark.parametrize("text", ["+lr=1", "++lr=1", "~lr", "~lr=1", "lr@here=1", "+model.hiden=64"])
def test_parse_words_marks_hydra_signs(text):
    (word,) = parse_words([text])
    assert not word.plain
    assert word.values == ()
    assert word.name == ("model.hiden" if "hiden" in text else "lr")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lr=[1,2]", "a sweep is written without brackets, lr=a,b"),
        ("model=[hgrn2,gla]", "a sweep is written without brackets, model=a,b"),
        ("hybrid.layers=[a,[b]]", "hybrid.layers=a,b"),
        ("hybrid.layers=[a,{b:1}]", "hybrid.layers=a,b"),
        ("hybrid.layers=[a,'${b}']", "${...} means nothing here"),
        ("lr=choice([1],2)", "without brackets"),
        ("lr={a:1}", "without brackets"),
        ("lr=interval(0,1)", "intervals and globs cannot be planned"),
        ("lr=glob(*)", "intervals and globs cannot be planned"),
        ("lr=range(0)", "the sweep is empty"),
        ("lr=range(3,1)", "the sweep is empty"),
        ("lr=range(0,3,0)", "must not be zero"),
        ("lr", "expected key=value"),
        ("", "expected key=value"),
        ("=5", "it names no key"),
        ("a b=3", "expected key=value"),
        ("lr=1=2", "expected key=value"),
        ("lr=1,", "expected key=value"),
        ("lr=(1", "expected key=value"),
        ("lr=1\nseed=2", "expected key=value"),
        ("lr='1", "expected key=value"),
        ("a.=1", "expected key=value"),
        ("lr=float(x)", "could not convert"),
        ("lr=${seed}", "${...} means nothing here"),
        ("name='${oc.env:HOME}'", "${...} means nothing here"),
    ],
)
def test_parse_words_refuses_in_one_short_line(text, part):
    message = refusal(parse_words, ["seed=0", text])
    assert repr(text) in message
    assert part in message
    assert len(message) < 160


def test_parse_words_keeps_order_and_repeats():
    assert [w.text for w in parse_words(["b=1", "a=2", "b=3"])] == ["b=1", "a=2", "b=3"]


@pytest.mark.parametrize(("schema", "field"), KINDS[int], ids=key)
def test_convert_takes_whole_numbers_only(schema, field):
    assert convert(schema, field.name, 7, field.name) == 7
    assert convert(schema, field.name, "7", field.name) == 7
    assert type(convert(schema, field.name, "7", field.name)) is int
    for bad in (1.5, 3.0, "1.5", "abc", "", None, True, float("nan"), float("inf"), "???"):
        assert "expected a whole number" in refusal(convert, schema, field.name, bad, field.name)


@pytest.mark.parametrize(("schema", "field"), KINDS[float], ids=key)
def test_convert_takes_finite_numbers_only(schema, field):
    assert convert(schema, field.name, 0.25, field.name) == 0.25
    assert type(convert(schema, field.name, 1, field.name)) is float
    assert convert(schema, field.name, "1e-3", field.name) == 1e-3
    for bad in ("abc", "", None, True, "???", 10**400):
        assert "expected a number" in refusal(convert, schema, field.name, bad, field.name)
    for bad in (float("nan"), float("inf"), -float("inf"), "inf"):
        assert "expected a finite number" in refusal(convert, schema, field.name, bad, field.name)


@pytest.mark.parametrize(("schema", "field"), KINDS[bool], ids=key)
def test_convert_takes_true_or_false(schema, field):
    for good in (True, "true", "True", 1):
        assert convert(schema, field.name, good, field.name) is True
    for good in (False, "false", 0):
        assert convert(schema, field.name, good, field.name) is False
    for bad in (5, 0.5, "abc", "", None, "???"):
        assert "expected true or false" in refusal(convert, schema, field.name, bad, field.name)


@pytest.mark.parametrize(("schema", "field"), KINDS[str], ids=key)
def test_convert_takes_words(schema, field):
    assert convert(schema, field.name, "gla", field.name) == "gla"
    for bad in (None, ("a", "b")):
        refusal(convert, schema, field.name, bad, field.name)


@pytest.mark.parametrize(("schema", "field"), KINDS[tuple], ids=key)
def test_convert_takes_lists_of_whole_numbers(schema, field):
    assert convert(schema, field.name, (20, 60), field.name) == (20, 60)
    assert convert(schema, field.name, 20, field.name) == (20,)
    assert convert(schema, field.name, (), field.name) == ()
    for bad in ("20", 1.5, None, True, (20, "a"), (20, True)):
        assert "expected a list of whole numbers [1,2]" in refusal(convert, schema, field.name, bad, field.name)


def test_plain_lists_are_read_where_the_key_takes_one():
    (word,) = parse_words(["cutoffs=[20,60],[30]"])
    assert word.values == ((20, 60), (30,))
    assert "a sweep is written without brackets" in refusal(parse_words, ["d_model=[20,60]"])


@pytest.mark.parametrize(("schema", "field"), CHOICES, ids=key)
def test_convert_takes_only_the_choices(schema, field):
    choices = field.metadata["choices"]
    assert field.default == choices[0]
    assert [convert(schema, field.name, c, field.name) for c in choices] == list(choices)
    for bad in ("abc", 1.5, 7, True, ""):
        message = refusal(convert, schema, field.name, bad, field.name)
        assert message.startswith(f"Unknown {field.name} {str(bad)!r}.")
        assert f"Available: {', '.join(sorted(choices))}." in message
    assert f"{field.name}=null: expected a word" in refusal(convert, schema, field.name, None, field.name)


def test_every_field_has_a_kind_that_these_tests_cover():
    covered = [pair for pairs in KINDS.values() for pair in pairs] + CHOICES
    assert len(covered) == len(FIELDS)


def test_convert_names_the_nearest_choice():
    assert "Did you mean 'learned'?" in refusal(convert, ModelConfig, "positions", "lerned", "positions")


@dataclasses.dataclass(frozen=True)
class Own:
    """Settings such as a mixer has."""

    ratio: int | None = None
    kind: str | None = dataclasses.field(default=None, metadata={"choices": ("a", "b")})
    name: str = "x"
    layers: tuple = ("a", "b")


def test_convert_makes_a_list_of_one_word():
    assert convert(Own, "layers", "gla", "m.layers") == ("gla",)
    assert convert(Own, "layers", ("gla", "gla"), "m.layers") == ("gla", "gla")


@pytest.mark.parametrize(("value", "shown"), [(None, "null"), (3, "[3]"), (("a", 1), "['a', 1]"), (("a", None), "['a', None]")])
def test_convert_takes_only_words_in_a_list(value, shown):
    assert refusal(convert, Own, "layers", value, "m.layers") == f"m.layers={shown}: expected a list of words [a,b]"


@pytest.mark.parametrize(
    ("text", "schema"), [("m.ratio=[a,b]", Own), ("m.other=[a]", Own), ("m.layers=[a]", ModelConfig), ("m.layers=a,[b]", ModelConfig)]
)
def test_lists_are_refused_where_the_key_takes_none(text, schema):
    (word,) = parse_words([text])
    assert refusal(word.check_list, schema) == f"{text!r}: a sweep is written without brackets, {word.name}=a,b"
    parse_words(["m.layers=[a],b"])[0].check_list(Own)


def test_convert_takes_null_where_the_type_has_it():
    assert convert(Own, "ratio", None, "m.ratio") is None
    assert convert(Own, "ratio", 16, "m.ratio") == 16
    assert convert(Own, "kind", None, "m.kind") is None
    assert convert(Own, "kind", "b", "m.kind") == "b"
    assert refusal(convert, Own, "kind", "c", "m.kind") == "Unknown m.kind 'c'. Available: a, b."
    assert refusal(convert, Own, "ratio", "x", "m.ratio") == "m.ratio=x: expected int or null"


def test_convert_makes_text_of_numbers_in_a_text_setting():
    assert convert(Own, "name", 12, "m.name") == "12"
    assert convert(Own, "name", "1e3", "m.name") == "1e3"


@pytest.mark.parametrize(
    ("schema", "changes", "part"),
    [
        (ModelConfig, {"d_model": 0}, "d_model=0 must be at least 1"),
        (ModelConfig, {"num_layers": 0}, "num_layers=0 must be at least 1"),
        (ModelConfig, {"conv": 1}, "conv=1 must be 0 (none) or a width of at least 2"),
        (ModelConfig, {"conv": -4}, "conv=-4"),
        (ModelConfig, {"channel_width": -1}, "channel_width=-1"),
        (ModelConfig, {"dropout": 1.0}, "dropout=1.0 must be at least 0 and less than 1"),
        (ModelConfig, {"embed_dropout": -0.1}, "embed_dropout=-0.1"),
        (ModelConfig, {"embed_std": 0.0}, "embed_std=0.0 must be positive"),
        (ModelConfig, {"embed_std": float("nan")}, "embed_std=nan"),
        (ModelConfig, {"positions": "sinusoid", "d_model": 7}, "positions=sinusoid needs an even d_model, not 7"),
        (TrainConfig, {"lr": 0.0}, "lr=0.0 must be positive"),
        (TrainConfig, {"lr": float("nan")}, "lr=nan"),
        (TrainConfig, {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (TrainConfig, {"epochs": 0}, "epochs=0"),
        (TrainConfig, {"eval_batch_size": 0}, "eval_batch_size=0"),
        (TrainConfig, {"weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
        (TrainConfig, {"clip": -1.0}, "clip=-1.0"),
        (TrainConfig, {"eval_every": -1}, "eval_every=-1"),
        (TrainConfig, {"stop_at": float("nan")}, "stop_at=nan"),
        (TrainConfig, {"warmup": 1.0}, "warmup=1.0 is a share of all steps"),
        (CellConfig, {"seed": -1}, "seed=-1 must be at least 0 and below 2^31"),
        (CellConfig, {"seed": 2**31}, "seed=2147483648"),
    ],
)
def test_schemas_refuse_illegal_values_and_combinations(schema, changes, part):
    assert part in refusal(schema, **changes)


def test_schemas_take_the_limits():
    ModelConfig(d_model=1, num_layers=1, conv=2, dropout=0.0, embed_std=1e-9)
    ModelConfig(positions="sinusoid", d_model=2)
    TrainConfig(weight_decay=0.0, warmup=0.0, batch_size=1)
    CellConfig(seed=2**31 - 1)


def test_schemas_are_frozen_and_share_no_key():
    for schema in SCHEMAS:
        field = dataclasses.fields(schema)[0]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(schema(), field.name, field.default)
    names = [field.name for _, field in FIELDS]
    assert len(names) == len(set(names))
    assert not set(names) & set(PLAN_KEYS)


def test_require_raises_its_message():
    require(True, "no")
    assert refusal(require, False, "d_model=3 must be even") == "d_model=3 must be even"


def test_schema_of_finds_the_section_of_a_key():
    schemas = {"model_config": ModelConfig, "train": TrainConfig}
    assert schema_of(schemas, "lr") == ("train", TrainConfig)
    assert schema_of(schemas, "conv") == ("model_config", ModelConfig)
    assert schema_of(schemas, "vocab_size") is None


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "a whole number"),
        (float, "a number"),
        (bool, "true or false"),
        (str, "a word"),
        (int | None, "int or null"),
        (tuple, "a list of words [a,b]"),
    ],
)
def test_type_name_is_in_words(annotation, words):
    assert type_name(annotation) == words


def test_parsing_and_converting_import_no_torch():
    script = """
        import sys
        from hgrn2_bench.config import TrainConfig, convert, parse_words
        (word,) = parse_words(["lr=1e-3"])
        convert(TrainConfig, "lr", word.values[0], "lr")
        heavy = {"torch", "fla", "triton", "numpy", "pandas", "scipy"} & set(sys.modules)
        assert not heavy, heavy
    """
    lines = "\n".join(line.strip() for line in script.splitlines())
    subprocess.run([sys.executable, "-c", lines], check=True, timeout=60)
