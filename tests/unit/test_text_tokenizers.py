"""The tokenizer in a saved model's folder gives the ids of training, in the hands of its library and of transformers."""

import json
import subprocess
import sys

import pytest
import tokenizers as library

from hgrn2_bench import checkpoints, registry, text_tokenizers, trained
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.language import LanguageModel
from hgrn2_bench.markov import card_of, make_source
from hgrn2_bench.markov_recipe import Recipe
from hgrn2_bench.text_tokenizers import Vocabulary, complete, tokenizer_files_of
from hgrn2_bench.trained import Card
from suites.wikitext import tokenizers
from tests import wikitext_folders as made

WHITE = "".join(chr(i) for i in range(0x3001) if chr(i).isspace() and chr(i) != "\n")
LINES = [
    " = The <unk> theatre = \n",
    "\n",
    " \t \n",
    f"{WHITE}the{WHITE}the the{WHITE}\n",
    "the</s>the </s> <s> <unk> <pad> <|endoftext|> Ċ Ġ ĊĊ \n",
    "漢字, 😀 and ÿ\x00\x1f\x7f é é\r\n",
    "the the \r\n",
    "".join(map(chr, range(1, 10))) + "\n",
]


@pytest.fixture
def bpe(monkeypatch):
    """GPT-2's BPE, made small."""
    vocabulary, merges = made.small_bpe()
    monkeypatch.setattr(tokenizers, "GPT2_ENTRIES", len(vocabulary))
    monkeypatch.setattr(tokenizers, "GPT2_MERGES", len(merges))
    monkeypatch.setattr(tokenizers, "GPT2_PROBE", ("the", (vocabulary["the"],)))
    return tokenizers.Bpe(vocabulary, merges, "here")


@pytest.fixture
def words():
    return tokenizers.Words(["the", "=", "theatre", "é", "##the"])


def readers(folder, tokenizer):
    """The folder's tokenizer as its library and as transformers read it, after a model was saved there."""
    card = Card("hgrn2", {"expand_ratio": 8}, {"tokenizer": f"{tokenizer.name} {tokenizer.hash}, {tokenizer.vocab_size} ids"})
    config = ModelConfig(d_model=8, num_layers=1)
    model = LanguageModel(config, registry.load("hgrn2"), card.settings, "chunked", tokenizer.vocab_size, 16)
    checkpoints.save(model, card, folder, tokenizer.vocabulary)
    return read(folder)


def read(folder):
    import transformers

    plain = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return plain, fast, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "words"])
def test_ids_are_those_of_training_and_a_text_begins_as_it_did_there(kind, tmp_path, request):
    tokenizer = tokenizers.Bytes() if kind == "bytes" else request.getfixturevalue(kind)
    plain, fast, auto = readers(tmp_path / "model", tokenizer)
    for lines in (*([line] for line in LINES), LINES, LINES[::-1]):
        want = tokenizer.encode(lines).ids_N.tolist()
        assert plain.encode("".join(lines)).ids == want
        assert fast("".join(lines))["input_ids"] == want
        assert auto("".join(lines))["input_ids"] == want
    assert fast.bos_token_id == tokenizer.start_id
    assert len(fast) <= tokenizer.vocab_size
    assert max(fast.get_vocab().values()) < tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_a_line_that_is_not_ended_goes_on(kind, tmp_path, request):
    tokenizer = request.getfixturevalue(kind)
    plain, _, _ = readers(tmp_path / "model", tokenizer)
    whole = tokenizer.encode(["the the\n"]).ids_N.tolist()
    assert plain.encode("the the").ids == whole[:-1]
    assert plain.encode("").ids == []


def test_every_byte_comes_back(tmp_path):
    plain, fast, _ = readers(tmp_path / "model", tokenizers.Bytes())
    text = "".join(map(chr, range(0x500))) + "漢字 😀 Ċ"
    assert set(text.encode()) | set(range(256)) == set(range(256))
    assert plain.encode(text).ids == list(text.encode())
    assert plain.decode(list(text.encode()), skip_special_tokens=False) == text
    assert fast.decode(list(text.encode())) == text
    for byte in range(256):
        assert plain.id_to_token(byte) is not None
        assert plain.decode([byte]) == bytes([byte]).decode(errors="replace")


def test_decoded_lines_end_with_newlines(bpe, words, tmp_path):
    plain, _, _ = readers(tmp_path / "bpe", bpe)
    ids = bpe.encode(["the the\n", "é\n"]).ids_N.tolist()
    assert plain.decode(ids, skip_special_tokens=False) == "the the\né\n"
    plain, _, _ = readers(tmp_path / "words", words)
    assert plain.decode(words.encode(["the ##the\n", "é\n"]).ids_N.tolist()) == "the ##the \n é \n"


def test_symbols_are_words_and_other_words_are_left_out(tmp_path):
    recipe = Recipe(symbols=12, facts=2, document=16)
    for name, text in tokenizer_files_of(card_of(make_source(12), recipe)).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "config.json").write_text("{}")
    plain, fast, _ = read(tmp_path)
    for text, ids in (("Question: s1 S11, x s0.\nAnswer: s3", [1, 11, 0, 3]), ("s12 s1s2 as3 s4", [0, 4]), ("Answer:", [])):
        assert plain.encode(text).ids == fast(text)["input_ids"] == ids
    assert plain.decode([1, 11, 0]) == fast.decode([1, 11, 0]) == "s1 s11 s0"
    assert fast.bos_token_id == 0


def test_the_files_change_neither_config_nor_hash_and_can_be_added_later(tmp_path, words):
    readers(tmp_path / "model", words)
    config, found = (tmp_path / "model" / "config.json").read_bytes(), trained.read(tmp_path / "model").hash
    files = {name: (tmp_path / "model" / name).read_text() for name in text_tokenizers.FILES}
    for name in files:
        (tmp_path / "model" / name).unlink()
    assert trained.read(tmp_path / "model").hash == found
    with pytest.raises(ConfigError, match=r"its tokenizer \(word .*\) cannot be made from its card alone") as caught:
        complete(tmp_path / "model")
    assert "\n" not in str(caught.value)
    complete(tmp_path / "model", words.vocabulary)
    assert {name: (tmp_path / "model" / name).read_text() for name in files} == files
    assert (tmp_path / "model" / "config.json").read_bytes() == config
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors", *sorted(files)]


def test_the_card_alone_makes_the_tokenizer_of_bytes():
    files = tokenizer_files_of({"tokenizer": "bytes 0, 256 ids"})
    assert library.Tokenizer.from_str(files["tokenizer.json"]).encode("é").ids == [195, 169]
    assert json.loads(files["tokenizer_config.json"])["bos_token"] == text_tokenizers.NEWLINE


OTHERS = ({}, {"tokenizer": "model 0123, 9 ids"}, {"tokenizer": "word, dict.txt 01, 9 ids"}, {"tokenizer": "gpt2, dict.txt 01, 9 ids"})


@pytest.mark.parametrize("card", OTHERS)
def test_tokenizers_that_are_not_ours_get_no_files(card):
    assert tokenizer_files_of(card, Vocabulary({"</s>": 2})) == {}


def test_a_run_on_words_leaves_the_tokenizer_beside_its_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HGRN2_BENCH_CACHE", str(tmp_path / "cache"))
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("some words that come again\n" * 200)
    words = ("suite=wikitext", "preset=test", "model=hgrn2", "dataset=text", "tokenizer=word", "symbols=64", "facts=0", "document=256")
    command = [sys.executable, "-m", "hgrn2_bench", "run", *words, f"data_dir={tmp_path}", "--results", str(tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("r/cells/wikitext/*/model/tokenizer.json")
    assert library.Tokenizer.from_file(str(path)).encode("again such words\n").ids == [4, 3, 8, 2]
