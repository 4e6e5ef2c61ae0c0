"""How rows of the imagenet suite are compared. Imports neither torch nor numpy.

Sources: ImageNet-1k (arXiv 1409.0575); HGRN2's launch scripts (OpenNLPLab/HGRN2 run_im.py); DeiT (arXiv 2012.12877); timm.
"""

from hgrn2_bench.protocol import Figure, Protocol
from suites.imagenet.presets import PRESETS
from suites.imagenet.task import TaskConfig, name_task


def fingerprint(config: TaskConfig) -> str:
    """What tells this task's files from any others; ConfigError where they are not there."""
    from suites.imagenet.files import fingerprint_of

    return fingerprint_of(config)


PROTOCOL = Protocol(
    name="imagenet",
    version=1,
    metric="top1",
    unit="fraction",
    higher_is_better=True,
    data_schema=TaskConfig,
    name_task=name_task,
    fingerprint=fingerprint,
    presets=PRESETS,
    has_images=lambda config: True,
    budget=("image_size", "patch", "pool", "train_examples", "augment", "repeats", "mixup", "cutmix", "smoothing", "validation"),
    idle=("fingerprint", "softmax", "cutoffs", "embed_scale", "tie_embeddings"),
    beside_metric=(("top-5", "top5", "test"), ("ReaL", "real", "test")),
    rates=(
        ("images/s, inference", "inference_images_per_s", ("inference_mode", "inference_batch")),
        ("images/s, loader", "loader_images_per_s", ("loader_workers",)),
    ),
    figures=(
        Figure("lr", "top-1 accuracy against learning rate", x="lr", x_label="learning rate", metric="top1", log_x=10, joined=("lr",)),
        Figure("size", "top-1 accuracy against size", x="parameters", x_label="parameters", metric="top1", log_x=10),
    ),
)
