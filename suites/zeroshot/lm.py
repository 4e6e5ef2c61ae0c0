"""A model as lm-eval asks it: log-likelihoods of continuations and of whole texts, and greedy continuations of prompts.

`lm_eval --model hgrn2_bench --model_args pretrained=DIR` and suite zeroshot both use `BenchLM`. Every answer is the one that lm-eval's own
`hf` model gives for the same weights, but for rounding; where that one would stop (an empty continuation, one that is too long, a context
of white space) there is an answer, and the case is counted.
"""

import contextlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from hgrn2_bench import files, hub, weights
from hgrn2_bench.errors import ConfigError
from suites.zeroshot import generation, loading
from suites.zeroshot.encoding import Encoder
from suites.zeroshot.invariance import Found, check
from suites.zeroshot.options import Options
from suites.zeroshot.ranks import Ranks
from suites.zeroshot.reading import Ours
from suites.zeroshot.scoring import CERTAIN, Pair, Score, Scorer, fitted
from suites.zeroshot.store import Store, key_of

logger = logging.getLogger("hgrn2_bench.zeroshot")
tqdm.set_lock(threading.RLock())  # its usual lock is one between processes, which a worker leaves behind when it is ended
SKIPPED = Score(math.nan, False)
"""Of a request that is left out: lm-eval cannot leave one out, so its means become NaN, or count it as wrong; suite zeroshot drops it."""


class BenchLM(TemplateLM):
    """A causal language model of a folder, of the hub, or one in memory, as lm-eval asks it."""

    seconds = 0.0
    """That its requests took."""
    invariance: Found | None = None
    """What the check saw, once it was made."""
    _autocast: torch.dtype | None = None

    def __init__(
        self,
        pretrained: str | Path = "",
        *,
        model: Any = None,
        tokenizer: Any = None,
        own: bool = True,
        store: str | Path | None = None,
        **words: Any,
    ) -> None:
        """`pretrained` names a folder or a model of the hub; or `model` and `tokenizer` are given, and `words` are those of `Options`.

        Weights of a folder get the type `dtype`; a model in memory keeps its own and computes under an autocast to it. One that was trained
        here (`own`; a folder says so itself) always had the token that begins a text before it, of others the tokenizer decides.
        ConfigError or DataError, one line, where something cannot be loaded or run.
        """
        super().__init__()
        self.options = Options.of(words)
        if bool(pretrained) == (model is not None):
            raise ConfigError("give pretrained=DIR, a folder or a name on the Hugging Face hub")
        self.ranks = Ranks()
        identity = ""
        if model is None:
            folder = hub.folder_of(str(pretrained))
            own, identity = loading.is_own_folder(folder), identity_of(folder)
            model, found = loading.load(folder, self.options.backend, self.ranks.device(self.options.device), self.options.dtype)
            tokenizer = tokenizer or found
        elif self.options.dtype != "auto":
            self._autocast = loading.dtype_of({}, self.options.dtype, "cpu")
        self.model, self.tokenizer = model, tokenizer
        self.reader = loading.reader_of(model, tokenizer, self.options.max_length)
        self._device = self.reader.device
        is_ours = own and isinstance(self.reader, Ours)
        self.encoder = Encoder(tokenizer, "always" if is_ours and self.options.bos == "auto" else self.options.bos)
        self.scorer = Scorer(self.reader, self.options.limits(self.reader))
        self.stored = Store(None if store is None else Path(store))
        self._asked_as = (identity, str(self._dtype), self.encoder.bos, self.options.truncation, self.max_length)
        self._is_checked = not self.options.check
        self.noted: dict[str, list[dict[str, Any]]] = {"truncated": [], "skipped": [], "empty": []}
        self.counts, self.warnings = Counter[str](), list[str]()

    @property
    def _dtype(self) -> torch.dtype:
        """The coarsest type that computes."""
        return self._autocast or next(self.model.parameters()).dtype

    @property
    def max_length(self) -> int:
        """Tokens that it reads of one request."""
        return self.reader.max_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.encoder.end_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text."""
        return self.encoder.prefix_id

    @property
    def batch_size(self) -> int | str:
        """Requests of a pass."""
        return self.options.rows or "auto"

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """Processes among which lm-eval divides the items of a task."""
        return self.ranks.size

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests, which holds texts and no answers."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one after another."""
        return self.ranks.all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, at process `dst`."""
        return self.ranks.gather_object(obj, dst)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.ranks.barrier()

    def set_cache_hook(self, cache_hook: Any) -> None:
        """ConfigError for lm-eval's cache of answers, which does not know from which model they are."""
        if cache_hook.dbdict is not None:
            raise ConfigError("use_cache: lm-eval's cache does not know whose answers it holds; give --model_args store=FILE instead")
        super().set_cache_hook(cache_hook)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one prompt, as the tokenizer has it. ConfigError where it has no template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError("apply_chat_template: the tokenizer of this model has no chat template")
        words = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **words))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text."""
        return self.encoder.encode(string, add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log p in nats of each continuation after its context, and whether greedy decoding would give it."""
        texts = [tuple(request.args) for request in requests]
        pairs = self.encoder.pairs(texts)
        pieces = [self._pieces(*each) for each in zip(pairs, requests, strict=True)]
        scores = self._summed(pieces, [self._key("loglikelihood", *text) for text in texts], requests, disable_tqdm)
        times = Counter(context for context, _ in texts)  # of several choices most are wrong, and should be improbable
        single = [n for n, (context, _) in enumerate(texts) if times[context] == 1]
        self._warn_of_guessing([(len(pairs[n][1]), scores[n].log_p) for n in single])
        return [(each.log_p, each.is_greedy) for each in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log p of each text, of which every token is predicted once, in windows as lm-eval cuts them."""
        texts = [request.args[0] for request in requests]
        pieces = [self._windows(ids, self.prefix_token_id) for ids in self.encoder.rolling(texts)]
        keys = [self._key("loglikelihood_rolling", text) for text in texts]
        scores = self._summed(pieces, keys, requests, disable_tqdm)
        lengths = [sum(len(continuation) for _, continuation in those) for those in pieces]
        self._warn_of_guessing([(length, each.log_p) for length, each in zip(lengths, scores, strict=True)])
        return [each.log_p for each in scores]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The same for pairs of ids."""
        pieces = [self._pieces((context, continuation), text) for text, context, continuation in requests]
        keys = [self._key("tokens", context, continuation) for _, context, continuation in requests]
        return [(each.log_p, each.is_greedy) for each in self._summed(pieces, keys, requests, disable_tqdm)]

    def _pieces(self, pair: Pair, request: Any) -> list[Pair]:
        """A pair as it can be read: a continuation that alone is too long in windows, each of its tokens predicted once."""
        if len(pair[1]) <= self.max_length or self.options.truncation == "skip":
            return [pair]
        self._note("truncated", request, tokens=len(pair[0]) + len(pair[1]))
        return self._windows(list(pair[1]), pair[0][-1])

    def _windows(self, ids: list[int], before: int) -> list[Pair]:
        """Ids after the token before them, in windows as lm-eval cuts them."""
        return list(map(make_disjoint_window, get_rolling_token_windows(ids, before, max_seq_len=self.max_length, context_len=1)))

    def _key(self, kind: str, *args: Any) -> str:
        return key_of(kind, *self._asked_as, *args)

    def _summed(self, pieces: Sequence[Sequence[Pair]], keys: Sequence[str], requests: Sequence[Any], disable_tqdm: bool) -> list[Score]:
        """The score of every request, which is the sum of those of its pieces."""
        places = [(number, place) for number, those in enumerate(pieces) for place in range(len(those))]
        pairs = [pieces[number][place] for number, place in places]
        own = [f"{keys[number]} {place}" for number, place in places]
        scores = self._scores(pairs, own, [requests[number] for number, _ in places], disable_tqdm)
        found = [CERTAIN] * len(pieces)
        for (number, _), score in zip(places, scores, strict=True):
            found[number] = Score(found[number].log_p + score.log_p, found[number].is_greedy and score.is_greedy)
        return found

    def _scores(self, pairs: Sequence[Pair], keys: Sequence[str], requests: Sequence[Any], disable_tqdm: bool) -> list[Score]:
        """The score of every pair: from the store what is there, the rest by passes, each kept as soon as it is known."""
        self._check_ids(pairs)
        known: dict[int, Score] = {}
        asked = []
        for number, pair in enumerate(pairs):
            context, continuation = fitted(pair, self.max_length)
            if (score := self._special(pair, context, requests[number])) is not None:
                known[number] = score
            else:
                asked.append((number, context, continuation))
        with self._working(len(pairs), disable_tqdm) as advance:
            self._check_once([(context, continuation) for _, context, continuation in asked])
            advance(len(known))
            for batch in self.scorer.plan(asked):
                numbers = batch.requests
                if all(keys[number] in self.stored.found for number in numbers):
                    self.counts["stored"] += len(numbers)
                    known |= {number: Score(*self.stored.found[keys[number]]) for number in numbers}
                else:
                    found = self.scorer.run(batch)
                    self.stored.add({keys[number]: list(score) for number, score in found.items()})
                    known |= found
                advance(len(numbers))
        return [known[number] for number in range(len(pairs))]

    def _special(self, pair: Pair, context: Sequence[int], request: Any) -> Score | None:
        """The score of a pair that is not read, and a note of everything that is not scored as it stands."""
        if not pair[1]:
            self._note("empty", request)
            return CERTAIN
        if len(context) < len(pair[0]):
            kind = "skipped" if self.options.truncation == "skip" else "truncated"
            self._note(kind, request, tokens=len(pair[0]) + len(pair[1]))
            return SKIPPED if kind == "skipped" else None
        return None

    def _note(self, kind: str, request: Any, **more: Any) -> None:
        where = {"task": "task_name", "doc": "doc_id", "choice": "idx"}
        self.noted[kind].append({name: getattr(request, attribute, None) for name, attribute in where.items()} | more)

    def _check_ids(self, pairs: Sequence[Pair]) -> None:
        """ConfigError for a token that the model does not have."""
        largest = max((max(part) for pair in pairs for part in pair if part), default=0)
        if largest >= self.reader.vocab_size:
            raise ConfigError(
                f"the tokenizer gives token {largest}, the model has {self.reader.vocab_size}: it is another model's tokenizer"
            )

    def _check_once(self, pairs: Sequence[Pair]) -> None:
        """The first time, see that batches do not matter."""
        if pairs and not self._is_checked:
            self.invariance = check(self.reader, pairs, self.max_length, self._dtype)
            self._is_checked = True

    def _warn_of_guessing(self, found: Sequence[tuple[int, float]]) -> None:
        """Say so where, by tokens and log p of texts, the model is worse than one that takes every token for equally likely."""
        finite = [(length, log_p) for length, log_p in found if math.isfinite(log_p)]
        tokens, nats = sum(length for length, _ in finite), -sum(log_p for _, log_p in finite)
        if tokens and nats > tokens * math.log(self.reader.vocab_size):
            seen = f"perplexity {math.exp(min(nats / tokens, 700.0)):.4g} a token over {tokens:,} tokens"
            self.warnings.append(
                f"{seen} is above the vocabulary of {self.reader.vocab_size:,}, worse than guessing: "
                f"is this the model's tokenizer, and was it trained with bos as here ({self.encoder.told})?"
            )
            logger.warning(self.warnings[-1])

    @contextlib.contextmanager
    def _working(self, requests: int, disable_tqdm: bool) -> Iterator[Callable[[int], object]]:
        """Count time and show progress; a model in memory computes in the type that was asked for."""
        began = time.perf_counter()
        self.counts["requests"] += requests
        cast = torch.autocast(self._device.type, self._autocast or torch.bfloat16, enabled=self._autocast not in (None, torch.float32))
        with tqdm(total=requests, disable=True if disable_tqdm or self.rank else None, desc="requests") as bar, cast:
            yield bar.update
        self.seconds += time.perf_counter() - began

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each prompt up to the first of its end strings, or the model's own end of text.

        ConfigError, one line, for sampling, and where no room is left for the prompt.
        """
        asked: dict[generation.Settings, list[int]] = {}
        for number, request in enumerate(requests):
            asked.setdefault(generation.settings_of(request.args[1]), []).append(number)
        encoded = self.encoder.encode_all(request.args[0] for request in requests)
        found: dict[int, str] = {}
        with self._working(len(requests), disable_tqdm) as advance:
            for settings, numbers in asked.items():
                prompts = {number: self._prompt(encoded[requests[number].args[0]], settings, requests[number]) for number in numbers}
                for batch in generation.batches([prompts[n] for n in numbers], self.options.rows or 32, self.reader.can_join):
                    chosen = [numbers[place] for place in batch]
                    keys = [self._key("generate_until", requests[n].args[0], settings.until, settings.most) for n in chosen]
                    if all(key in self.stored.found for key in keys):
                        self.counts["stored"] += len(chosen)
                        texts = [self.stored.found[key] for key in keys]
                    else:
                        texts = self._generated([prompts[n] for n in chosen], settings)
                        self.stored.add(dict(zip(keys, texts, strict=True)))
                    found |= dict(zip(chosen, texts, strict=True))
                    advance(len(chosen))
        return [found[number] for number in range(len(requests))]

    def _prompt(self, ids: list[int], settings: generation.Settings, request: Any) -> list[int]:
        """The end of a prompt that leaves room for what is to come; never empty. One to be skipped is continued too, and noted as such."""
        room = self.max_length - settings.most
        if room < 1:
            raise ConfigError(f"max_gen_toks={settings.most} leaves no room for a prompt in max_length={self.max_length}: raise max_length")
        if len(ids) > room:
            self._note("skipped" if self.options.truncation == "skip" else "truncated", request, tokens=len(ids))
        return ids[-room:] or [self.prefix_token_id]

    def _generated(self, prompts: list[list[int]], settings: generation.Settings) -> list[str]:
        """Continuations, cut at their end strings."""
        self._check_ids([(prompt, ()) for prompt in prompts])
        until = [*settings.until, self.encoder.end]

        def is_done(ids: list[int]) -> bool:
            if ids[-1] == self.eot_token_id or ids[-1] in self.reader.ends:
                return True
            text = self.encoder.decode(ids, special=True)  # an end string may be a special token
            return any(end and end in text for end in settings.until)

        found = generation.generate(self.reader, prompts, settings.most, is_done)
        ended = [ids[:-1] if ids and ids[-1] == self.eot_token_id else ids for ids in found]
        return [generation.cut_at(self.encoder.decode(ids), until) for ids in ended]

    def told(self) -> dict[str, Any]:
        """What scoring saw and did: counts, the requests that were not scored as they stand, the check, and what was saved."""
        found = self.invariance
        counts = {kind: len(items) for kind, items in self.noted.items()}
        return {
            "requests": self.counts["requests"],
            "stored": self.counts["stored"],
            **counts,
            "items": {kind: items for kind, items in self.noted.items() if items},
            "invariance": None if found is None else found._asdict(),
            "seconds": self.seconds,
            "tokens": self.scorer.read,
            "tokens_saved": self.scorer.saved,
            "bos": self.encoder.told,
            "truncation": self.options.truncation,
            "max_length": self.max_length,
            "batch_size": self.batch_size,
            "warnings": list(dict.fromkeys(self.warnings)),
        }

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's own report."""
        return {"model_num_parameters": sum(p.numel() for p in self.model.parameters()), "hgrn2_bench": self.told()}


def identity_of(folder: Path) -> str:
    """16 hex digits that tell a folder's model from others: over its configuration, its tokenizer, and its weights' sizes and ends."""
    paths = [folder / "config.json", *weights.tokenizer_files(folder), *sorted(folder.glob("*.safetensors"))]
    return files.fingerprint((path.name, path) for path in paths if path.is_file())
