"""What a generated text with facts is made of (see `hgrn2_bench.markov`), as far as planning checks it. Imports no numpy."""

from dataclasses import dataclass

from hgrn2_bench.config import require

MAX_SYMBOLS = 65_536


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
