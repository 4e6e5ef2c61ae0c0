"""How rows of the wikitext suite are compared. Imports neither torch nor numpy.

Sources: WikiText-103 (arXiv 1609.07843); its recipe for HGRN2 (OpenNLPLab/HGRN2 script_lm.sh, fairseq); the other texts are ours.
"""

from pathlib import Path

from hgrn2_bench.protocol import Figure, Protocol
from suites.wikitext.presets import PRESETS
from suites.wikitext.settings import WikitextConfig

POSITIONS = tuple(2**power for power in range(4, 15))
"""Ends of the bins of the loss by position that the figure shows."""


def name_task(config: WikitextConfig) -> str:
    """The task's name: `wikitext103-gpt2`, `wikitext103-tokens-gpt2` for the text with <unk>, `imdb-bytes`, `markov-32-facts4`."""
    if config.dataset == "markov":
        return f"markov-{config.symbols}" + f"-facts{config.facts}" * bool(config.facts)
    with_unknown = config.dataset == "wikitext103" and config.tokenizer != "word" and config.fingerprint.startswith("tokens:")
    return f"{config.dataset}{'-tokens' * with_unknown}-{config.tokenizer}"


def fingerprint(config: WikitextConfig, model: Path | None = None) -> str:
    """What tells this task's files from any others, with the tokenizer of a trained model's folder. ConfigError where they are missing."""
    from suites.wikitext.texts import fingerprint_of

    return fingerprint_of(config, model)


PROTOCOL = Protocol(
    name="wikitext",
    version=1,
    metric="perplexity",
    unit="per token",
    higher_is_better=False,
    data_schema=WikitextConfig,
    name_task=name_task,
    fingerprint=fingerprint,
    presets=PRESETS,
    budget=("train_tokens", "eval_tokens", "block", "window"),
    idle=("fingerprint", "scan"),
    saves_weights=True,
    beside_metric=(
        ("in a context window", "perplexity_window", "test"),
        ("with carried state", "perplexity_carried", "test"),
        ("per word", "word_perplexity", "test"),
        ("bits per byte", "bits_per_byte", "test"),
        ("bits per byte, WikiText", "bits_per_byte", "transfer_test"),
        ("excess nats, free tokens", "excess_free", "test"),
        ("recalled, in a window", "excess_recalled_window", "test"),
        ("recalled, carried state", "excess_recalled_carried", "test"),
    ),
    figures=(
        Figure("lr", "perplexity against learning rate", x="lr", x_label="learning rate", metric="perplexity", log_x=10, joined=("lr",)),
        Figure("state", "perplexity against state", x="state_bytes", x_label="state (bytes)", metric="perplexity", log_x=2),
        Figure(
            "expansion",
            "perplexity against state expansion",
            x="hgrn2.expand_ratio",
            x_label="expand_ratio",
            metric="perplexity",
            log_x=2,
            joined=("expand_ratio",),
        ),
        Figure(
            "position",
            "loss by position",
            x="split",
            x_label="tokens of context, up to",
            metric="nats_per_token",
            log_x=2,
            splits={f"test_to_{end}": end for end in POSITIONS},
            note="each point is the mean over the positions since the one before; beyond the training length a model extrapolates",
        ),
    ),
)
