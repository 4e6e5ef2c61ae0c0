"""The presets that repeat published runs, and what the others share with them. Imports neither torch nor numpy."""

from hgrn2_bench.protocol import Preset


def task(dataset: str, *words: str) -> tuple[str, ...]:
    """The words of one task."""
    return (f"dataset={dataset}", *words)


BOTH = "scan=both"
SHARED = (
    # OpenNLPLab/lra: pre-norm blocks of mixer and GLU, mean over the true length; plain PyTorch initialisation
    "channel_mixer=glu",
    "init=mixer",
    "embed_std=1.0",
    "lower_bound=exclusive",
    "conv=0",
    "attention.num_heads=4",
    "weight_decay=0",
)

RUN_LRA = "OpenNLPLab/HGRN2 run_lra.py, script_lra_others.sh, srcipt_lra_image.sh; data, blocks and heads OpenNLPLab/lra@release"
PUBLISHED = (
    # its configuration and what its data loader does: batches of one length, padding read as text is, bfloat16
    "schedule=cosine",
    "mask_padding=false",
    "sort_lengths=false",
    "seed=2222",
    "stop_at=0",
)
POSITION = ("positions=sinusoid", "embed_dropout=0.1")
"""Its encoder `position`: a fixed sinusoid, then dropout at the class's own rate."""

SIZES = {
    # HGRN2's models: layers, width, width of the GLU, expansion
    "listops": ("num_layers=5", "d_model=64", "channel_width=64", "hgrn2.expand_ratio=4"),
    "text": ("num_layers=4", "d_model=128", "channel_width=128", "hgrn2.expand_ratio=8"),
    "retrieval": ("num_layers=2", "d_model=256", "channel_width=512", "hgrn2.expand_ratio=2"),
    "image": ("num_layers=6", "d_model=512", "channel_width=512", "hgrn2.expand_ratio=2"),
    "pathfinder": ("num_layers=6", "d_model=128", "channel_width=128", "hgrn2.expand_ratio=2"),
    "pathx": ("num_layers=6", "d_model=32", "channel_width=32", "hgrn2.expand_ratio=1"),
}

PAPER = Preset(
    summary="HGRN2's runs: 1-D both ways for text tasks, 2-D for images, colour and augmentation on Image, its schedules and norms",
    source=f"{RUN_LRA}; other models are our extension of the protocol",
    source_models=("hgrn2",),
    reproduces=("lra_main",),
    words=("model=hgrn2", *SHARED, *PUBLISHED, "keep=both", "dtype=bfloat16"),
    tasks={
        "listops": task(
            "listops",
            BOTH,
            *POSITION,
            *SIZES["listops"],
            "norm=batchnorm",
            "batch_size=128",
            "lr=5e-4",
            "warmup_steps=5000",
            "schedule_steps=50_000",
            "epochs=50",
        ),
        "text": task(
            "text",
            BOTH,
            *SIZES["text"],
            "norm=layernorm",
            "channel_dropout=0.1",
            "batch_size=64",
            "lr=5e-3",
            "warmup_steps=10_000",
            "schedule_steps=50_000",
            "epochs=40",
            "validation=test",
        ),
        "retrieval": task(
            "retrieval",
            BOTH,
            *POSITION,
            *SIZES["retrieval"],
            "norm=batchnorm",
            "batch_size=128",
            "lr=5e-3",
            "warmup_steps=312",
            "schedule_steps=50_000",
            "epochs=20",
            "clip=1.0",
        ),
        "image": task(
            "image",
            "scan=2d_parallel",
            *POSITION,
            *SIZES["image"],
            "norm=batchnorm",
            "colour=rgb",
            "augment=true",
            "batch_size=64",
            "lr=3e-3",
            "warmup_steps=30_000",
            "schedule_steps=50_000",
            "epochs=75",
        ),
        "pathfinder": task(
            "pathfinder",
            "scan=2d_parallel",
            *SIZES["pathfinder"],
            "norm=batchnorm",
            "norm_group=16",
            "batch_size=128",
            "lr=2e-3",
            "warmup_steps=50_000",
            "schedule_steps=500_000",
            "epochs=100",
        ),
        "pathx": task(
            "pathx",
            "resolution=128",
            "scan=2d_series",
            *POSITION,
            *SIZES["pathx"],
            "norm=batchnorm",
            "norm_group=32",
            "batch_size=256",
            "lr=7.5e-4",
            "warmup_steps=150_000",
            "schedule_steps=500_000",
            "epochs=200",
            "clip=1.0",
        ),
    },
)

HGRN1 = Preset(
    summary="HGRN1's runs: complex HGRN, its own batches, norms and epochs, float32",
    source="OpenNLPLab/HGRN script_lra.py, train_lra.sh, train_lra_image.sh; other models are our extension of the protocol",
    source_models=("hgrn1",),
    words=("model=hgrn1", *SHARED, *PUBLISHED, "keep=both", "dtype=float32"),
    tasks={
        "listops": task(
            "listops",
            BOTH,
            *POSITION,
            "num_layers=6",
            "d_model=32",
            "channel_width=32",
            "norm=batchnorm",
            "batch_size=128",
            "lr=5e-4",
            "weight_decay=0.01",
            "warmup_steps=5000",
            "schedule_steps=50_000",
            "epochs=50",
        ),
        "text": task(
            "text",
            BOTH,
            *POSITION,
            "num_layers=4",
            "d_model=128",
            "channel_width=128",
            "norm=batchnorm",
            "channel_dropout=0.1",
            "batch_size=32",
            "lr=5e-3",
            "warmup_steps=10_000",
            "schedule_steps=50_000",
            "epochs=32",
            "validation=test",
        ),
        "retrieval": task(
            "retrieval",
            BOTH,
            *POSITION,
            "num_layers=2",
            "d_model=64",
            "channel_width=128",
            "norm=batchnorm",
            "batch_size=64",
            "lr=5e-3",
            "warmup_steps=312",
            "schedule_steps=50_000",
            "epochs=20",
        ),
        "image": task(
            "image",
            "scan=2d_parallel",
            *POSITION,
            "num_layers=6",
            "d_model=512",
            "channel_width=512",
            "norm=batchnorm",
            "colour=rgb",
            "augment=true",
            "batch_size=50",
            "lr=3e-3",
            "warmup_steps=30_000",
            "schedule_steps=50_000",
            "epochs=100",
        ),
        "pathfinder": task(
            "pathfinder",
            "scan=2d_parallel",
            "num_layers=6",
            "d_model=128",
            "channel_width=128",
            "norm=batchnorm",
            "batch_size=128",
            "lr=2e-3",
            "warmup_steps=50_000",
            "schedule_steps=500_000",
            "epochs=200",
        ),
        "pathx": task(
            "pathx",
            "resolution=128",
            "scan=2d_parallel",
            "num_layers=6",
            "d_model=64",
            "channel_width=64",
            "norm=batchnorm",
            "batch_size=16",
            "lr=7.5e-4",
            "warmup_steps=150_000",
            "schedule_steps=500_000",
            "epochs=100",
        ),
    },
)
