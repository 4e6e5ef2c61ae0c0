"""The throughput protocol: what is timed, at which sizes. Imports neither torch nor numpy.

A cell times one model at one size; its seed is the number of the repeat, and the models take turns within a repeat.
"""

from dataclasses import dataclass

from hgrn2_bench.config import choice, require
from hgrn2_bench.protocol import Figure, Preset, Protocol

IDLE = (
    # a training step's learning rate and batch are the suite's own, and nothing is trained to an end
    *("lr", "batch_size", "epochs", "schedule", "warmup", "eval_every", "eval_batch_size", "stop_at", "select", "tune_on", "keep"),
    *("warmup_steps", "warmup_from", "schedule_steps", "updates", "micro_batch", "parallel"),
    *("cuda_graph", "compile_blocks"),  # `graph` and `compile` are the keys
    "scan",  # what is timed reads forward
)


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """The suite's own keys."""

    kind: str = choice("op", "layer", "train", "prefill", "decode", "memory")
    """The recurrence alone; the whole mixer; a language model's training step; its reading of a prompt; its next token; what it holds."""
    passes: str = choice("training", "forward")
    """Of op and layer: forward and backward, or forward alone."""
    seq_len: int = 2048
    """Tokens of a sequence; of decode and memory those before the next token."""
    tokens: int = 32_768
    """Tokens of a batch, in as many sequences as fit, at least one."""
    batch: int = 1
    """Sequences that decode and memory hold at once."""
    compile: bool = False
    """torch.compile on what is timed."""
    graph: bool = True
    """On a GPU: replay a training step or a decoding step as one CUDA graph."""
    vocab_size: int = 32_000
    sample_s: float = 0.5
    """Seconds of a sample, as far as 5 to 200 calls can fill them."""
    warm_up_s: float = 10.0
    """Longest warm-up; a cell that is not steady by then says so."""

    def __post_init__(self) -> None:
        require(self.seq_len >= 2, f"seq_len={self.seq_len} must be at least 2")
        for name in ("tokens", "batch"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(self.vocab_size >= 2, f"vocab_size={self.vocab_size} must be at least 2")
        for name in ("sample_s", "warm_up_s"):
            require(0 < getattr(self, name) <= 600, f"{name}={getattr(self, name)} must be positive and at most 600")
        require(self.passes == "training" or self.kind in ("op", "layer"), f"passes={self.passes} has no effect with kind={self.kind}")
        able = self.kind in ("layer", "train", "prefill")
        require(not self.compile or able, f"compile=true has no effect with kind={self.kind}; it is for layer, train and prefill")
        require(self.graph or self.kind in ("train", "decode"), f"graph=false has no effect with kind={self.kind}")
        require(self.batch == 1 or self.kind in ("decode", "memory"), f"batch={self.batch} has no effect with kind={self.kind}; use tokens")

    @property
    def sequences(self) -> int:
        """Sequences of one batch."""
        return self.batch if self.kind in ("decode", "memory") else max(1, self.tokens // self.seq_len)


def name_task(config: ThroughputConfig) -> str:
    """`op_training_32768`, `decode_batch1_graph`: all that one table holds, but for the model's size and the columns' lengths."""
    if config.kind == "decode":
        return f"decode_batch{config.batch}_{'graph' if config.graph else 'eager'}"
    if config.kind == "memory":
        return f"memory_batch{config.batch}"
    passes = f"_{config.passes}" if config.kind in ("op", "layer") else ""
    eager = "" if config.graph else "_eager"
    return f"{config.kind}{passes}_{config.tokens}{'_compiled' * config.compile}{eager}"


MODELS = "model=hgrn2,attention,gla,retnet,mamba2,gated_delta_net,hgrn1"
LANGUAGE_MODEL = (
    # the block that recipes.md gives for language models, for every mixer
    "channel_mixer=glu",
    "norm=rmsnorm",
    "conv=0",
    "attention.positions=rope",
    "init=mixer",
)
PAIR = (
    # fixed before anything was measured: HGRN2 with 8 heads of 128, attention with 8 of 128 and 16 of 64
    "d_model=1024",
    "hgrn2.expand_ratio=128",
    "attention.num_heads=8,16",
)
LENGTHS = "seq_len=512,1024,2048,4096,8192,16384,32768,65536"


def task(kind: str, *words: str) -> tuple[str, ...]:
    """The words of one task."""
    return (f"kind={kind}", *words)


TEST = Preset(
    summary="every kind at a size of milliseconds, each model once",
    source="ours: for the contract test",
    words=(
        MODELS,
        *LANGUAGE_MODEL,
        "d_model=16",
        "num_layers=1",
        "seq_len=32",
        "tokens=32",
        "vocab_size=64",
        "sample_s=0.001",
        "warm_up_s=0.001",
        "dtype=float32",
    ),
    tasks={
        "op": task("op"),
        "op_forward": task("op", "passes=forward"),
        "layer": task("layer"),
        "train": task("train", "graph=false"),
        "prefill": task("prefill"),
        "decode": task("decode", "graph=false"),
        "memory": task("memory"),
    },
)

SMOKE = Preset(
    summary="recurrence, decoding and memory of width 128 on a CPU, three repeats: a minute and a half",
    source="ours: what one thread shows of how cost grows with length",
    words=(
        MODELS,
        *LANGUAGE_MODEL,
        "d_model=128",
        "num_layers=2",
        "hgrn2.expand_ratio=64",
        "attention.num_heads=2",
        "tokens=4096",
        "vocab_size=256",
        "sample_s=0.3",
        "warm_up_s=1.0",
        "seed=0,1,2",
        "dtype=float32",
    ),
    tasks={
        "op": task("op", "seq_len=128,512,2048"),
        "decode": task("decode", "seq_len=128,1024", "graph=false"),
        "memory": task("memory", "seq_len=128,1024"),
    },
)

SHORT = Preset(
    summary="one GPU: recurrence at 32k tokens and T = 512 to 65,536, a 340M training step, decoding at 1k to 64k, two repeats",
    source="ours: d=1024, 24 layers (340M), batches of 32,768 tokens, to train 16,384",
    words=(MODELS, *LANGUAGE_MODEL, *PAIR, "num_layers=24", "seed=0,1", "dtype=bfloat16"),
    tasks={
        "op": task("op", LENGTHS, "num_layers=1"),
        "train": task("train", "seq_len=2048,8192", "tokens=16384"),
        "decode": task("decode", "seq_len=1024,4096,16384,65536"),
        "memory": task("memory", "seq_len=1024,4096,16384,65536"),
    },
)

PAPER = Preset(
    summary="everything: recurrence and layer forward and backward, compiled too, training, prefill, decoding, memory; three repeats",
    source="ours: no published throughput protocol fixes sizes, device and method at once",
    words=(MODELS, *LANGUAGE_MODEL, *PAIR, "num_layers=24", "seed=0,1,2", "dtype=bfloat16"),
    tasks={
        "op": task("op", f"{LENGTHS},131072", "num_layers=1"),
        "op_forward": task("op", f"{LENGTHS},131072", "num_layers=1", "passes=forward"),
        "layer": task("layer", f"{LENGTHS},131072", "num_layers=1", "compile=false,true"),
        "train": task("train", "tokens=16384", "seq_len=2048,8192,16384", "compile=false,true"),
        "train_130m": task("train", "tokens=16384", "seq_len=2048,8192,16384", "d_model=768", "num_layers=12", "attention.num_heads=6,12"),
        "train_1300m": task("train", "tokens=16384", "seq_len=2048,8192", "d_model=2048", "num_layers=24", "attention.num_heads=16,32"),
        "prefill": task("prefill", LENGTHS),
        "decode": task("decode", "seq_len=1024,4096,16384,65536", "graph=true,false"),
        "decode_batch": task("decode", "seq_len=1024,4096,16384", "batch=16"),
        "memory": task("memory", "seq_len=1024,4096,16384,65536,131072"),
    },
)

FIGURES = (
    Figure(
        "length",
        "throughput against length",
        x="seq_len",
        x_label="sequence length (tokens)",
        metric="tokens_per_s",
        log_x=2,
        log_y=True,
        rows="d_model",
        joined=("seq_len",),
    ),
    Figure(
        "latency",
        "time of one call against length",
        x="seq_len",
        x_label="sequence length (tokens)",
        metric="latency",
        log_x=2,
        log_y=True,
        rows="d_model",
        joined=("seq_len",),
        note="decoding: one token for every sequence of the batch",
    ),
    Figure(
        "memory",
        "memory against length",
        x="seq_len",
        x_label="sequence length (tokens)",
        metric="state",
        log_x=2,
        log_y=True,
        rows="d_model",
        joined=("seq_len",),
        note="what decoding holds for the batch",
    ),
)

PROTOCOL = Protocol(
    name="throughput",
    version=1,
    metric="tokens_per_s",
    unit="tokens/s",
    higher_is_better=True,
    data_schema=ThroughputConfig,
    name_task=name_task,
    presets={"test": TEST, "smoke": SMOKE, "short": SHORT, "paper": PAPER},
    tuned=(),
    idle=IDLE,
    speed=True,
    across="seq_len",
    beside=("hgrn2", "attention"),
    figures=FIGURES,
)
