"""`BenchLM` beside lm-eval's own `hf` model, item by item; what it counts, stores, checks, and refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
from zeroshot_lms import LENGTH, VOCAB, Request, as_fla, model_of, own, questions, tokenizer

from hgrn2_bench.errors import ConfigError
from suites.zeroshot import generation, invariance, lm, scoring
from suites.zeroshot.lm import BenchLM
from suites.zeroshot.reading import Foreign

QUIET = pytest.mark.filterwarnings("ignore")  # lm-eval's model and what it imports warn about themselves
TEXTS = ["hello world " * 30, "a", "", "Some words that are not long."]
PROMPTS = ["hello", "abcde", "some words and more words", "x " * 80]


def close(one: float, other: float) -> bool:
    return one == pytest.approx(other, rel=1e-6, abs=1e-5)


def stock(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)


@QUIET
def test_every_item_scores_as_with_lm_evals_own_model(foreign_folder):
    requests = [each for each in questions() if each.args[0] != " "]  # on which that one stops
    want = stock(foreign_folder).loglikelihood(requests, disable_tqdm=True)
    for batch_size in (1, 8, "auto"):
        got = BenchLM(foreign_folder, device="cpu", batch_size=batch_size).loglikelihood(requests)
        assert all(close(a[0], b[0]) and a[1] == b[1] for a, b in zip(got, want, strict=True))


@QUIET
def test_whole_texts_score_as_with_lm_evals_own_model(foreign_folder):
    requests = [Request((text,)) for text in TEXTS]
    want = stock(foreign_folder).loglikelihood_rolling(requests, disable_tqdm=True)
    got = BenchLM(foreign_folder, device="cpu").loglikelihood_rolling(requests)
    assert all(close(a, b) for a, b in zip(got, want, strict=True))
    assert got[2] == 0.0


@QUIET
@pytest.mark.parametrize("until", [["e", "q"], "o", []])
def test_continuations_are_those_of_lm_evals_own_model(foreign_folder, until):
    requests = [Request((prompt, {"until": until, "max_gen_toks": 12, "do_sample": False})) for prompt in PROMPTS]
    assert BenchLM(foreign_folder, device="cpu").generate_until(requests) == stock(foreign_folder).generate_until(
        requests, disable_tqdm=True
    )


@QUIET
@pytest.mark.parametrize("as_words", [False, True])
def test_a_special_token_ends_a_continuation_as_in_lm_evals_own_model(foreign_folder, tmp_path, as_words):
    """A chat model names several ends in its generation_config; a task may name a special token as an end string."""
    shutil.copytree(foreign_folder, tmp_path, dirs_exist_ok=True)
    usual = BenchLM(foreign_folder, device="cpu", check=False)
    written = generation.generate(usual.reader, [usual.tok_encode(PROMPTS[0])], 3, lambda ids: False)[0]
    told, last = usual.tokenizer, written[2]
    end = told.convert_ids_to_tokens(last)
    told.add_special_tokens({"additional_special_tokens": [end]})
    told.save_pretrained(tmp_path)
    if not as_words:
        config = json.loads((tmp_path / "generation_config.json").read_text())
        (tmp_path / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [1, last]}))
    requests = [Request((prompt, {"until": [end] if as_words else [], "max_gen_toks": 12})) for prompt in PROMPTS]
    got = BenchLM(tmp_path, device="cpu").generate_until(requests)
    assert got == stock(tmp_path).generate_until(requests, disable_tqdm=True)
    assert got[0] == usual.encoder.decode(written[:2])


def test_a_cache_of_keys_and_values_is_shared_and_saves_tokens(foreign_folder):
    model = BenchLM(foreign_folder, device="cpu")
    assert isinstance(model.reader, Foreign)
    assert model.reader.can_reuse
    model.loglikelihood(questions())
    assert model.told()["tokens_saved"] > 0


@pytest.mark.parametrize("words", [{"name": "attention", "positions": "rope"}, {"name": "attention", "positions": "learned"}, {}])
def test_our_models_give_the_continuation_of_the_most_probable_tokens(words):
    model, until = model_of(**words), {"until": ["\x00"], "max_gen_toks": 10}
    bench = BenchLM(model=model, tokenizer=tokenizer(), check=False)
    texts = bench.generate_until([Request((prompt, until)) for prompt in PROMPTS])
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = bench.tok_encode(prompt)[-(LENGTH - 10) :]
        new: list[int] = []
        for _ in range(10):
            new.append(int(model.head(model(torch.tensor([ids + new])))[0, -1].argmax()))
        assert text == bench.encoder.decode(new).split("\x00")[0].split("</s>")[0]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ({"do_sample": True, "temperature": 0.7}, "greedy"),
        ({"temperature": 0.5}, "greedy"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"untill": ["x"]}, "Did you mean 'until'"),
        ({"max_gen_toks": LENGTH}, "leaves no room"),
    ],
)
def test_what_decoding_cannot_do_is_refused_in_one_line(words, fault):
    bench = BenchLM(model=model_of(), tokenizer=tokenizer())
    with pytest.raises(ConfigError, match=fault) as caught:
        bench.generate_until([Request(("x", words))])
    assert "\n" not in str(caught.value)


def test_a_token_before_the_text_changes_nothing_else():
    """Known sums: of a prompt of 3 tokens and an answer of 2 exactly these 2 are summed, with and without the token before the text."""
    model = model_of().double()
    for bos, before in (("never", []), ("always", [0])):
        bench = BenchLM(model=model, tokenizer=tokenizer(), bos=bos)
        ids = [*before, *bench.tok_encode("abc", False), *bench.tok_encode("de", False)]
        with torch.no_grad():
            log_p = model.head(model(torch.tensor([ids])))[0].log_softmax(-1)
        want = float(log_p[-3, ids[-2]] + log_p[-2, ids[-1]])
        ((got, _),) = bench.loglikelihood([Request(("abc", "de"))])
        assert got == pytest.approx(want, abs=1e-9)


def test_our_folders_put_the_token_of_training_before_a_text_and_fla_s_follow_their_tokenizer(own_folder, tmp_path):
    as_fla(tmp_path / "fla", own_folder)
    ours, theirs = BenchLM(own_folder, device="cpu"), BenchLM(tmp_path / "fla", device="cpu")
    assert ours.tok_encode("ab")[0] == 0
    assert theirs.tok_encode("ab") == ours.tok_encode("ab")[1:]
    assert ours.tok_encode("<s>ab") == ours.tok_encode("ab")
    assert "before every text" in ours.told()["bos"]
    with pytest.raises(ConfigError, match="Unknown bos 'alwys'"):
        BenchLM(own_folder, device="cpu", bos="alwys")


def test_a_tokenizer_that_adds_its_token_itself_is_followed(foreign_folder, tmp_path):
    from tokenizers.processors import TemplateProcessing

    adding = tokenizer()
    adding._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bench = BenchLM(foreign_folder, device="cpu", tokenizer=adding)
    assert bench.tok_encode("ab")[0] == 0
    assert bench.tok_encode("<s>ab") == bench.tok_encode("ab")
    assert BenchLM(foreign_folder, device="cpu", tokenizer=adding, bos="never").tok_encode("ab") == bench.tok_encode("ab")[1:]


def test_an_fla_folder_scores_as_the_model_that_it_was_written_from(own_folder, tmp_path):
    model = as_fla(tmp_path / "fla", own_folder)
    bench = BenchLM(tmp_path / "fla", device="cpu")
    assert bench.max_length == LENGTH
    for request, (log_p, _) in zip(questions(), bench.loglikelihood(questions()), strict=True):
        ((context, continuation),) = bench.encoder.pairs([request.args])
        ids = torch.tensor([[*context, *continuation]])[:, -(LENGTH + 1) :]
        nats_BT, _ = model.losses(ids[:, :-1], ids[:, 1:])
        assert log_p == pytest.approx(-float(nats_BT[0, -len(continuation) :].sum()), abs=1e-3)


def test_too_long_requests_lose_their_beginning_and_are_listed(own_folder):
    bench = BenchLM(own_folder, device="cpu")
    bench.loglikelihood(questions())
    told = bench.told()
    assert told["truncated"] == 1
    assert told["items"]["truncated"] == [{"task": "choices", "doc": 91, "choice": 0, "tokens": 305}]
    assert json.loads(json.dumps(told)) == told


def test_too_long_requests_are_left_out_where_that_is_asked_for(own_folder):
    bench = BenchLM(own_folder, device="cpu", truncation="skip")
    scores = bench.loglikelihood(questions())
    assert math.isnan(scores[-1][0])
    assert not any(math.isnan(score) for score, _ in scores[:-1])
    assert (bench.told()["skipped"], bench.told()["truncated"]) == (1, 0)
    bench.generate_until([Request((prompt, {"max_gen_toks": 2}), "t", n) for n, prompt in enumerate(PROMPTS)])
    assert bench.told()["items"]["skipped"][1:] == [{"task": "t", "doc": 3, "choice": 0, "tokens": 161}]
    with pytest.raises(ConfigError, match="truncation"):
        BenchLM(own_folder, device="cpu", truncation="right")


def test_empty_continuations_stop_nothing(own_folder):
    bench = BenchLM(own_folder, device="cpu")
    found = bench.loglikelihood([Request(("a", ""), "t", 4, 1), Request(("", "")), Request(("a", "b"))])
    assert found[:2] == [(0.0, True), (0.0, True)]
    assert math.isfinite(found[2][0])
    assert bench.told()["empty"] == 2
    assert bench.told()["items"]["empty"][0] == {"task": "t", "doc": 4, "choice": 1}


def test_a_continuation_that_is_longer_than_all_that_is_read_is_scored_in_windows(own_folder):
    """Each token once: the sum of windows that follow one another, the first after the last token of the context."""
    bench = BenchLM(own_folder, device="cpu", max_length=16, check=False)
    continuation = " and so on and on and on and on and on"
    ((log_p, _),) = bench.loglikelihood([Request(("first", continuation), "t", 4, 1)])
    ids, before = bench.tok_encode(continuation, False), bench.tok_encode("first", False)[-1]
    starts = range(0, len(ids), 16)
    expected = 0.0
    for start in starts:
        window = torch.tensor([[before, *ids][max(0, min(start, len(ids) - 16)) : min(start + 16, len(ids)) + 1]])
        nats_BT, _ = bench.model.losses(window[:, :-1], window[:, 1:])
        expected -= float(nats_BT[0, -(min(start + 16, len(ids)) - start) :].sum())
    assert log_p == pytest.approx(expected, abs=1e-3)
    assert bench.told()["items"]["truncated"] == [{"task": "t", "doc": 4, "choice": 1, "tokens": len(ids) + 6}]
    assert math.isnan(
        BenchLM(own_folder, device="cpu", max_length=16, truncation="skip").loglikelihood([Request(("first", continuation))])[0][0]
    )


class Counted(scoring.Scorer):
    """A scorer that stops after some passes."""

    passes, most = 0, 10**9

    def run(self, batch: scoring.Pass) -> dict[int, scoring.Score]:
        if Counted.passes >= Counted.most:
            raise KeyboardInterrupt
        Counted.passes += 1
        return super().run(batch)


@pytest.mark.parametrize("cut", [0, 20])
def test_what_was_finished_before_a_kill_is_not_scored_again(own_folder, tmp_path, monkeypatch, cut):
    requests, store = questions(), tmp_path / "results.jsonl"
    words = {"device": "cpu", "batch_size": 3, "check": False}
    want = BenchLM(own_folder, **words).loglikelihood(requests)
    monkeypatch.setattr(lm, "Scorer", Counted)
    monkeypatch.setattr(Counted, "passes", 0)
    monkeypatch.setattr(Counted, "most", 6)
    with pytest.raises(KeyboardInterrupt):
        BenchLM(own_folder, store=store, **words).loglikelihood(requests)
    with store.open("rb+") as file:  # as a kill in the middle of a line leaves it
        file.truncate(store.stat().st_size - cut)
    monkeypatch.setattr(Counted, "most", 10**9)
    again = BenchLM(own_folder, store=store, **words)
    assert again.loglikelihood(requests) == want
    done = Counted.passes
    assert done == len(again.scorer.plan(_asked(again, requests))) + (1 if cut else 0)
    assert again.told()["stored"] > 0
    assert BenchLM(own_folder, store=store, **words).loglikelihood(requests) == want
    assert Counted.passes == done


def _asked(bench: BenchLM, requests: list[Request]) -> list[Any]:
    pairs = bench.encoder.pairs([each.args for each in requests])
    return [(n, *scoring.fitted(pair, bench.max_length)) for n, pair in enumerate(pairs)]


def test_no_answer_is_taken_over_from_the_same_weights_with_another_tokenizer(own_folder, tmp_path):
    words = {"device": "cpu", "check": False, "store": tmp_path / "results.jsonl"}
    BenchLM(own_folder, **words).loglikelihood(questions())
    shutil.copytree(own_folder, tmp_path / "other")
    path = tmp_path / "other/tokenizer.json"
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["e"] = ids["e"], ids["a"]
    path.write_text(json.dumps(content))
    other = BenchLM(tmp_path / "other", **words)
    assert other.loglikelihood(questions()) == BenchLM(tmp_path / "other", device="cpu", check=False).loglikelihood(questions())
    assert other.told()["stored"] == 0


def test_texts_and_continuations_are_stored_too(own_folder, tmp_path, monkeypatch):
    store = tmp_path / "results.jsonl"
    texts, prompts = [Request((t,)) for t in TEXTS], [Request((p, {"max_gen_toks": 5})) for p in PROMPTS]
    first = BenchLM(own_folder, device="cpu", store=store)
    want = first.loglikelihood_rolling(texts), first.generate_until(prompts)
    again = BenchLM(own_folder, device="cpu", store=store, check=False)
    monkeypatch.setattr(again.model, "hidden", None)
    assert (again.loglikelihood_rolling(texts), again.generate_until(prompts)) == want


def test_results_of_other_weights_or_rules_are_not_taken(own_folder, tmp_path):
    store, requests = tmp_path / "results.jsonl", questions()[:4]
    other = own(tmp_path / "other", forget_bias=2.0)
    for words in ({}, {"bos": "never"}, {"max_length": 64}, {"dtype": "float64"}, {"pretrained": other}):
        bench = BenchLM(**{"pretrained": own_folder, "device": "cpu", "store": store} | words)
        bench.loglikelihood(requests)
        assert bench.told()["stored"] == 0


def test_the_check_compares_batches_and_reports_the_largest_difference(own_folder):
    bench = BenchLM(own_folder, device="cpu")
    bench.loglikelihood(questions())
    found = bench.told()["invariance"]
    assert found["requests"] == invariance.CHECKED
    assert 0 <= found["difference"] < 1e-5 < found["tolerance"] == 1e-3
    unchecked = BenchLM(own_folder, device="cpu", check=False)
    unchecked.loglikelihood(questions())
    assert unchecked.told()["invariance"] is None


def test_a_model_whose_scores_depend_on_the_batch_is_an_error():
    model = model_of()
    whole = model.hidden
    model.hidden = lambda ids, *states, **words: whole(ids.flip(1), *states, **words)  # as if padding were on the left
    with pytest.raises(invariance.InvarianceError, match="scores depend on the batch: at batch 1 and 8 they differ by"):
        BenchLM(model=model, tokenizer=tokenizer()).loglikelihood(questions())


def test_worse_than_guessing_is_said(own_folder):
    bench = BenchLM(own_folder, device="cpu")
    with torch.no_grad():
        bench.model.embedding.weight.mul_(5)
    bench.loglikelihood_rolling([Request((TEXTS[3],)), Request((TEXTS[3][1:],))])
    (warning,) = bench.told()["warnings"]
    assert f"above the vocabulary of {VOCAB}" in warning
    choices = BenchLM(model=bench.model, tokenizer=bench.tokenizer)
    choices.loglikelihood([Request(("a", " of choices")), Request(("a", " one is wrong"))])
    assert choices.told()["warnings"] == []


def test_a_model_in_memory_computes_in_the_type_asked_for():
    model, requests = model_of(), questions()
    exact = BenchLM(model=model, tokenizer=tokenizer()).loglikelihood(requests)
    bench = BenchLM(model=model, tokenizer=tokenizer(), dtype="bfloat16")
    coarse = bench.loglikelihood(requests)
    assert exact != coarse
    assert bench.invariance is not None
    assert bench.invariance.tolerance == 0.25
    assert all(abs(a[0] - b[0]) < 0.05 * abs(a[0]) + 1 for a, b in zip(exact, coarse, strict=True))
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ({"dtyp": "float32"}, "Did you mean 'dtype'"),
        ({"trust_remote_code": True}, "Unknown model argument 'trust_remote_code'"),
        ({"batch_size": 0}, "batch_size=0 must be a number"),
        ({"dtype": "int4"}, "Unknown dtype 'int4'"),
        ({"backend": "fla"}, "needs a CUDA device"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(own_folder, words, fault):
    with pytest.raises(ConfigError, match=fault):
        BenchLM(own_folder, **{"device": "cpu"} | words)


def test_arguments_come_as_lm_eval_gives_them(own_folder):
    text = f"pretrained={own_folder},dtype=float32,max_length=64"
    bench = BenchLM.create_from_arg_string(text, {"batch_size": "auto:4", "max_batch_size": None, "device": "cpu"})
    assert (bench.max_length, bench.batch_size, bench.rank, bench.world_size) == (64, "auto", 0, 1)


def test_lm_evals_own_cache_of_answers_is_refused(own_folder, tmp_path):
    from lm_eval.api.model import CachingLM

    with pytest.raises(ConfigError, match="does not know whose answers"):
        CachingLM(BenchLM(own_folder, device="cpu"), str(tmp_path / "cache.db"))
