"""MQAR's presets: every number of a protocol, each with its source. Imports neither torch nor numpy."""

from hgrn2_bench.protocol import Preset


def setting(seq_len: int, num_pairs: int, *words: str) -> dict[str, tuple[str, ...]]:
    """One task of a preset."""
    return {f"len{seq_len}_kv{num_pairs}": (f"seq_len={seq_len}", f"num_pairs={num_pairs}", *words)}


SMALL_STACK = (
    # Two mixer layers and nothing else, the same trimmings for all.
    "model=hgrn2,attention,gla,mamba,hgrn1",
    "vocab_size=32",
    "d_model=64",
    "num_layers=2",
    "conv=4",
    "positions=none",
    "channel_mixer=none",
    "tie_embeddings=false",
    "embed_std=1.0",
    "gla.num_heads=1",  # one head, as HGRN2 and attention have at this width
    "lr=5e-3",  # of 3e-3, 4e-3 and 5e-3 the one at which Mamba passes 0.9 at (32, 4) in all five seeds tried
    "weight_decay=0.1",
    "schedule=cosine",
    "warmup=0.1",
    "batch_size=32",
    "dtype=float32",
)

SMOKE = Preset(
    summary="real task, tiny scale: V=32, L=32, k=4 and 8, two layers of width 64, 1,500 steps of fresh examples, CPU",
    source="ours: 4 pairs, which every mixer can learn in a CPU minute, and 8, which shows whose state is too small",
    words=(*SMALL_STACK, "seed=0,1", "train_examples=48_000", "validation_examples=500", "eval_every=100", "stop_at=0.998"),
    tasks={**setting(32, 4), **setting(32, 8)},
)

TEST = Preset(
    summary="the whole path in seconds: V=16, L=16, k=2, one layer of width 16, 20 steps; no model learns anything",
    source="ours: for the contract test",
    words=(
        *SMALL_STACK,
        "seed=0",
        "vocab_size=16",
        "d_model=16",
        "num_layers=1",
        "train_examples=640",
        "validation_examples=64",
        "test_examples=64",
    ),
    tasks=setting(16, 2),
)

ZOOLOGY_MODEL = (
    # HazyResearch/zoology zoology/{config,model,train}.py, kept by its fork OpenNLPLab/Zoology
    "vocab_size=8192",
    "power_a=0.01",  # the class default; the configs' train_power_a is not a field there and has no effect
    "num_layers=2",
    "conv=0",
    "positions=none",
    "attention.num_heads=1",
    "attention.dropout=0.1",
    "lower_bound=none",
    "channel_mixer=identity",  # Zoology's block without a state mixer adds the normalised residual back
    "norm=layernorm",
    "tie_embeddings=true",
    "embed_std=0.02",
    "embed_dropout=0.1",
    "init=blanket",  # Zoology re-initialises every Linear of every mixer
    "weight_decay=0.1",
    "decay_all=true",
    "schedule=cosine_epoch",
    "warmup=0.0",
    "clip=0.0",
    "stop_at=0.99",
    "select=test",  # the source stops and chooses its learning rate on the test set
    "seed=123",  # TrainConfig.seed; data and weights share it here
)
ONE_SETTING = (
    "random_fill=false",
    "train_examples=100_000",
    "validation_examples=3_000",  # ours, never used to choose: the source has train and test only
    "test_examples=3_000",
    "d_model=64,128,256,512",
    "attention.positions=learned",  # max_position_embeddings is the length for softmax attention, 0 for all others
    "epochs=64",
)
THREE_SETTINGS = {**setting(64, 4, "batch_size=512"), **setting(128, 8, "batch_size=512"), **setting(256, 16, "batch_size=256")}
FIGURE2_RATES = "lr=1e-4,4.641589e-4,2.1544347e-3,1e-2"  # np.logspace(-4, -2, 4)

PAPER = Preset(
    summary="HGRN2's protocol: V=8192, four settings, four widths, seven learning rates, zero filler, 64 epochs",
    source="OpenNLPLab/Zoology zoology/experiments/hgrn/hgrn2.py and hgrn1.py; attention, GLA, Mamba are our extension of the protocol",
    source_models=("hgrn2", "hgrn1"),  # its transformer.py, by an indentation slip, trains length 512 only
    words=(
        "model=hgrn2,hgrn1,attention",
        *ZOOLOGY_MODEL,
        *ONE_SETTING,
        "lr=1e-5,5e-5,1e-4,5e-4,1e-3,5e-3,1e-2",
        "dtype=bfloat16",  # autocast in training; evaluation without. bfloat16 needs no gradient scaler
    ),
    tasks={**THREE_SETTINGS, **setting(512, 64, "batch_size=64")},
)

ZOOLOGY = Preset(
    summary="Zoology's figure 2: attention 2 layers, every other mixer 4, four widths, four learning rates, float32, 64 epochs",
    source="HazyResearch/zoology at de4e2587, zoology/experiments/paper/figure2.py, the oldest public configuration of the figure",
    source_models=("attention", "base_conv"),  # its RWKV (version 4), Hyena and H3 are not here; its Mamba has a block of its own
    reproduces=("zoology_figure2",),
    words=(
        "model=attention,base_conv,hgrn2,gla,mamba2,delta_net",
        *ZOOLOGY_MODEL,
        *ONE_SETTING,
        "num_layers=4",
        "attention.num_layers=2",
        "base_conv.long=odd",  # kernel_size [3, -1, 3, -1]: width 3, then a filter of the whole length
        FIGURE2_RATES,
        "shuffle=true",  # its DataLoader shuffled then
        "dtype=float32",
    ),
    tasks={**THREE_SETTINGS, **setting(512, 64, "batch_size=128")},
)

ZOOLOGY_HEAD = Preset(
    summary="Zoology's figure 2 as its code has it now: 2 layers for every mixer, three settings, batches in one order",
    source="HazyResearch/zoology at d88d6f5, zoology/experiments/paper_configs/iclr24_zoology_figure2/configs.py",
    source_models=("attention", "base_conv"),
    reproduces=("zoology_figure2",),
    words=(
        "model=attention,base_conv,hgrn2,gla,mamba2,delta_net",
        *ZOOLOGY_MODEL,
        *ONE_SETTING,
        "base_conv.long=odd",
        FIGURE2_RATES,
        "dtype=float32",
    ),
    tasks=THREE_SETTINGS,
)

BASED = Preset(
    summary="Based's mixture: five training segments from short to long, seven test segments, random filler, BaseConv in layer 0",
    source="HazyResearch/zoology at d88d6f5, zoology/experiments/paper_configs/arxiv24_based_figure2/configs.py",
    source_models=("attention", "based"),  # its Mamba and Mamba2 have blocks of their own, without BaseConv
    words=(
        "model=attention,based,hgrn2,gla,delta_net,mamba2",
        *ZOOLOGY_MODEL,
        "first_layer=base_conv",  # width 3
        "mamba.first_layer=none",
        "mamba2.first_layer=none",
        "mamba.conv=4",
        "mamba2.conv=4",
        "random_fill=true",
        "d_model=64,128",
        "based.feature_dim=8,16,24",
        "batch_size=256",
        "eval_batch_size=32",
        "epochs=32",
        "lr=1e-3,3.1622777e-3,1e-2,3.1622777e-2",  # np.logspace(-3, -1.5, 4)
        "dtype=float32",
    ),
    tasks={
        "mixed_based": (
            "mixture=based",
            "seq_len=1024",  # of the longest test segment, as num_pairs
            "num_pairs=256",
            "train_examples=180_000",  # of all segments, as the two below
            "validation_examples=7_000",
            "test_examples=7_000",
        ),
    },
)

SHORT = Preset(
    summary="three settings at width 64, with and without a convolution, ten models, three seeds; 16 minutes on two H100, kernels compiled",
    source="ours: Zoology's settings and block in a budget of about 1,955 steps",
    words=(
        "model=hgrn2,attention,gla,mamba2,retnet,linear_attention,delta_net,gated_delta_net,hgrn1,based",
        *ZOOLOGY_MODEL,
        "attention.dropout=0.0",
        "attention.positions=rope",  # unlike the source's learned ones they go on beyond the training length,
        "random_fill=false",
        "train_examples=100_000",
        "validation_examples=3_000",
        "test_examples=3_000",
        "beyond_examples=500",
        "init=mixer",  # blanket zeroes Gated DeltaNet's step-size bias: its median decay would start at 0.16 instead of 0.86
        "decay_all=false",
        "d_model=64",
        "conv=0,4",
        "hgrn2.forget_bias=0.0,3.0",
        "lr=3e-3,1e-2,3e-2",  # of 1e-3, 3e-3 and 1e-2 the last was the best for HGRN2 at (64, 4)
        "tune_on=first_seed",
        "eval_every=196",
        "stop_at=0.998",
        "seed=0,1,2",
        "schedule=cosine",
        "warmup=0.1",
        "clip=1.0",
        "select=validation",
        "eval_batch_size=500",
        "dtype=bfloat16",
    ),
    tasks={
        **setting(64, 4, "batch_size=512", "epochs=10"),
        **setting(128, 8, "batch_size=256", "epochs=5"),
        **setting(256, 16, "batch_size=256", "epochs=5"),
    },
)

PRESETS = {
    "test": TEST,
    "smoke": SMOKE,
    "short": SHORT,
    "paper": PAPER,
    "zoology": ZOOLOGY,
    "zoology_head": ZOOLOGY_HEAD,
    "based": BASED,
}
