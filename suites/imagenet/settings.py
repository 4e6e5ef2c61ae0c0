"""The keys of the imagenet suite that say which pictures are read and how they are split. Imports no torch."""

from dataclasses import dataclass

from hgrn2_bench.config import choice, require

RESIDENT = ("cifar10", "cifar100", "fashion")
"""Sets small enough to be held as pixels."""
DRAWN = "drawn"
"""Pictures that are made, not read."""


@dataclass(frozen=True, kw_only=True)
class ImagenetConfig:
    """The suite's own keys."""

    dataset: str = choice("imagenet", *RESIDENT, "folder", DRAWN)
    """ImageNet-1k, CIFAR, Fashion-MNIST, any other set of pictures in one of ImageNet's layouts, or drawn ones, which need no files."""
    fingerprint: str = ""
    """Of the files that were read; planning puts it here."""
    image_size: int = 224
    """Pixels in height and width that the model sees."""
    train_examples: int = 0
    validation_examples: int = 0
    test_examples: int = 0
    """At most so many of a split, drawn by a fixed seed; 0: all."""
    validation: str = choice("split", "test")
    """Where a set has two splits alone, selection sees a part of the training data or, as in papers, the test data: ImageNet's `val`."""
    policy: str = choice("error", "skip")
    """A picture that cannot be decoded stops the run, or is left out and counted; no other takes its place."""
    orientation: str = choice("stored", "exif")
    """Pictures as they are stored, as published results have them, or turned as their EXIF data say."""
    real_labels: bool = False
    """Score ImageNet's test pictures with the ReaL labels too: real.json in the data folder, or timm's copy."""

    def __post_init__(self) -> None:
        require(self.image_size >= 1, f"image_size={self.image_size} must be at least 1")
        for name in ("train_examples", "validation_examples", "test_examples"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        of_imagenet = self.dataset == "imagenet"
        require(of_imagenet or not self.real_labels, f"real_labels=true: there are none of {self.dataset}, only of imagenet")
        encoded = of_imagenet or self.dataset == "folder"
        idle = f"orientation={self.orientation} has no effect on dataset={self.dataset}"
        require(encoded or self.orientation == "stored", idle)
        idle = f"policy={self.policy} has no effect on dataset={self.dataset}"
        require(self.dataset != DRAWN or self.policy == "error", idle)
