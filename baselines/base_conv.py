"""BaseConv: a causal convolution of the input times a linear gate (Zoology, arXiv 2312.04927).

    y = conv(x) * (W x + b) + x

    short layer:  conv(x)_t = c + sum_{s < width} h_s * x_{t-s}
    long layer:   conv(x)_t = x_t + sum_{s <= t} h_s * x_{t-s}
                  h_s = W_2 relu(W_1 z_s + b_1) + b_2          one tap per channel and lag, from a small network
                  z_s = (s / (L - 1), cos(a), -sin(a)),  a = 1e-4 * 2 pi s / L,  L the longest sequence

Every filter is depthwise: one per channel. z is the published one; its last two features hardly move. Zoology's figure 2 alternates
short and long layers, which is `long=odd`.

Shape letters: B batch, T time, S past plus present time, D width.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.errors import ConfigError, unknown
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec
from hgrn2_bench.layers import ShortConv, activation_dtype, conv_buffers

# HazyResearch/zoology, zoology/mixers/convolution.py
FEATURES, HIDDEN = 3, 16
ANGLE = 1e-4
LONG_LAYERS = {"none": slice(0, 0), "odd": slice(1, None, 2), "all": slice(None)}


class BaseConv(Mixer):
    """The published layer. It is a convolution itself, so `conv` adds none to it.

    It has no recurrence: the same PyTorch code runs on every device. Long layers are FFT convolutions in float32 or wider and decode by a
    sum over all past inputs.
    """

    version: ClassVar[int] = 1
    convolved: ClassVar[bool] = False
    backends: ClassVar[tuple[str, ...]] = ("reference", "chunked")

    width: int = 3
    long: Literal["none", "odd", "all"] = "none"

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D = spec.d_model
        if self.long not in LONG_LAYERS:
            raise unknown("long", self.long, LONG_LAYERS)
        if self.width < 1:
            raise ConfigError(f"width={self.width} must be at least 1")
        self.long_layers = list(range(spec.num_layers)[LONG_LAYERS[self.long]])
        self.is_long = spec.layer in self.long_layers
        if self.long_layers and spec.max_len < 1:
            raise ConfigError(f"long={self.long} needs the length of the longest sequence: give MixerSpec its max_len")
        if self.is_long:
            self.filter_in, self.filter_out = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, D)
        else:
            self.conv_x = ShortConv(D, self.width, "conv_x", bias=True)
        self.gate_proj = nn.Linear(D, D)

    def recur(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """The convolution, in the dtype of the projection; a long one has the input for its skip term."""
        x_BTD = x_BTD.to(activation_dtype(x_BTD))
        return (self.convolve(x_BTD, ctx), x_BTD) if self.is_long else (self.conv_x(x_BTD, ctx), None)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Gate, then add the input."""
        gate_BTD = self.gate_proj(x_BTD)
        mixed_BTD: Tensor = o * gate_BTD + x_BTD.to(gate_BTD.dtype)
        return mixed_BTD

    def convolve(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """The long convolution without its skip term; all inputs seen are left in the state.

        ValueError where they are more than the filter has taps.
        """
        T = x_BTD.shape[1]
        past_BSD = x_BTD[:, :0] if ctx.state is None else ctx.state["past"][0].to(x_BTD.dtype)
        seen_BSD = torch.cat([past_BSD, x_BTD], 1)
        if seen_BSD.shape[1] > self.spec.max_len:
            raise ValueError(f"{seen_BSD.shape[1]} tokens, but base_conv's long filter knows only {self.spec.max_len}")
        if ctx.return_state:
            ctx.next_state["past"] = (seen_BSD if ctx.lengths_B is None else right_aligned(seen_BSD, T, ctx.lengths_B),)
        h_SD = self.taps(seen_BSD.shape[1])
        y_BTD = last_sum(seen_BSD, h_SD) if T == 1 else causal_convolution(seen_BSD, h_SD)[:, -T:]
        return y_BTD.to(x_BTD.dtype)

    def taps(self, S: int) -> Tensor:
        """The first S taps of the filter, (S, D), in float32 or wider: under autocast too, where bfloat16 cannot tell all lags apart."""
        into, out, L = self.filter_in, self.filter_out, self.spec.max_len
        dtype = torch.promote_types(out.weight.dtype, torch.float32)
        lag_S = torch.arange(S, device=out.weight.device, dtype=dtype)
        angle_S = ANGLE * 2 * math.pi / L * lag_S
        z_SF = torch.stack([lag_S / max(1, L - 1), angle_S.cos(), -angle_S.sin()], -1)
        with torch.autocast(out.weight.device.type, enabled=False):
            hidden = F.relu(F.linear(z_SF, into.weight.to(dtype), into.bias.to(dtype)))
            return F.linear(hidden, out.weight.to(dtype), out.bias.to(dtype))

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """The last width - 1 inputs, or in a long layer all of them, D numbers each."""
        return itemsize * (self.spec.d_model * seq_len if self.is_long else conv_buffers(self))

    def op_flops(self, seq_len: int) -> float:
        """2 per channel for gate and sum; a long layer adds its skip, and three real FFTs of N = 2 T numbers at 2.5 N log2 N.

        Between them T + 1 complex products at 6. The filter and its FFT are counted as for a batch of one sequence.
        """
        if not self.is_long:
            return 2.0 * self.spec.d_model
        N = 2 * seq_len
        per_channel = 3 * 2.5 * N * math.log2(N) + 6 * (seq_len + 1)
        return self.spec.d_model * (3 + per_channel / seq_len)

    def effective(self) -> dict[str, Any]:
        """The convolutions of all layers, and the gate as built."""
        short = len(self.long_layers) < self.spec.num_layers
        kinds = [f"own conv {self.width}"] * short + ["own long conv"] * bool(self.long_layers)
        return {
            "local_mixing": ", ".join(kinds),
            "width": self.width if short else None,
            "long_layers": self.long_layers,
            "long_taps": self.spec.max_len if self.long_layers else None,
            "output_gate": "linear, before the sum with the input",
            "norm": "none",
            "bias": True,
            "forget_bias": "none",
        }


def right_aligned(seen_BSD: Tensor, T: int, lengths_B: Tensor) -> Tensor:
    """The inputs of every row moved to the end over the padding of its last T, zeros in front: they add nothing to a convolution."""
    B, S, D = seen_BSD.shape
    padded = torch.cat([seen_BSD.new_zeros(B, T, D), seen_BSD], 1)
    index = lengths_B.to(seen_BSD.device)[:, None] + torch.arange(S, device=seen_BSD.device)
    return padded.gather(1, index[..., None].expand(-1, -1, D))


def causal_convolution(x_BSD: Tensor, h_SD: Tensor) -> Tensor:
    """sum_{s <= t} h_s x_{t-s} in the dtype of h, by FFTs of twice the length, so that the end does not wrap around to the start.

    Time comes last inside: on a CPU that took half the time.
    """
    S, x_BDS = len(h_SD), x_BSD.to(h_SD.dtype).transpose(1, 2)
    product = torch.fft.rfft(x_BDS, n=2 * S) * torch.fft.rfft(h_SD.T, n=2 * S)
    return torch.fft.irfft(product, n=2 * S)[..., :S].transpose(1, 2)


def last_sum(x_BSD: Tensor, h_SD: Tensor) -> Tensor:
    """The last output of `causal_convolution`, (B, 1, D), as the sum that it is: decoding needs no other."""
    return (x_BSD.to(h_SD.dtype) * h_SD.flip(0)).sum(1, keepdim=True)
