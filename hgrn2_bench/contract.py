"""What every mixer promises, as checks: each returns what it found in one sentence, or raises where the promise is broken.

`tests/test_mixers.py` holds every registered mixer to them, `python -m hgrn2_bench check` a user's own.
Shape letters: B batch, T time, D width.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, MixerState, Recomputing

LENGTH = 17
LONG = 65
CLOSE = (1e-4, 1e-5)
"""Relative and absolute difference up to which two ways to compute one thing agree in float32."""


class BrokenPromiseError(AssertionError):
    """A mixer does not keep a promise of the contract; the text says which, in one sentence."""


class DoesNotApplyError(Exception):
    """A promise that this mixer does not make; the text says why."""


@dataclass(frozen=True)
class Subject:
    """A mixer under test: its class and what it is built with."""

    cls: type[Mixer]
    spec: MixerSpec
    shake: float = 0.0
    """Standard deviation of noise on every parameter, so that a projection that starts at zero hides nothing."""
    device: str = "cpu"

    def having(self, **changes: Any) -> "Subject":
        """The same with other fields of its spec."""
        return replace(self, spec=replace(self.spec, **changes))

    @property
    def at_rope(self) -> "Subject":
        """With rotary positions where it has them: they must continue while decoding."""
        return self.having(positions="rope") if self.facts.rotary else self

    def build(self, seed: int = 0) -> Mixer:
        """The mixer of a seed, without dropout."""
        torch.manual_seed(seed)
        mixer = self.cls(self.spec)
        with torch.no_grad():
            for parameter in mixer.parameters() if self.shake else ():
                parameter.add_(self.shake * torch.randn_like(parameter))
        return mixer.to(self.device).eval()

    @functools.cached_property
    def facts(self) -> Mixer:
        """One to read facts from: a mixer built of others takes over theirs when it is built."""
        return self.build()

    @property
    def shared(self) -> dict[str, Tensor]:
        """Lower bounds for a mixer that takes them: 0 in the first layer, 0.1 to 0.6 in the others."""
        if not self.facts.bounded:
            return {}
        D, bound_LD = self.spec.d_model, torch.zeros(self.spec.num_layers, self.spec.d_model, device=self.device)
        bound_LD[1:] = torch.linspace(0.1, 0.6, D, device=self.device)
        return {"lower_bound": bound_LD}

    @functools.cached_property
    def carry(self) -> dict[str, Tensor]:
        """What the layers of its kind before it leave for one token; it stands for every token, so that no check depends on them."""
        carry: dict[str, Any] = {}
        x_BTD = torch.linspace(-1, 1, self.spec.d_model, device=self.device)[None, None]
        with torch.no_grad():
            for layer in range(self.spec.first, self.spec.layer):
                self.having(layer=layer, scan="causal").build()(x_BTD, Context(shared=self.shared, carry=carry))
        return carry

    def context(self, **fields: Any) -> Context:
        """What one call carries."""
        return Context(shared=self.shared, carry=dict(self.carry), **fields)

    def inputs(self, batch: int, length: int, seed: int = 1) -> Tensor:
        """Standard normal inputs (B, T, D), the same on every device."""
        return torch.randn(batch, length, self.spec.d_model, generator=torch.Generator().manual_seed(seed)).to(self.device)

    @property
    def is_causal(self) -> bool:
        """Whether it reads forward, and so decodes; what other scans give depends on the tokens to come."""
        return self.spec.scan == "causal"

    def must_be_causal(self) -> None:
        """DoesNotApplyError under another scan."""
        if not self.is_causal:
            raise DoesNotApplyError(f"scan={self.spec.scan} reads both ways: there is no causality, and no decoding")

    @property
    def is_attention(self) -> bool:
        """Whether its state is a cache, which grows with length and keeps padding."""
        return self.facts.family == "softmax"

    @property
    def is_plain(self) -> bool:
        """Whether it is a wrapped `nn.Module`, which is told nothing but its input."""
        return issubclass(self.cls, Recomputing)


def require(condition: bool, text: str) -> None:
    """Raise BrokenPromiseError with `text` unless `condition` holds."""
    if not condition:
        raise BrokenPromiseError(text)


def agree(got: Tensor, want: Tensor, what: str, tolerance: tuple[float, float] = CLOSE) -> float:
    """The largest difference of two tensors; BrokenPromiseError unless `|got - want| <= absolute + relative * |want|` (NaN never is)."""
    require(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}")
    require(got.dtype == want.dtype, f"{what}: {got.dtype}, not {want.dtype}")
    relative, absolute = tolerance
    difference = (got - want).abs()
    require(bool(difference.isfinite().all()), f"{what}: not finite")
    error = difference.max().item() if difference.numel() else 0.0
    require(bool((difference <= absolute + relative * want.abs()).all()), f"{what}: differs by up to {error:.2g}")
    return error


def agree_states(got: MixerState, want: MixerState, what: str) -> None:
    """BrokenPromiseError unless two states hold the same tensors."""
    require(got.keys() == want.keys(), f"{what}: the state holds {sorted(got)}, not {sorted(want)}")
    for name in want:
        for one, other in zip(got[name], want[name], strict=True):
            agree(one, other, f"{what}, state {name!r}")


def loss_of(y: Tensor) -> Tensor:
    """A scalar on which every output has its own weight."""
    return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype).to(y.device)).sum()


def decode(subject: Subject, mixer: Mixer, x_BTD: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
    """Outputs (B, T, D) of T steps and the state after them."""
    outputs = []
    for x_BD in x_BTD.unbind(1):
        y_BD, state = mixer.step(x_BD, state, subject.shared, dict(subject.carry))
        outputs.append(y_BD)
    return torch.stack(outputs, 1), state or {}


def shape(subject: Subject, lengths: Sequence[int] = (1, LENGTH, LONG)) -> str:
    """(B, T, D) to (B, T, D) in the input's type, finite, and not the same number everywhere."""
    mixer = subject.build()
    for length in lengths:
        x = subject.inputs(2, length)
        y = mixer(x, subject.context())
        require(isinstance(y, Tensor), f"the output is a {type(y).__name__}, not a tensor")
        require(y.shape == x.shape, f"the output of {tuple(x.shape)} has shape {tuple(y.shape)}")
        require(y.dtype == x.dtype, f"the output of {x.dtype} is {y.dtype}")
        require(bool(y.isfinite().all()), f"the output at T={length} is not finite")
        require(y.std().item() > 1e-4, f"the output at T={length} is the same number everywhere")
    return f"(2, T, {subject.spec.d_model}) at T = {', '.join(map(str, lengths))}: the output has the input's shape and type, and is finite"


def gradients(subject: Subject, lengths: Sequence[int] = (1, LENGTH, LONG)) -> str:
    """A finite gradient for every parameter and the input, which beyond one token is not zero."""
    for length in lengths:
        mixer, x = subject.build().train(), subject.inputs(2, length).requires_grad_()
        loss_of(mixer(x, subject.context())).backward()
        found = {**{name.removeprefix("module."): p.grad for name, p in mixer.named_parameters()}, "the input": x.grad}
        faults = {
            "none": [name for name, grad in found.items() if grad is None],
            "not finite": [name for name, grad in found.items() if grad is not None and not grad.isfinite().all()],
            "zero": [name for name, grad in found.items() if length > 1 and grad is not None and not grad.any()],
        }
        told = "; ".join(f"{fault} for {', '.join(names)}" for fault, names in faults.items() if names)
        require(not told, f"gradient at T={length}: {told}")
    return f"{len(found) - 1} parameter tensors: each gets a finite gradient that is not zero"


def causality(subject: Subject, changed: Sequence[int] = (1, 16, 33, 40, LONG - 1), relative: float = 1e-5) -> str:
    """A changed token leaves earlier outputs as they were, up to `relative` of the largest output, and is seen later."""
    subject.must_be_causal()
    mixer, x = subject.build(), subject.inputs(2, LONG)
    before, worst = mixer(x, subject.context()), 0.0
    require(bool(before.isfinite().all()), "the output is not finite")
    for token in changed:
        other = x.clone()
        other[:, token] += 3
        difference_T = (mixer(other, subject.context()) - before).abs().amax((0, 2)) / before.abs().max()
        leaks = (~(difference_T[:token] <= relative)).nonzero().flatten().tolist()
        require(not leaks, f"not causal: the output at position {(leaks or [0])[0]} changes with token {token}")
        later = difference_T[token + 1 :]
        require(not len(later) or later.max().item() > relative, f"no mixing over time: no later output changes with token {token}")
        worst = max(worst, difference_T[:token].max().item())
    return f"largest relative change of an earlier output {worst:.1g}: no output depends on a later token"


def determinism(subject: Subject) -> str:
    """One seed gives one output, bit for bit."""
    mixer, x = subject.build(), subject.inputs(2, LENGTH)
    first = mixer(x, subject.context())
    require(bool(first.isfinite().all()), "the output is not finite")
    require(torch.equal(mixer(x, subject.context()), first), "a second call on the same input gives another output")
    require(torch.equal(subject.build()(x, subject.context()), first), "two mixers built from one seed give different outputs")
    return "difference 0: the same seed gives the same output"


def decoding(subject: Subject, prompts: Sequence[int] = (0, 1, 9)) -> str:
    """A prompt in one call and the rest step by step give the outputs and the state of one forward pass."""
    subject.must_be_causal()
    mixer, x, errors = subject.at_rope.build(), subject.inputs(2, LENGTH), []
    whole = subject.context(return_state=True)
    want = mixer(x, whole)
    for prompt in prompts:
        prefill = subject.context(return_state=True)
        start = mixer(x[:, :prompt], prefill) if prompt else x[:, :0]
        rest, state = decode(subject, mixer, x[:, prompt:], prefill.next_state if prompt else None)
        what = f"steps after a prompt of {prompt} tokens against one forward pass"
        errors.append(agree(torch.cat([start, rest], 1), want, what))
        agree_states(state, whole.next_state, what)
    return f"max error {max(errors):.1g}: a prompt and steps after it give what one forward pass gives"


def two_chunks(subject: Subject) -> str:
    """A sequence in two calls gives the outputs of one."""
    subject.must_be_causal()
    mixer, x, first = subject.at_rope.build(), subject.inputs(2, LONG), subject.context(return_state=True)
    start = mixer(x[:, :33], first)
    rest = mixer(x[:, 33:], subject.context(state=first.next_state))
    error = agree(torch.cat([start, rest], 1), mixer(x, subject.context()), "two chunks against one forward pass")
    return f"max error {error:.1g}: two calls, the state carried between them, give what one call gives"


def padding(subject: Subject) -> str:
    """What stands after a row's true length changes neither its outputs nor its state."""
    if subject.is_plain:
        raise DoesNotApplyError("a plain module is not told the true lengths")
    mixer, lengths = subject.at_rope.build(), (LENGTH, 9, 2, 1)
    x, errors = subject.inputs(len(lengths), LENGTH), []
    padded = subject.context(lengths_B=torch.tensor(lengths, device=subject.device), return_state=subject.is_causal)
    y = mixer(x, padded)
    for row, length in enumerate(lengths):
        alone, what = subject.context(return_state=subject.is_causal), f"a row of length {length} with padding against the row alone"
        errors.append(agree(y[row : row + 1, :length], mixer(x[row : row + 1, :length], alone), what))
        if not subject.is_causal:
            continue
        state = {name: tuple(t[row : row + 1] for t in padded.next_state[name]) for name in alone.next_state}
        if subject.is_attention:  # its cache keeps the padding: decoding after padded prefill is refused by the op
            del alone.next_state["op"]
        fixed = {name: held for name, held in alone.next_state.items() if [t.shape for t in held] == [t.shape for t in state[name]]}
        agree_states({name: state[name] for name in fixed}, fixed, what)
        if not subject.is_attention:  # states that hold all tokens are not laid out alike: what a step makes of them counts
            got, want = (decode(subject, mixer, x[row : row + 1, :1], each)[0] for each in (state, alone.next_state))
            errors.append(agree(got, want, f"{what}, one step later"))
    return f"max error {max(errors):.1g}: what stands after a row's end changes neither its outputs nor its state"


def autocast(subject: Subject) -> str:
    """Under bfloat16 autocast outputs and gradients stay finite."""
    mixer, x = subject.build(), subject.inputs(2, LENGTH)
    want = mixer(x, subject.context())
    with torch.autocast(subject.device, torch.bfloat16):
        y = mixer(x, subject.context())
    loss_of(y).backward()
    require(bool(y.isfinite().all()), "the output under bfloat16 autocast is not finite")
    bad = [name for name, p in mixer.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    require(not bad, f"the gradient under bfloat16 autocast is not finite for {', '.join(bad)}")
    error = (y.float() - want).abs().max().item() / want.std().item()
    return f"max error {error:.1g} of the output's deviation: bfloat16 autocast stays finite, forward and backward"


def batch_independence(subject: Subject) -> str:
    """A row of a batch gives what it gives alone."""
    mixer, x = subject.build(), subject.inputs(3, LENGTH)
    batch = mixer(x, subject.context())
    errors = [agree(mixer(x[row : row + 1], subject.context())[0], batch[row], f"row {row} alone against the batch") for row in range(3)]
    return f"max error {max(errors):.1g}: a row of a batch gives what it gives alone"


def state_bytes(subject: Subject, lengths: Sequence[int] = (5, LENGTH), itemsize: int = 4) -> str:
    """`state_size` is what the tensors of the decoding state take; `itemsize` 2 decodes under bfloat16 autocast."""
    subject.must_be_causal()
    mixer, held = subject.build(), []
    for length in lengths:
        with torch.no_grad(), torch.autocast(subject.device, torch.bfloat16, enabled=itemsize == 2):
            _, state = decode(subject, mixer, subject.inputs(1, length))
        held.append(sum(t.numel() * t.element_size() for tensors in state.values() for t in tensors))
        said = mixer.state_size(length, itemsize)
        require(said == held[-1], f"state_size says {said} bytes after {length} tokens, step holds {held[-1]}")
    sizes = " and ".join(f"{size} bytes after {length} tokens" for size, length in zip(held, lengths, strict=True))
    return f"{sizes}: state_size is what step holds for one sequence"


def backends(subject: Subject) -> str:
    """The `reference` and `chunked` recurrences agree on outputs, final state and every gradient."""
    if subject.is_plain or not {"reference", "chunked"} <= set(subject.cls.backends):
        raise DoesNotApplyError("it has one implementation only")
    (want, want_state), (got, got_state) = (_everything(subject.having(backend=name)) for name in ("reference", "chunked"))
    errors = []
    for name, tensor in want.items():
        scale = tensor.abs().max().item()
        errors.append(agree(got[name], tensor, f"chunked against reference, {name}", (1e-3, 1e-4 * scale)) / max(scale, 1e-30))
    agree_states(got_state, want_state, "chunked against reference")
    return f"max error {max(errors):.1g}: reference and chunked agree on outputs, state and gradients"


def _everything(subject: Subject) -> tuple[Mapping[str, Tensor], MixerState]:
    """Outputs and gradients by name, and the final state, of one forward and backward pass."""
    mixer, x, ctx = subject.build(), subject.inputs(2, LONG).requires_grad_(), subject.context(return_state=subject.is_causal)
    y = mixer(x, ctx)
    loss_of(y).backward()
    grads = {f"gradient of {name}": p.grad for name, p in [("the input", x), *mixer.named_parameters()]}
    return {"output": y, **{name: grad for name, grad in grads.items() if grad is not None}}, ctx.next_state
