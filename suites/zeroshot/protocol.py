"""How rows of the zeroshot suite are compared. Imports neither torch nor numpy nor lm-eval.

Sources: the zero-shot table of the HGRN2 paper (arXiv 2404.07904), and lm-evaluation-harness, whose prompts and metrics the tasks have.
"""

from pathlib import Path

from hgrn2_bench.config import require
from hgrn2_bench.protocol import Figure, Protocol
from suites.zeroshot.presets import PRESETS, SIX
from suites.zeroshot.settings import SMOKE, ZeroshotConfig


def name_task(config: ZeroshotConfig) -> str:
    """lm-eval's name of the task, `piqa-first100` for its first items alone; `smoke-32-facts4` for questions on a source of 32 symbols."""
    name = f"{SMOKE}-{config.symbols}-facts{config.facts}" if config.lm_task == SMOKE else config.lm_task
    return f"{name}-first{config.limit}" if config.limit else name


def fingerprint(config: ZeroshotConfig, model: Path | None = None) -> str:
    """What tells this task's files from any others, whatever the model; empty where it has none here. ConfigError where it has several."""
    if config.lm_task == SMOKE:
        return ""
    from suites.zeroshot.places import fingerprint_of

    return fingerprint_of(config.lm_task)


def open_task(name: str) -> tuple[str, ...]:
    """The words of any of lm-eval's tasks. ConfigError with the nearest names for what is none."""
    require(name != SMOKE, f"task={SMOKE} asks models that are trained in place: write preset={SMOKE}, without a folder as model")
    from suites.zeroshot.catalogue import words_of

    return words_of(name)


PROTOCOL = Protocol(
    name="zeroshot",
    version=1,
    metric="score",
    unit="fraction",
    higher_is_better=True,
    data_schema=ZeroshotConfig,
    name_task=name_task,
    fingerprint=fingerprint,
    presets=PRESETS,
    open_task=open_task,
    tuned=(),
    budget=("train_tokens", "block"),
    idle=("fingerprint", "scan"),
    saves_weights=True,
    takes_any_language_model=True,
    averaged=("lm_task", SIX),
    averaged_as=("PIQA", "HS", "WG", "ARC-e", "ARC-c", "OBQA"),
    beside_metric=(
        ("acc", "acc", "test"),
        ("acc_norm", "acc_norm", "test"),
        ("perplexity", "perplexity", "test"),
        ("per word", "word_perplexity", "test"),
        ("cloze", "acc", "facts_cloze"),
        ("goal", "acc", "facts_goal"),
        ("ending", "acc", "facts_ending"),
        ("blank", "acc", "facts_blank"),
        ("question", "acc", "facts_question"),
    ),
    figures=(Figure("size", "score against parameters", x="parameters", x_label="parameters", metric="score", log_x=10),),
)
