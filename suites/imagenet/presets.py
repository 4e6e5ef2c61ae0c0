"""The imagenet suite's presets: every number of a protocol, each with its source. Imports neither torch nor numpy."""

from hgrn2_bench.protocol import Preset

SHARED = (
    # one backbone for every mixer: pre-norm blocks of mixer and GLU, both ways along the patches unless a scan is given, the mean over them
    "channel_mixer=glu",
    "scan=both",
    "lower_bound=exclusive",
    "attention.positions=learned",
    "conv=0",
)

TEST = Preset(
    summary="the whole path in seconds: drawn pictures, one layer of width 16, four steps; no model learns anything",
    source="ours: for the contract test",
    words=(
        "model=hgrn2,attention,gla",
        *SHARED,
        "dataset=drawn",
        "image_size=16",
        "patch=4",
        "d_model=16",
        "num_layers=1",
        "channel_width=16",
        "hgrn2.expand_ratio=4",
        "attention.num_heads=4",
        "augment=shift_flip",
        "mixup=0.8",
        "cutmix=1.0",
        "batch_size=4",
        "eval_batch_size=8",
        "train_examples=16",
        "validation_examples=8",
        "test_examples=8",
        "seed=0",
        "dtype=float32",
    ),
    tasks={"drawn": ()},
)

SMOKE = Preset(
    summary="drawn pictures whose class is where two discs lie: HGRN2 reading in 1-D and in 2-D against a small ViT, CPU minutes",
    source="ours: what a laptop can run; not one number of it belongs beside a published one",
    words=(
        "model=hgrn2,attention",
        *SHARED,
        "hgrn2.scan=both,2d_parallel",
        "dataset=drawn",
        "image_size=24",
        "patch=4",
        "d_model=48",
        "num_layers=2",
        "channel_width=96",
        "hgrn2.expand_ratio=16",
        "attention.num_heads=4",
        "batch_size=64",
        "epochs=2",
        "lr=4e-3",
        "weight_decay=0.05",
        "schedule=cosine",
        "warmup=0.1",
        "clip=1.0",
        "seed=0",
        "dtype=float32",
    ),
    tasks={"drawn": ()},
)

SHORT = Preset(
    summary="CIFAR-10 in patches of 2 and Fashion-MNIST, six layers of width 192, 30 and 15 epochs; six of 8 cells: 20 H100 minutes",
    source="ours",
    words=(
        "model=hgrn2,attention,gla",
        *SHARED,
        "hgrn2.scan=both,2d_parallel",
        "patch=2",
        "d_model=192",
        "num_layers=6",
        "channel_width=384",
        "hgrn2.expand_ratio=64",
        "attention.num_heads=3",
        "gla.num_heads=3",
        "augment=shift_flip",
        "smoothing=0.1",
        "batch_size=256",
        "epochs=30",
        "lr=1e-3",
        "weight_decay=0.05",
        "schedule=cosine",
        "warmup=0.1",
        "clip=1.0",
        "drop_path=0.1",
        "seed=0",
        "dtype=bfloat16",
    ),
    tasks={
        "cifar10": ("dataset=cifar10", "image_size=32"),
        "fashion": ("dataset=fashion", "image_size=28", "epochs=15"),
    },
)

ALTERED = (
    # both HGRN2's scripts and DeiT
    "dataset=imagenet",
    "image_size=224",
    "augment=timm",
    "repeats=3",
    "mixup=0.8",
    "cutmix=1.0",
    "mix_group=128",  # pictures of one GPU, 8 of which make a batch of 1024
    "smoothing=0.1",
    "validation=test",
    "schedule=cosine_timm",
    "epochs=300",
    "warmup_from=1e-6",
    "lr_end=1e-5",
    "init=truncated",
    "num_layers=12",
    "keep=both",
    "dtype=bfloat16",
)
TINY = ("d_model=192", "attention.num_heads=3", "hgrn2.expand_ratio=64")
SMALL = ("d_model=384", "attention.num_heads=6", "hgrn2.expand_ratio=64")
RUN_IM = "OpenNLPLab/HGRN2 run_im.py and script_im.sh"

PAPER = Preset(
    summary="HGRN2's runs on ImageNet-1k: 300 epochs, tiny and small; what is not public of the model is HGRN1's; every option has a key",
    source=f"{RUN_IM}; the model from HGRN1's code (OpenNLPLab/im); bfloat16 for its fp16; other models are our extension of the protocol",
    source_models=("hgrn2",),
    words=(
        "model=hgrn2",
        *SHARED,
        *ALTERED,
        "patch=14",
        "pool=mean",
        "norm=layernorm",
        "final_norm=simple_rmsnorm",
        "clip=5",
        "seed=3407",
    ),
    tasks={
        "tiny": (*TINY, "channel_width=384", "batch_size=1024", "lr=1.5e-3", "weight_decay=0.05", "warmup=0.0667"),
        "small": (*SMALL, "channel_width=768", "batch_size=2048", "lr=3e-3", "weight_decay=0.1", "warmup=0.0333"),
    },
)

DEIT = Preset(
    summary="DeiT's recipe and models on ImageNet-1k: class token, learned positions, GELU MLP; with other models, its recipe around them",
    source="arXiv 2012.12877, facebookresearch/deit; computes what timm's deit_tiny_patch16_224 and deit_small_patch16_224 compute",
    source_models=("attention",),
    words=(
        "model=attention",
        *ALTERED,
        "scan=both",
        "patch=16",
        "pool=token",
        "positions=learned",
        "channel_mixer=mlp",
        "norm=layernorm",
        "norm_eps=1e-6",
        "drop_path=0.1",
        "batch_size=1024",
        "lr=1e-3",
        "weight_decay=0.05",
        "warmup=0.0167",
        "ema=0.99996",
        "seed=0",
    ),
    tasks={"tiny": TINY[:2], "small": SMALL[:2]},
)

PRESETS = {"test": TEST, "smoke": SMOKE, "short": SHORT, "paper": PAPER, "deit": DEIT}
