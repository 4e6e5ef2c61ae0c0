"""The model around a mixer: embedding, pre-norm blocks, final norm, head.

    x = embed(tokens) + positions
    x = x + mixer(norm(x));  x = x + channel(norm(x))      for each layer
    logits = head(norm(x))                                 only where a label asks for one

Shape letters: B batch, T time, D width, V vocabulary, L layers, M positions with a label.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hgrn2_bench import registry
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, Recomputing
from hgrn2_bench.layers import ACTIVATIONS, BatchNorm, DropPath, FollowsBackend, LayerNorm, RMSNorm


def mixer_spec(config: ModelConfig, layer: int, backend: str, settings: Mapping[str, Any], max_len: int) -> MixerSpec:
    """What the configuration says to the mixer of one layer."""
    shared = (config.conv, config.forget_bias, config.positions)
    first = 0 if config.first_layer == "none" else 1
    return MixerSpec(config.d_model, layer, config.num_layers, *shared, backend, settings, max_len, min(first, layer), config.scan)


def make_mixer(config: ModelConfig, mixer: type[Mixer], spec: MixerSpec) -> Mixer:
    """The mixer of one layer: the model's own, but in layer 0 the one that `first_layer` names, with its default settings."""
    if config.first_layer == "none":
        return mixer(spec)
    made = mixer(spec) if spec.layer else registry.load(config.first_layer)(replace(spec, settings={}))
    made.label = made.label or _name(type(made))
    if spec.layer == 0 and type(made) is mixer and any(getattr(made, name) != value for name, value in spec.settings.items()):
        made.label += " (default settings)"
    return made


def _name(mixer: type[Mixer]) -> str:
    """The registry key of a mixer's class; of a user's own, the name of the class."""
    return next((name for name, model in registry.models().items() if model.module == mixer.__module__), mixer.__name__)


class GLU(FollowsBackend, nn.Module):
    """Gated linear unit, W3(act(W1 x) * W2 x), (..., D) -> (..., D), the activation SiLU or none (arXiv 2002.05202, as in HGRN2's code).

    In Triton, where that is faster, SiLU and the product are one kernel each way: 8 passes over such a tensor, not 14.
    """

    def __init__(self, d_model: int, width: int, dropout: float = 0.0, activation: str = "silu", bias: bool = True) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(d_model, width, bias), nn.Linear(d_model, width, bias)
        self.down = nn.Linear(width, d_model, bias)
        self.dropout, self.activation = nn.Dropout(dropout), activation

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit."""
        return self.down(self.dropout(self._gated(self.gate(x), self.up(x))))

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.activation == "silu" and self.in_triton(gate):
            from hgrn2_bench.ops import fla

            return fla.swiglu(gate, up)
        return ACTIVATIONS[self.activation](gate) * up


class MLP(nn.Module):
    """Two linear layers with GELU between, (..., D) -> (..., D)."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, width), nn.Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        return self.down(F.gelu(self.up(x)))


def channel_mixer(config: ModelConfig) -> nn.Module | None:
    """The channel mixer of a block.

    `identity` is the quirk of Zoology's block without a state mixer: the normalised residual itself is added back.
    A width of 0 means 4 d for an MLP, and for a GLU 8/3 d rounded up to a multiple of 8.
    """
    d = config.d_model
    if config.channel_mixer == "mlp":
        return MLP(d, config.channel_width or 4 * d)
    if config.channel_mixer == "glu":
        width = config.channel_width or 8 * math.ceil(d / 3)
        return GLU(d, width, config.channel_dropout, config.glu_activation, config.glu_bias)
    return nn.Identity() if config.channel_mixer == "identity" else None


def make_norm(config: ModelConfig, kind: str = "as_blocks") -> nn.Module:
    """The norm that the protocol uses before every mixer, or before the head with `kind`."""
    kind = config.norm if kind == "as_blocks" else kind
    if kind == "batchnorm":
        return BatchNorm(config.d_model, config.norm_group)
    if kind == "layernorm":
        return LayerNorm(config.d_model, eps=config.norm_eps or 1e-5)
    if kind == "rmsnorm":
        return RMSNorm(config.d_model, eps=config.norm_eps or 1e-5)
    return RMSNorm(config.d_model, eps=config.norm_eps or 1e-6, elementwise_affine=False)  # 1e-6: SimpleRMSNorm of hgru2-pytorch


def normed(norm: nn.Module, x: Tensor, lengths_B: Tensor | None) -> Tensor:
    """`norm(x)`; a batch norm is told where the padding begins."""
    out: Tensor = norm(x, lengths_B) if isinstance(norm, BatchNorm) else norm(x)
    return out


class Block(nn.Module):
    """One pre-norm layer, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig, mixer: Mixer) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = make_norm(config), mixer
        self.channel = channel_mixer(config)
        self.channel_norm = make_norm(config) if self.channel is not None else None
        self.dropout = nn.Dropout(config.dropout)
        self.path = DropPath(config.drop_path * mixer.spec.layer / max(1, config.num_layers - 1))

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """Mix over time, then over channels."""
        return self.add(x_BTD, self.mixer(normed(self.mixer_norm, x_BTD, ctx.lengths_B), ctx), ctx.lengths_B)

    def step_in_place(self, x_BD: Tensor, ctx: Context) -> Tensor:
        """The same for one token, (B, D) to (B, D), with the state as in `Mixer.step_in_place`."""
        return self.add(x_BD, self.mixer.step_in_place(self.mixer_norm(x_BD), ctx))

    def add(self, x: Tensor, mixed: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """The residual with what the mixer gave, then with what the channel mixer makes of it; (..., D) each."""
        x = x + self.path(self.dropout(mixed))
        if self.channel is not None and self.channel_norm is not None:
            x = x + self.path(self.dropout(self.channel(normed(self.channel_norm, x, lengths_B))))
        return x


def recomputed(block: nn.Module, x_BTD: Tensor, ctx: Context) -> Tensor:
    """`block(x, ctx)` of which only the input is kept; the gradient computes it again, with the same dropout."""
    # reading the generator's state cannot be recorded in a CUDA graph, so it is kept only where it may be needed
    y_BTD: Tensor = checkpoint(block, x_BTD, ctx, use_reentrant=False, preserve_rng_state=may_drop(block))
    return y_BTD


def may_drop(block: nn.Module) -> bool:
    """Whether a block has dropout, or a plain module of which nothing is known."""
    rates = [m.p if isinstance(m, nn.Dropout) else getattr(m, "dropout", 0.0) for m in block.modules()]
    return any(isinstance(rate, float) and rate > 0 for rate in rates) or any(isinstance(m, Recomputing) for m in block.modules())


def sinusoid(max_len: int, d_model: int) -> Tensor:
    """Fixed sinusoidal positions (max_len, D) of the Transformer (arXiv 1706.03762, section 3.5)."""
    angle = torch.arange(max_len)[:, None] / 10_000 ** (torch.arange(0, d_model, 2) / d_model)
    return torch.stack([angle.sin(), angle.cos()], -1).reshape(max_len, d_model)


def bounds(table_LD: Tensor, kind: str) -> Tensor:
    """Lower bounds (L, D) of the forget gate from HGRN's learned table: softmax over layers, then cumulated (arXiv 2311.04823, eq. 6).

    `inclusive` drops the first layer's share, `exclusive` the last one's; both give layer 0 the bound 0.
    """
    share_LD = table_LD.float().softmax(0)
    summed_LD = share_LD.cumsum(0)
    return summed_LD - share_LD[0] if kind == "inclusive" else summed_LD - share_LD


class Backbone(nn.Module):
    """Inputs (B, T) or (B, T, C) to hidden states (B, T, D): all but what a task reads from them."""

    embedding: nn.Module
    head: nn.Module

    def __init__(
        self, config: ModelConfig, mixer: type[Mixer], settings: Mapping[str, Any], backend: str, max_len: int, ends: "Ends"
    ) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.grid: tuple[int, int] | None = None
        """Height and width where the inputs are the pixels of an image, which a suite sets."""
        self.embedding = ends.embedding()
        self.position = nn.Embedding(max_len, config.d_model) if config.positions == "learned" else None
        if config.positions == "sinusoid":
            self.register_buffer("sinusoid", sinusoid(max_len, config.d_model), persistent=False)
        self.bound_table = nn.Parameter(torch.ones(config.num_layers, config.d_model)) if config.lower_bound != "none" else None
        specs = [mixer_spec(config, layer, backend, settings, max_len) for layer in range(config.num_layers)]
        self.blocks = nn.ModuleList(Block(config, make_mixer(config, mixer, spec)) for spec in specs)
        self.norm = make_norm(config, config.final_norm)
        self.head = ends.head()
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        for module in self.modules():
            if isinstance(module, FollowsBackend):
                module.backend = backend
        self._init_weights()

    def _init_weights(self) -> None:
        """Embeddings at `embed_std`; `init=blanket` also re-initialises every Linear, mixers' too, as Zoology's trainer does.

        Blanket: standard deviation 0.02, biases 0, output projections 0.02 / sqrt(2 L). It erases what a mixer set itself (Mamba's dt).
        Truncated: 0.02 for all, cut off at 2, biases 0, as timm's `trunc_normal_` has it.
        """
        for table in (self.embedding, self.position):
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=self.config.embed_std)
        if self.config.init != "mixer":
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear):
                    self._init_matrix(module.weight, name.rpartition(".")[2] in OUTPUT_PROJECTIONS)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            for mixer in self.mixers:
                mixer.init_forget_bias()

    def _init_matrix(self, weight: Tensor, is_output: bool) -> None:
        if self.config.init == "truncated":
            nn.init.trunc_normal_(weight, std=0.02)
        else:
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.num_layers) if is_output else 0.02)

    def forward(self, inputs: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) after the final norm. ValueError where the sequence is longer than the table of positions."""
        x_BTD = self.embed(inputs)
        shared = self.shared()
        carry: dict[str, Any] = {}
        tables: dict[str, Any] = {}
        for block in self.blocks:
            ctx = Context(shared=shared, carry=carry, tables=tables, lengths_B=lengths_B, grid=self.grid_of(inputs))
            x_BTD = recomputed(block, x_BTD, ctx) if self.config.recompute and torch.is_grad_enabled() else block(x_BTD, ctx)
        return normed(self.norm, x_BTD, lengths_B)

    def grid_of(self, inputs: Tensor) -> tuple[int, int] | None:
        """Height and width, in tokens, of the images among the inputs."""
        return self.grid

    def embed(self, inputs: Tensor) -> Tensor:
        """Embedded inputs with their positions from 0 on, (B, T, D). ValueError where the table of positions has fewer."""
        x_BTD, table_PD, T = self.embedded(inputs), self.position_table(), inputs.shape[1]
        if table_PD is not None:
            if len(table_PD) < T:
                raise ValueError(f"{T} tokens, but positions={self.config.positions} knows only {len(table_PD)}")
            x_BTD = x_BTD + table_PD[:T]
        return self.embed_dropout(x_BTD)

    def embedded(self, inputs: Tensor) -> Tensor:
        """Embedded inputs without positions, scaled as `embed_scale` says; any shape (...) to (..., D).

        They have the type of the parameters also under autocast, where a linear map gives less: all blocks add to them.
        """
        x: Tensor = self.embedding(inputs)
        x = x.to(next(self.embedding.parameters()).dtype)
        return x * math.sqrt(self.config.d_model) if self.config.embed_scale == "sqrt" else x

    def position_table(self) -> Tensor | None:
        """What is added to the embedding at each position, (P, D); None without such a table."""
        if self.position is not None:
            return self.position.weight
        return self.get_buffer("sinusoid") if self.config.positions == "sinusoid" else None

    def shared(self) -> dict[str, Tensor]:
        """Tensors that all mixers see."""
        return {} if self.bound_table is None else {"lower_bound": bounds(self.bound_table, self.config.lower_bound)}

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of every layer."""
        return [block.mixer for block in self.blocks if isinstance(block, Block)]

    def probe(self, B: int, T: int, labels: int) -> Tensor:
        """The loss of a batch of random inputs of B sequences with so many labels, of which only the time counts."""
        raise NotImplementedError(f"{type(self).__name__} has no probe")


@dataclass(frozen=True)
class Ends:
    """What a task puts before and after the blocks, made in this order between the other parameters."""

    embedding: Callable[[], nn.Module]
    head: Callable[[], nn.Module]


class SequenceModel(Backbone):
    """Token ids (B, T) to logits at chosen positions (M, V)."""

    embedding: nn.Embedding

    def __init__(
        self, config: ModelConfig, mixer: type[Mixer], settings: Mapping[str, Any], backend: str, vocab_size: int, max_len: int
    ) -> None:
        D = config.d_model
        self.vocab_size, self.max_len = vocab_size, max_len
        ends = Ends(lambda: nn.Embedding(vocab_size, D), lambda: self._make_head(config))
        super().__init__(config, mixer, settings, backend, max_len, ends)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _make_head(self, config: ModelConfig) -> nn.Module:
        """The head, untied. ConfigError for an adaptive softmax, which only language models have."""
        if config.softmax != "full":
            raise ConfigError(f"softmax={config.softmax} needs a suite of language models")
        return nn.Linear(config.d_model, self.vocab_size, bias=False)

    def probe(self, B: int, T: int, labels: int) -> Tensor:
        """The loss at the first `labels` positions of a batch of random tokens."""
        tokens_BT = torch.randint(self.embedding.num_embeddings, (B, T), generator=torch.Generator().manual_seed(0))
        return self.logits(tokens_BT, torch.arange(labels)).logsumexp(-1).mean()

    def logits(self, tokens_BT: Tensor, where: Tensor) -> Tensor:
        """Logits (M, V) at the M flat positions `where` of (B, T), in row order."""
        x_MD = self(tokens_BT).flatten(0, 1).index_select(0, where)  # its backward sorts nothing, that of x[where] does
        return self.head(x_MD)

    def loss(self, tokens_BT: Tensor, where: Tensor, labels_M: Tensor) -> Tensor:
        """Mean cross-entropy in float32 of the labels (M,) at the M flat positions `where` of (B, T); on fla in one Triton kernel."""
        logits_MV = self.logits(tokens_BT, where)
        if self.backend == "fla" and logits_MV.is_cuda:
            from hgrn2_bench.ops import fla

            return fla.cross_entropy(logits_MV, labels_M)
        return F.cross_entropy(logits_MV.float(), labels_M)


OUTPUT_PROJECTIONS = ("out_proj", "o_proj", "down")
"""Names of linear layers that write into the residual stream."""
