"""`tokenizer=model`: the text as the tokenizer of a published model sees it, what stands before it, and what is refused."""

import json
import math

import numpy as np
import pytest
import tokenizers as library
import torch
import wikitext_folders as made

from hgrn2_bench import engine, fla_models, registry
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.language import LanguageModel
from hgrn2_bench.plan import make_plan
from suites.wikitext import model_tokenizer, texts

WORDS = ("suite=wikitext", "dataset=text", "tokenizer=model", "block=8", "window=4", "curve=16")
TEXT = "".join(made.LINES["test"])


def tokenizer(*added):
    """A byte-level BPE whose white space joins across line ends, and its special tokens."""
    alphabet = made.byte_alphabet()
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ċ", "Ġ"), ("Ġ", "Ċ")]
    entries = [*alphabet, *("".join(pair) for pair in merges)]
    found = library.Tokenizer(library.models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=merges))
    found.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = library.decoders.ByteLevel()
    found.add_special_tokens(list(added))
    return found


def write(folder, vocab_size=270, beside=(("tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"}),)):
    """A model in fla's format with a tokenizer."""
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=16, num_layers=1, lower_bound="inclusive", channel_mixer="glu", glu_bias=False, norm="rmsnorm", norm_eps=1e-6, embed_std=1.0
    )
    settings = {"variant": "fla", "expand_ratio": 8}
    fla_models.save(LanguageModel(config, registry.load("hgrn2"), settings, "chunked", vocab_size, 8), folder)
    tokenizer("<s>", "</s>").save(str(folder / "tokenizer.json"))
    for name, content in beside:
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HGRN2_BENCH_CACHE", str(tmp_path / "cache"))
    texts.load.cache_clear()
    texts._fingerprint.cache_clear()
    model_tokenizer.read.cache_clear()
    made.write_json(tmp_path / "data")
    return write(tmp_path / "tiny")


def one(folder, *words):
    (cell,) = make_plan([*WORDS, f"model={folder}", *words], "cpu").cells
    return cell


def run(cell, results):
    made_folder = CellFolder(results, cell)
    with made_folder.lock():
        return {(row.split, row.metric): row for row in engine.run_cell(cell, made_folder, lambda *_: None, lambda: False)}


def test_the_nats_are_those_of_the_model_on_its_own_tokens(folder, tmp_path):
    cell = one(folder)
    rows = run(cell, tmp_path)
    model, ids = fla_models.load(folder), tokenizer("<s>", "</s>").encode(TEXT, add_special_tokens=False).ids
    start = tokenizer("<s>", "</s>").token_to_id("<s>")
    nats, _ = model.losses(torch.tensor([[start, *ids[:-1]]]), torch.tensor([ids]))
    row = rows["test", "nats_carried"]
    assert row.value == pytest.approx(nats.sum().item(), rel=1e-5)
    assert (row.status, row.num_items, row.steps) == ("ok", len(ids), 0)
    words, size = sum(len(line.split()) + 1 for line in made.LINES["test"]), len(TEXT.encode())
    assert rows["test", "word_perplexity_carried"].value == pytest.approx(math.exp(row.value / words))
    assert rows["test", "bits_per_byte_carried"].value == pytest.approx(row.value / math.log(2) / size)
    assert (cell.task, row.model.split("@")[0], row.details["trained_tokens"]) == ("text-model", "tiny", None)
    assert row.card["tokenizer"] == f"model {model_tokenizer.hash_of(folder)}, 263 ids"
    assert ("test_to_16", "nats_per_token") in rows


def test_ids_are_of_the_whole_text_and_lengths_of_its_lines(folder):
    lines = [*made.LINES["train"], "Ünï\n", "end"]
    found = model_tokenizer.read(folder).encode(lines)
    assert found.ids_N.tolist() == tokenizer("<s>", "</s>").encode("".join(lines)).ids
    assert found.lengths_L.sum() == len(found.ids_N)
    assert tokenizer("<s>", "</s>").decode(found.ids_N.tolist(), skip_special_tokens=False) == "".join(lines)
    alone = [len(tokenizer("<s>", "</s>").encode(line).ids) for line in lines]
    assert np.abs(found.lengths_L - alone).max() == 1  # a token that spans a line's end belongs to the line where it begins


@pytest.mark.parametrize(
    ("beside", "start"),
    [
        ([("tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>"})], "<s>"),
        ([("tokenizer_config.json", {"bos_token": None, "eos_token": "</s>"}), ("config.json", {"bos_token_id": 5})], "</s>"),
        ([("special_tokens_map.json", {"bos_token": "</s>"})], "</s>"),
        ([("config.json", {"bos_token_id": 7, "eos_token_id": 8})], 7),
        ([("config.json", {"eos_token_id": 8})], 8),
    ],
)
def test_what_stands_before_a_text_is_bos_else_eos(folder, tmp_path, beside, start):
    other = write(tmp_path / "other", beside=beside)
    expected = tokenizer("<s>", "</s>").token_to_id(start) if isinstance(start, str) else start
    assert model_tokenizer.read(other).start_id == expected
    assert model_tokenizer.hash_of(other) != model_tokenizer.hash_of(
        write(tmp_path / "third", beside=[("config.json", {"bos_token_id": 9})])
    )


def test_another_tokenizer_is_another_fingerprint_wherever_it_lies(folder, tmp_path):
    moved = write(tmp_path / "elsewhere" / "tiny")
    assert one(moved).data.fingerprint == one(folder).data.fingerprint
    assert one(moved).key == one(folder).key
    tokenizer("<s>", "</s>", "<more>").save(str(moved / "tokenizer.json"))
    assert one(moved).data.fingerprint != one(folder).data.fingerprint
    assert one(moved).key != one(folder).key


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer=model: .*tokenizer.json is missing"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json is damaged"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "says which token begins or ends a text"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        one(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").write_text('{"model": 1}'), "tokenizer.json: no tokenizer, or cut short"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"bos_token": "<none>"}'), "has no token '<none>'"),
        (lambda f: write(f, vocab_size=262), "tiny has 262 ids, tokenizer=model of this text has 263"),
    ],
)
def test_a_tokenizer_that_does_not_go_with_the_model_is_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        engine.build(one(folder))
    assert "\n" not in str(caught.value)


def test_a_model_that_learns_has_no_tokenizer(folder):
    with pytest.raises(ConfigError, match="tokenizer=model is that of a trained model: name its folder, model=DIR"):
        make_plan([*WORDS, "preset=short", "model=hgrn2"], "cpu")
