"""Long Range Arena's settings, and how its rows are compared. Imports neither torch nor numpy.

Sources: Long Range Arena (arXiv 2011.04006), google-research/long-range-arena; its data and splits as S4-style code has them
(state-spaces/s4), which HGRN2 used too (OpenNLPLab/HGRN2 run_lra.py, OpenNLPLab/lra).
"""

from dataclasses import dataclass

from hgrn2_bench.config import choice, require
from hgrn2_bench.protocol import Figure, Protocol
from suites.lra.places import RESOLUTIONS
from suites.lra.presets import PRESETS

DATASETS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
WORDS = ("listops", "text", "retrieval")
"""Tasks of tokens; the others are images."""
GENERATED = ("listops", "pathfinder", "pathx")
CLASSES = {"listops": 10, "text": 2, "retrieval": 2, "image": 10, "pathfinder": 2, "pathx": 2}
LENGTHS = {"listops": 2048, "text": 4096, "retrieval": 4000}
"""Tokens of the longest text that the published tasks keep, the end token included."""


@dataclass(frozen=True, kw_only=True)
class LRAConfig:
    """The suite's own keys: which task from which source, how much of it, and how it is fed to a model."""

    dataset: str = choice(*DATASETS)
    source: str = choice("files", "generated", "standin")
    """Files of the data folder; our own generator of the published distribution; or for text, retrieval and image invented data."""
    fingerprint: str = ""
    """Of the files that were read; planning puts it here."""
    train_examples: int = 0
    validation_examples: int = 0
    test_examples: int = 0
    """0: all there are, of a generated task the published number."""
    validation: str = choice("split", "test")
    """Of text, which has no validation data: a tenth of the training data, or the test data, as the published runs had it."""
    max_len: int = 0
    """Tokens that a text may have, the end token included; 0: the published length of the task."""
    min_tokens: int = 500
    max_tokens: int = 2000
    max_depth: int = 10
    """Of generated ListOps: its expressions are longer than min_tokens and shorter than max_tokens, and nest at most so deep."""
    resolution: int = 32
    contour_length: int = 14
    """Of Pathfinder: 14 is the hard set that is reported, 9 and 6 the easier ones."""
    colour: str = choice("grey", "rgb")
    augment: bool = False
    """Of images: a random crop after symmetric padding by 4, and a random flip."""
    centred: bool = True
    """Of Pathfinder: pixels in -1 to 1, or in 0 to 1."""
    mask_padding: bool = True
    """Recurrences and batch norms skip the padding; the published runs read it."""
    sort_lengths: bool = True
    """Batches hold texts of similar length."""

    def __post_init__(self) -> None:
        given = f"source={self.source}"
        require(self.source != "generated" or self.dataset in GENERATED, f"{given}: nothing generates {self.dataset}; use files or standin")
        can_stand_in = self.dataset not in GENERATED
        require(self.source != "standin" or can_stand_in, f"{given}: {self.dataset} has a generator; use source=generated or files")
        for name in ("train_examples", "validation_examples", "test_examples", "max_len"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require(self.max_len != 1, "max_len=1 leaves no room beside the end token")
        tokens = f"min_tokens={self.min_tokens}, max_tokens={self.max_tokens}"
        require(1 <= self.min_tokens < self.max_tokens - 1, f"{tokens}: no expression can be longer than one and shorter than the other")
        require(2 <= self.max_depth <= 20, f"max_depth={self.max_depth} must be at least 2 and at most 20")
        require(self.resolution in (32, 64, 128, 256), f"resolution={self.resolution} must be 32, 64, 128 or 256")
        size = RESOLUTIONS.get(self.dataset, self.resolution)
        no_files = f"resolution={self.resolution}: the files of {self.dataset} have {size}; use source=generated"
        require(self.source != "files" or self.resolution == size, no_files)
        require(self.contour_length in (6, 9, 14), f"contour_length={self.contour_length} must be 6, 9 or 14")
        self._refuse_idle()
        require(self.dataset == "image" or self.colour == "grey", f"colour={self.colour} has no effect on {self.dataset}")
        require(self.dataset == "image" or not self.augment, f"augment=true has no effect on {self.dataset}")
        require(self.dataset == "text" or self.validation == "split", f"validation=test is for text alone: {self.dataset} has its own")

    def _refuse_idle(self) -> None:
        """ConfigError for a size that was given to a task which it does not change."""
        drawn = self.source == "generated"
        used = {
            "max_len": self.dataset in WORDS,
            **dict.fromkeys(("min_tokens", "max_tokens", "max_depth"), self.dataset == "listops" and drawn),
            **dict.fromkeys(("resolution", "contour_length"), self.dataset in RESOLUTIONS),
        }
        for name, has_effect in used.items():
            given = getattr(self, name)
            idle = f"{name}={given} has no effect on {self.dataset} with source={self.source}"
            require(has_effect or given == getattr(type(self), name), idle)

    @property
    def longest(self) -> int:
        """Tokens or pixels of the longest input."""
        if self.dataset in WORDS:
            drawn_short = self.dataset == "listops" and self.source == "generated"
            return self.max_len or min(LENGTHS[self.dataset], self.max_tokens if drawn_short else LENGTHS[self.dataset])
        return 32 * 32 if self.dataset == "image" else self.resolution**2


def name_task(config: LRAConfig) -> str:
    """The task's name: that of the published one for its own files alone.

    `listops-500`, `pathfinder-6` for easier distributions of ours, `listops-generated` for the published one, `standin-text`,
    `image-jpeg` for images that were compressed with loss, `pathfinder-files-6` for the archive's easier sets, `text-len256` for
    texts cut elsewhere than the published ones.
    """
    cut = config.dataset in WORDS and config.max_len not in (0, LENGTHS[config.dataset]) and config.source != "standin"
    return _name_source(config) + f"-len{config.max_len}" * cut


def _name_source(config: LRAConfig) -> str:
    if config.source == "standin":
        return f"standin-{config.dataset}"
    if config.source == "files":
        easier = config.dataset in RESOLUTIONS and config.contour_length != 14
        return config.dataset + "-jpeg" * config.fingerprint.startswith("jpeg") + f"-files-{config.contour_length}" * easier
    if config.dataset == "listops":
        published = (config.min_tokens, config.max_tokens, config.max_depth) == (500, 2000, 10)
        return "listops-generated" if published else f"listops-{config.max_tokens}"
    size = "" if config.resolution == RESOLUTIONS[config.dataset] else f"-{config.resolution}px"
    return f"{config.dataset}{size}-{'generated' if config.contour_length == 14 else config.contour_length}"


def fingerprint(config: LRAConfig) -> str:
    """What tells this task's files from any others; ConfigError where they are not there."""
    if config.source != "files":
        return ""
    from suites.lra.files import fingerprint_of

    return fingerprint_of(config.dataset)


PROTOCOL = Protocol(
    name="lra",
    version=1,
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    data_schema=LRAConfig,
    name_task=name_task,
    fingerprint=fingerprint,
    has_images=lambda config: config.dataset not in WORDS,
    presets=PRESETS,
    budget=("train_examples", "scan", "norm", "colour", "augment", "validation", "mask_padding"),
    idle=("fingerprint", "softmax", "cutoffs"),
    averaged=("dataset", DATASETS),
    figures=(
        Figure("lr", "accuracy against learning rate", x="lr", x_label="learning rate", metric="accuracy", log_x=10, joined=("lr",)),
        Figure("state", "accuracy against state", x="state_bytes", x_label="state (bytes)", metric="accuracy", log_x=2),
    ),
)
