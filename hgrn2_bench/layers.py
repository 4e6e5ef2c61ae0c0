"""Small layers that several mixers share: the short convolution, the norms, the forget gate with its lower bound.

Shape letters: B batch, T time, D channels, W convolution width.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.interfaces import Context, MixerSpec


def identity(x: Tensor) -> Tensor:
    """The activation named `none`."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": identity, "silu": F.silu, "sigmoid": torch.sigmoid}


def activation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what a projection makes of `x`: that of autocast where it is on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def buffered(x_BTD: Tensor, past: int, name: str, ctx: Context) -> Tensor:
    """`x` after the `past` tokens before it, (B, past + T, D): from the incoming state, or zeros at the start.

    The last `past` tokens of each row's true length are left in `ctx.next_state[name]`.
    """
    B, T, D = x_BTD.shape
    before = x_BTD.new_zeros(B, past, D) if ctx.state is None else ctx.state[name][0].to(x_BTD.dtype)
    padded = torch.cat([before, x_BTD], 1)
    if ctx.return_state:
        end = torch.full((B,), T, device=x_BTD.device) if ctx.lengths_B is None else ctx.lengths_B.to(x_BTD.device)
        index = end[:, None] + torch.arange(past, device=x_BTD.device)
        ctx.next_state[name] = (padded.gather(1, index[..., None].expand(-1, -1, D)),)
    return padded


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training a row of (B, ...) becomes 0 at this rate, and the others grow to keep the mean."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Drop rows."""
        if not self.training or not self.dropout:
            return x
        kept_B = torch.rand(len(x), device=x.device) >= self.dropout
        return x * (kept_B / (1 - self.dropout)).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


LARGE = 2**23
"""Numbers of a tensor from which on Triton runs step by step too: on an H100 torch's pass takes as long there as a launch of Triton's."""
WIDEST = 8192
"""The widest rows of which a norm's kernel holds one in the registers of a program."""


_for_a_graph = False


@contextlib.contextmanager
def for_a_graph(on: bool = True) -> Iterator[None]:
    """With `on` layers within choose their kernels as for a CUDA graph, where none costs a launch: in its recording, and steps before it.

    In the whole process: threads of autograd compute layers again whose activations were not kept.
    """
    global _for_a_graph
    before, _for_a_graph = _for_a_graph, _for_a_graph or on
    try:
        yield
    finally:
        _for_a_graph = before


class FollowsBackend:
    """A layer with a Triton kernel beside torch's own; the model sets its `backend` to that of the mixers."""

    backend: str = "chunked"
    one_for_many: bool = False
    """Whether the kernel stands for so many of torch's that it is launched sooner."""

    def on_triton(self, x: Tensor) -> bool:
        """Whether a kernel in Triton takes this input."""
        return self.backend == "fla" and x.is_cuda

    def in_triton(self, x: Tensor) -> bool:
        """Whether Triton's fewer passes are faster: in a CUDA graph, on large inputs, and where one stands for many.

        Else torch launches sooner; what torch compiles it fuses itself.
        """
        if torch.compiler.is_compiling():
            return False
        faster = self.one_for_many or _for_a_graph or x.numel() >= LARGE
        return faster and self.on_triton(x) and x.dtype != torch.float64


def norm_in_triton(norm: "LayerNorm | RMSNorm", x: Tensor) -> Tensor | None:
    """The input as a norm's kernel takes it, in float32 under autocast; None where torch's own is to run."""
    if not norm.in_triton(x) or norm.normalized_shape != x.shape[-1:] or x.shape[-1] > WIDEST:
        return None
    return x.float() if torch.is_autocast_enabled(x.device.type) else x


class LayerNorm(FollowsBackend, nn.LayerNorm):
    """Layer norm over the last dimension, in Triton where that is faster: torch's kernels take a block of threads for each short row."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, in float32 under autocast."""
        x = norm_in_triton(self, input)
        if x is None:
            return super().forward(input)
        from hgrn2_bench.ops import norms

        return norms.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(FollowsBackend, nn.RMSNorm):
    """Root-mean-square norm over the last dimension, in Triton where `LayerNorm` is."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, in float32 under autocast."""
        wide = None if self.eps is None else norm_in_triton(self, x)
        if wide is None or self.eps is None:
            return super().forward(x)
        from hgrn2_bench.ops import norms

        return norms.rms_norm(wide, self.weight, self.eps)


class BatchNorm(nn.Module):
    """Batch norm of every channel over the tokens of `group` sequences at a time (0: the whole batch), (B, T, D) -> (B, T, D).

    With as many sequences as one of several GPUs had, one GPU has the statistics that those had (ghost batch norm, arXiv 1705.08741).
    Padding counts neither in them nor in the running ones, which move by a tenth towards the mean over the groups.
    """

    EPS, MOMENTUM = 1e-5, 0.1
    mean_D: Tensor
    var_D: Tensor

    def __init__(self, channels: int, group: int = 0) -> None:
        super().__init__()
        self.group = group
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean_D", torch.zeros(channels))
        self.register_buffer("var_D", torch.ones(channels))

    def forward(self, x_BTD: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Normalise; in training by the statistics of each group, a last one of fewer sequences included."""
        if not self.training:
            return self._scaled(x_BTD, self.mean_D, self.var_D)
        parts = x_BTD.split(self.group or len(x_BTD))
        lengths = [None] * len(parts) if lengths_B is None else lengths_B.split(self.group or len(x_BTD))
        found = [self._statistics(x, given) for x, given in zip(parts, lengths, strict=True)]
        with torch.no_grad():
            self.mean_D.lerp_(torch.stack([mean for mean, _, _ in found]).mean(0), self.MOMENTUM)
            self.var_D.lerp_(torch.stack([unbiased for _, _, unbiased in found]).mean(0), self.MOMENTUM)
        return torch.cat([self._scaled(x, mean, var) for x, (mean, var, _) in zip(parts, found, strict=True)])

    def _statistics(self, x_BTD: Tensor, lengths_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance, and unbiased one of each channel, in float32 or wider."""
        x = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        count: Tensor | int
        if lengths_B is None:
            count = x[..., 0].numel()
            var, mean = torch.var_mean(x, (0, 1), correction=0)
        else:
            real_BT1 = (torch.arange(x.shape[1], device=x.device) < lengths_B[:, None])[..., None]
            count = real_BT1.sum()
            mean = (x * real_BT1).sum((0, 1)) / count
            var = ((x - mean).square() * real_BT1).sum((0, 1)) / count
        return mean, var, var * (count / (count - 1))

    def _scaled(self, x_BTD: Tensor, mean_D: Tensor, var_D: Tensor) -> Tensor:
        return (x_BTD - mean_D) * ((var_D + self.EPS).rsqrt() * self.weight) + self.bias


class ShortConv(FollowsBackend, nn.Module):
    """Causal depthwise convolution of width W over time, (B, T, D) -> (B, T, D); decoding keeps the last W - 1 inputs.

    Parameters start as in `nn.Conv1d` (uniform with bound 1/sqrt(W)). `name` is its key in the mixer's state.
    In torch it is computed as a two-dimensional convolution of height 1: (B, T, D) is then laid out channels-last already, nothing is
    transposed, and the CPU kernel is two to five times faster.
    """

    def __init__(self, channels: int, width: int, name: str, bias: bool = False) -> None:
        super().__init__()
        self.width, self.name = width, name
        self.conv = nn.Conv1d(channels, channels, width, groups=channels, bias=bias)

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """Convolve after the incoming buffer (zeros at the start), leaving the new buffer in `ctx.next_state`."""
        if self.on_triton(x_BTD):
            from hgrn2_bench.ops import fla

            past = self.width - 1 if ctx.state is not None or ctx.return_state else 0
            padded = buffered(x_BTD, past, self.name, ctx) if past else x_BTD
            return fla.causal_conv(padded, self.conv.weight[:, 0], self.conv.bias)[:, past:]
        padded = buffered(x_BTD, self.width - 1, self.name, ctx)
        image_BD1T = padded.transpose(1, 2)[:, :, None]
        return F.conv2d(image_BD1T, self.conv.weight[:, :, None], self.conv.bias, groups=self.conv.groups)[:, :, 0].transpose(1, 2)


def conv_buffers(mixer: nn.Module) -> int:
    """How many numbers the short convolutions of a mixer hold for one sequence while decoding."""
    return sum((m.width - 1) * m.conv.in_channels for m in mixer.modules() if isinstance(m, ShortConv))


def conv_names(mixer: nn.Module) -> list[str]:
    """The names of a mixer's short convolutions, for its row."""
    return [m.name for m in mixer.modules() if isinstance(m, ShortConv)]


def token_shift(x_BTD: Tensor, ctx: Context) -> Tensor:
    """The token before each one, (B, T, D): zeros before the first, or the input that `ctx.state` holds under `shift`."""
    return buffered(x_BTD, 1, "shift", ctx)[:, :-1]


def forget_gate(logit_BTD: Tensor, bound_D: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gate f = lb + (1 - lb) sigmoid(logit) as (log f, 1 - f), in float32 or wider; lb is `bound_D`, 0 without one.

    Neither result is a difference of near-equal numbers, whether f is near 0 or near 1:
    log f = log sigmoid(logit) + log(1 + lb exp(-logit)), 1 - f = (1 - lb) sigmoid(-logit).
    """
    z = logit_BTD.to(torch.promote_types(logit_BTD.dtype, torch.float32))
    log_f, rest = F.logsigmoid(z), torch.sigmoid(-z)
    if bound_D is None:
        return log_f, rest
    bound_D = bound_D.to(z.dtype)
    log_bound_D = bound_D.clamp_min(torch.finfo(z.dtype).tiny).log()  # the clamp passes no gradient at lb = 0, where log's is infinite
    return log_f + F.softplus(log_bound_D - z, threshold=40), (1 - bound_D) * rest


class ForgetGate(FollowsBackend, nn.Module):
    """The forget gate of HGRN and HGRN2 with the bound that the model shares: logit (B, T, D) to (log f, 1 - f).

    In Triton it is one kernel each way, in float32.

    `forget_bias` belongs into the bias of the projection that makes the logit. Where that has none, or a convolution follows it (which
    would multiply the bias by the sum of its weights), the gate gets a learned bias of its own, unless `forget_bias` is 0.
    """

    one_for_many = True

    def __init__(self, spec: MixerSpec, projection_bias: bool) -> None:
        super().__init__()
        self.spec = spec
        self.layer = spec.layer  # a plain number of the module's own: the compiler takes those for variables, so that layers share code
        own = spec.forget_bias != 0 and (spec.conv > 0 or not projection_bias)
        self.bias = nn.Parameter(torch.zeros(spec.d_model)) if own else None

    def forward(self, logit_BTD: Tensor, ctx: Context, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Both results in float32 or wider, 1 - f rounded to `dtype` where one is given.

        The bound is this layer's row of the model's `lower_bound` (num_layers, D). Where the gate is a multiple of that wide, it holds for
        each D of its channels.
        """
        if self.bias is not None:
            logit_BTD = logit_BTD + self.bias
        bound_LD, bound_D = ctx.shared.get("lower_bound"), None
        if bound_LD is not None:
            bound_D, repeats = bound_LD[self.layer], self.spec.d_model // bound_LD.shape[1]
            bound_D = bound_D.repeat(repeats) if repeats > 1 else bound_D
        if self.in_triton(logit_BTD):
            from hgrn2_bench.ops import gate

            return gate.forget_gate(logit_BTD, bound_D, dtype or torch.float32)
        log_f_BTD, rest_BTD = forget_gate(logit_BTD, bound_D)
        return log_f_BTD, rest_BTD if dtype is None else rest_BTD.to(dtype)

    @torch.no_grad()
    def init_bias(self, projection: nn.Linear) -> None:
        """Set the own bias to `forget_bias`, or add it to the last D biases of the projection."""
        if self.bias is not None:
            self.bias.fill_(self.spec.forget_bias)
        elif self.spec.forget_bias:
            projection.bias[-self.spec.d_model :] += self.spec.forget_bias

    def describe(self, projection: nn.Linear) -> str:
        """Where the bias of the gate is, for the row."""
        if self.bias is not None:
            return "own learned bias of the gate"
        return "none" if projection.bias is None else "bias of in_proj"


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """(B, T, H K) to (B, T, H, K)."""
    return x_BTD.reshape(*x_BTD.shape[:-1], heads, -1)


def turned(x_BTHK: Tensor, partner_BTHK: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Each channel turned towards its partner, x cos + partner * signed sin, in the dtype of the tables; given back in that of x.

    The tables are (.., T, 1, K) in float32 or wider; the sine is negative for the first channel of a pair.
    """
    return torch.addcmul(x_BTHK * cos, partner_BTHK, signed_sin).to(x_BTHK.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Vectors of length 1 over the last dimension, x / sqrt(sum of x^2 + eps), computed in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
