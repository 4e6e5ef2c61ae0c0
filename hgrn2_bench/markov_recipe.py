"""What a generated text with facts is made of (see `hgrn2_bench.markov`), as far as planning checks it. Imports no numpy."""

from dataclasses import dataclass

from hgrn2_bench.config import require

MAX_SYMBOLS = 65_536
RECALL = (
    # What makes a two-layer model learn to recall within CPU minutes (as in suite mqar): embeddings of standard deviation 1, a head of
    # their own, a convolution, slow decay. The same for all.
    "conv=4",
    "positions=none",
    "attention.positions=rope",  # without positions it takes the values of two documents in one block for each other's
    "channel_mixer=none",
    "tie_embeddings=false",
    "embed_std=1.0",
    "forget_bias=3.0",
    "gla.num_heads=1",
    "lr=1e-2",
    "weight_decay=0.1",
    "clip=1.0",
    "schedule=cosine",
    "warmup=0.1",
    "dtype=float32",
    "seed=0",
)
"""Words of the presets whose models learn such a text on a CPU."""


@dataclass(frozen=True)
class Recipe:
    """A source's symbols, the separator among them, the facts (pairs of a key and its value) at a document's start, its mean tokens."""

    symbols: int
    facts: int
    document: int

    def __post_init__(self) -> None:
        require(2 <= self.symbols <= MAX_SYMBOLS, f"symbols={self.symbols} must be at least 2 and at most {MAX_SYMBOLS}")
        require(self.facts >= 0, f"facts={self.facts} must not be negative")
        known = f"symbols={self.symbols} with facts={self.facts}"
        require(2 * self.facts < self.symbols, f"{known}: {self.facts} keys, as many values and the separator are different symbols")
        long = self.document >= 2 * self.facts + 2
        require(long, f"document={self.document} with facts={self.facts} must be at least {2 * self.facts + 2}: 2 tokens beside the facts")
