"""How models are read: ours and those of transformers, as `suites.zeroshot.scoring` and `suites.zeroshot.generation` ask it.

No attention mask is given: padding stands on the right of what is scored, where a causal model does not look.

Shape letters: B rows, T tokens, M positions, D width, V vocabulary.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hgrn2_bench.decoding import Decoder
from hgrn2_bench.interfaces import MixerState
from hgrn2_bench.language import LanguageModel
from suites.zeroshot.scoring import CHUNK_LOGITS


class Repeated(Sequence[MixerState]):
    """The states of all layers with rows repeated, each layer's made when it is asked for: all at once they would fill the memory."""

    def __init__(self, states: Sequence[MixerState], rows_B: Tensor) -> None:
        self.states, self.rows_B = states, rows_B

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.states)

    def __getitem__(self, layer: Any) -> Any:
        """The state of one layer."""
        return {name: tuple(t.index_select(0, self.rows_B) for t in tensors) for name, tensors in self.states[layer].items()}


class Ours:
    """A language model of ours.

    Its states, the caches of attention among them, may follow a common beginning, unless positions are looked up in a table.
    """

    ends: frozenset[int] = frozenset()

    def __init__(self, model: LanguageModel) -> None:
        """ValueError for a model in training mode."""
        if model.training:
            raise ValueError("scoring needs the model in eval mode: call model.eval() first")
        self.model, self.vocab_size = model, model.vocab_size
        table = model.position_table()
        self.can_reuse = table is None and model.config.scan == "causal"
        self.can_join = model.can_carry
        self.max_length = model.max_len
        self.longest = None if table is None else len(table)
        """Tokens that can be read at all; None without such a limit."""

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.embedding.weight.device

    def read(self, ids_BT: Tensor) -> Sequence[MixerState]:
        """States after prompts of one length."""
        states = self.model.hidden(ids_BT, return_states=True)[1]
        assert states is not None
        return states

    def repeated(self, states: Sequence[MixerState], rows_B: Tensor) -> Sequence[MixerState]:
        """States of which row b is row `rows_B[b]` of those given."""
        return Repeated(states, rows_B)

    def logits(self, ids_BT: Tensor, where_M: Tensor, states: Sequence[MixerState] | None = None) -> Iterator[Tensor]:
        """Logits at flat positions of (B, T), in parts (m, V)."""
        x_BTD, _ = self.model.hidden(ids_BT, states)
        x_MD = x_BTD.flatten(0, 1).index_select(0, where_M)
        return map(self.model.head, x_MD.split(max(1, CHUNK_LOGITS // self.vocab_size)))

    def begin(self, ids_BT: Tensor, capacity: int) -> tuple[Tensor, Any]:
        """Logits (B, V) after prompts of one length, and what `follow` needs; no row will have more than `capacity` tokens."""
        if self.longest is not None:
            decoder = Decoder(self.model, *(len(ids_BT), capacity), graph=False)
            return decoder.prefill(ids_BT), decoder
        x_BTD, states = self.model.hidden(ids_BT, return_states=True)
        return self.model.head(x_BTD[:, -1]), states

    def follow(self, ids_B: Tensor, states: Any) -> tuple[Tensor, Any]:
        """The same after one more token of each row."""
        if isinstance(states, Decoder):
            return states.step(ids_B), states
        x_BTD, states = self.model.hidden(ids_B[:, None], states, return_states=True)
        return self.model.head(x_BTD[:, -1]), states

    def joined(self, states: Sequence[Sequence[MixerState]]) -> Sequence[MixerState]:
        """The rows of several batches in one, where `can_join`: states of fixed size do not tell how long their prompts were."""
        return [
            {name: tuple(map(torch.cat, zip(*(each[name] for each in layer), strict=True))) for name in layer[0]}
            for layer in zip(*states, strict=True)
        ]


CACHES = ("cache", "past_key_values")
"""What transformers calls the states of a model, the newer name first."""


def cache_of(out: Any) -> Any:
    """The states that a model of transformers gave; None where it has none."""
    return next((getattr(out, name) for name in CACHES if hasattr(out, name)), None)


def _ends(model: Any) -> frozenset[int]:
    """What a model's generation_config names as ends: none, one, or several as chat models have them."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset(ends if isinstance(ends, list | tuple) else () if ends is None else (ends,))


class Foreign:
    """A causal language model of transformers. Only plain caches of keys and values are shared between requests."""

    can_join = False
    longest = None

    def __init__(self, model: Any, max_length: int) -> None:
        self.model, self.max_length = model, max_length
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self.head: nn.Module | None = model.get_output_embeddings()
        self.ends = _ends(model)
        """Tokens that end what it writes, beside its tokenizer's own."""
        self.cache = next(name for name in CACHES if name in inspect.signature(model.forward).parameters or name == CACHES[-1])
        self.can_reuse = self._is_plain()

    @torch.no_grad()
    def _is_plain(self) -> bool:
        """Whether the cache holds nothing but the keys and values of every token."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = cache_of(self._call(torch.zeros(1, 2, dtype=torch.int64, device=self.device), use_cache=True))
        return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)

    def _call(self, ids_BT: Tensor, **words: Any) -> Any:
        return self.model(input_ids=ids_BT, return_dict=True, **words)

    def _chosen(self, ids_BT: Tensor, where_M: Tensor, **words: Any) -> tuple[Tensor, Any]:
        """Logits (M, V) at flat positions of (B, T), and the output.

        The head is given these positions alone, so that whatever the model does to its logits afterwards is done to these.
        """
        chosen: list[Tensor] = []

        def choose(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            chosen.append(args[0].flatten(0, 1).index_select(0, where_M)[None])
            return (chosen[0], *args[1:])

        hook = self.head.register_forward_pre_hook(choose) if self.head is not None else None
        try:
            out = self._call(ids_BT, **words)
        finally:
            if hook is not None:
                hook.remove()
        flat = out.logits.flatten(0, 1)
        return flat if chosen else flat.index_select(0, where_M), out

    @property
    def device(self) -> torch.device:
        """The model's."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def read(self, ids_BT: Tensor) -> Any:
        """The cache after prompts of one length."""
        return cache_of(self._chosen(ids_BT, torch.zeros(1, dtype=torch.int64, device=self.device), use_cache=True)[1])

    def repeated(self, states: Any, rows_B: Tensor) -> Any:
        """A cache of which row b is row `rows_B[b]` of the one given."""
        states = copy.deepcopy(states)
        states.batch_select_indices(rows_B)
        return states

    def logits(self, ids_BT: Tensor, where_M: Tensor, states: Any = None) -> Iterator[Tensor]:
        """Logits (M, V) at flat positions of (B, T)."""
        words = {} if states is None else {self.cache: states}
        yield self._chosen(ids_BT, where_M, use_cache=states is not None, **words)[0]

    def begin(self, ids_BT: Tensor, capacity: int) -> tuple[Tensor, Any]:
        """Logits (B, V) after prompts of one length, and what `follow` needs: a cache, or without one the tokens."""
        B, T = ids_BT.shape
        last_B = torch.arange(1, B + 1, device=self.device) * T - 1
        logits_BV, out = self._chosen(ids_BT, last_B, use_cache=True)
        cache = cache_of(out)
        return logits_BV, ids_BT if cache is None else cache

    def follow(self, ids_B: Tensor, states: Any) -> tuple[Tensor, Any]:
        """The same after one more token of each row."""
        if isinstance(states, Tensor):
            return self.begin(torch.cat([states, ids_B[:, None]], 1), 0)
        out = self._call(ids_B[:, None], use_cache=True, **{self.cache: states})
        return out.logits[:, -1], cache_of(out)

    def joined(self, states: Sequence[Any]) -> Any:
        """Not possible."""
        raise NotImplementedError("caches of prompts of different lengths cannot be joined")
