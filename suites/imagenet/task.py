"""The keys of the imagenet suite beside those of its pictures: how they become tokens, and how they are altered in training."""

import re
from dataclasses import dataclass

from hgrn2_bench.config import choice, require
from suites.imagenet.settings import DRAWN, RESIDENT, ImagenetConfig

SIDES = {"cifar10": 32, "cifar100": 32, "fashion": 28}
SMALLEST_DRAWN = 16
RANDAUGMENT = re.compile(r"(rand(-(m\d+|n\d+|p[\d.]+|mstd[\d.]+|inc[01]|t\w+))*|augmix(-[a-z]+[\d.]+)*|originalr?|v0r?|3a)?")
"""Policies that timm knows; `mmax` is ours to set."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig(ImagenetConfig):
    """All keys of the suite."""

    patch: int = 14
    """Pixels of a patch in height and width; each patch is a token."""
    pool: str = choice("mean", "token")
    """What the head reads: the mean over all patches, or a class token."""
    augment: str = choice("none", "shift_flip", "crop_flip", "timm")
    """Of training pictures: shifts by up to 4 pixels and flips, as usual for CIFAR; a crop of random size and flips, as usual for ImageNet;
    or these with RandAugment, colour jitter and random erasing, by timm."""
    randaugment: str = "rand-m9-mstd0.5-inc1"
    jitter: float = 0.4
    erasing: float = 0.25
    """Of `augment=timm`: timm's name of the policy, the strength of the colour jitter (which timm leaves out beside a policy), and the
    share of pictures in which a box becomes noise."""
    repeats: int = 1
    """How often a picture is in the batches of an epoch, altered anew each time (repeated augmentation, arXiv 1901.09335); the epoch has as
    many batches as without."""
    mixup: float = 0.0
    cutmix: float = 0.0
    """Parameters of the Beta distributions by which two pictures are mixed: by weight, or by a box; 0: not."""
    mix_switch: float = 0.5
    """Where both are on: how often a box."""
    mix_group: int = 0
    """Pictures that share one draw of kind, weight and box, as those on one GPU of several do in published runs; 0: the whole batch."""
    smoothing: float = 0.0
    """Of labels."""
    crop: float = 0.875
    """Share of a picture's shorter side that evaluation sees, cut from its middle; pictures held as pixels are seen whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        size = f"image_size={self.image_size}"
        require(self.patch >= 1, f"patch={self.patch} must be at least 1")
        require(self.image_size % self.patch == 0, f"{size} must be a multiple of patch={self.patch}")
        side = SIDES.get(self.dataset, self.image_size)
        require(self.image_size == side, f"{size}: pictures of {self.dataset} have {side} pixels, and are not resized")
        small = self.dataset == DRAWN and self.image_size < SMALLEST_DRAWN
        require(not small, f"{size}: drawn pictures need at least {SMALLEST_DRAWN}")
        for name in ("jitter", "mixup", "cutmix", "mix_group"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("erasing", "mix_switch"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must be at least 0 and at most 1")
        require(0 <= self.smoothing < 1, f"smoothing={self.smoothing} must be at least 0 and less than 1")
        require(0 < self.crop <= 1, f"crop={self.crop} must be greater than 0 and at most 1")
        require(self.repeats >= 1, f"repeats={self.repeats} must be at least 1")
        self._check_augmentation()

    def _check_augmentation(self) -> None:
        """ConfigError for an alteration that these pictures do not get, and for settings of one that is off."""
        require(
            self.resident or self.augment != "shift_flip",
            f"augment=shift_flip is for pictures of one size held as pixels: give crop_flip or timm for {self.dataset}",
        )
        require(self.augment != "none" or self.repeats == 1, f"repeats={self.repeats} repeats pictures unaltered: give augment")
        mixes = self.mixup > 0 or self.cutmix > 0
        require(mixes or self.mix_group == 0, f"mix_group={self.mix_group} has no effect without mixup and cutmix")
        require(self.mix_group % 2 == 0, f"mix_group={self.mix_group} must be even: pictures are mixed in pairs")
        both = self.mixup > 0 and self.cutmix > 0
        usual = TaskConfig.mix_switch
        require(both or self.mix_switch == usual, f"mix_switch={self.mix_switch} has no effect without both mixup and cutmix")
        require(
            self.augment != "timm" or RANDAUGMENT.fullmatch(self.randaugment) is not None,
            f"randaugment={self.randaugment}: expected a policy of timm's without mmax, as rand-m9-mstd0.5-inc1",
        )
        for name in ("randaugment", "jitter", "erasing"):
            value = getattr(self, name)
            idle = f"{name}={value} has no effect with augment={self.augment}"
            require(self.augment == "timm" or value == getattr(TaskConfig, name), idle)

    @property
    def resident(self) -> bool:
        """Whether the pictures are held as pixels."""
        return self.dataset in (*RESIDENT, DRAWN)

    @property
    def channels(self) -> int:
        """Colours of a picture as the model sees it."""
        return 1 if self.dataset == "fashion" and self.augment in ("none", "shift_flip") else 3

    @property
    def mixes(self) -> bool:
        """Whether pictures are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return (self.image_size // self.patch) ** 2 + (self.pool == "token")


def name_task(config: TaskConfig) -> str:
    """The task's name: `imagenet`, `imagenet-160px` in another size than 224, `cifar10`, `cifar10-jpeg`, `drawn-24`."""
    if config.dataset == DRAWN:
        return f"{DRAWN}-{config.image_size}"
    if config.resident:
        return config.dataset + "-jpeg" * config.fingerprint.startswith("jpeg:")
    return config.dataset + f"-{config.image_size}px" * (config.image_size != 224)
