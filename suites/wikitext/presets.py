"""The wikitext suite's presets: every number of a protocol, each with its source. Imports neither torch nor numpy."""

from hgrn2_bench.markov_recipe import RECALL
from hgrn2_bench.protocol import Preset
from suites.wikitext.sizes import EXPAND_RATIOS, PUBLISHED, PUBLISHED_WIDTHS, SIZES

RATIOS = ",".join(map(str, EXPAND_RATIOS))

TEST = Preset(
    summary="the whole path in seconds: a source of 16 symbols, one layer of width 16, 20 steps; no model learns anything",
    source="ours: for the contract test",
    words=(
        "model=hgrn2,attention",
        "dataset=markov",
        *RECALL,
        "symbols=16",
        "facts=2",
        "document=24",
        "block=16",
        "window=8",
        "curve=32",
        "d_model=16",
        "num_layers=1",
        "batch_size=8",
        "train_tokens=2560",
        "eval_tokens=600",
    ),
    tasks={"markov": ()},
)

SMOKE = Preset(
    summary="without data: a source of known entropy with facts to recall, two layers of width 64, 600 steps, CPU",
    source="ours: 600 steps are what GLA needs to recall on every seed tried",
    words=(
        "model=hgrn2,gla,mamba2,attention",
        "dataset=markov",
        *RECALL,
        "symbols=32",
        "facts=4",
        "document=128",
        "block=128",
        "window=96",
        "curve=512",
        "d_model=64",
        "num_layers=2",
        "hgrn2.expand_ratio=64",
        "batch_size=32",
        "train_tokens=2_457_600",
    ),
    tasks={"markov": ()},
)

SHORT = Preset(
    summary="one H100: bytes of the IMDB reviews, one epoch; HGRN2 at eight state expansions, GLA, Mamba2, RetNet, HGRN1, attention",
    source="ours: 6 layers of width 256, as many parameters without embeddings for all; 40 to 70 s a cell on an H100, compiling included",
    words=(
        "model=hgrn2,gla,mamba2,retnet,hgrn1,attention",
        "dataset=imdb",
        "tokenizer=bytes",
        "transfer=true",
        "block=1024",
        "window=512",
        "curve=4096",
        "eval_tokens=4_194_304",
        "d_model=256",
        "num_layers=6",
        "conv=0",
        "positions=none",
        "attention.positions=rope",
        "hgrn2.lower_bound=inclusive",
        "hgrn1.lower_bound=inclusive",
        f"hgrn2.expand_ratio={RATIOS}",
        "attention.num_heads=4",
        "gla.num_heads=2",
        "retnet.num_heads=2",
        "norm=layernorm",
        "channel_mixer=glu",
        "match=params",
        "lr=2e-3",
        "weight_decay=0.1",
        "clip=1.0",
        "schedule=cosine",
        "warmup=0.1",
        "batch_size=64",
        "eval_batch_size=64",
        "dtype=bfloat16",
        "seed=0",
    ),
    tasks={"imdb": ()},
)

SCRIPT = "OpenNLPLab/HGRN2 script_lm.sh; backbone of OpenNLPLab/fairseq-evo hgrn_lm (hgrn2_lm_* itself is not public: recipes as inferred)"
FAIRSEQ = (
    "dataset=wikitext103",
    "tokenizer=gpt2",
    "block=512",
    "window=400",
    "curve=16_384",
    *PUBLISHED,
    "embed_std=0.04419417",  # 512^-0.5, fairseq's default for embeddings
    "embed_dropout=0.1",
    "dropout=0.1",
    "lr=5e-4",
    "schedule=inverse_sqrt",
    "warmup_from=1e-7",
    "beta2=0.98",
    "decay_all=true",
    "batch_size=128",
    "eval_batch_size=32",
)
PAPER = Preset(
    summary="HGRN2's runs on WikiText-103: state expansion 1 to 128, both readings of its layer, and the doubled-width HGRN1",
    source=SCRIPT,
    source_models=("hgrn2", "hgrn1"),
    words=(
        "model=hgrn2,hgrn1",
        *FAIRSEQ,
        f"channel_width={PUBLISHED_WIDTHS['hgrn2']}",
        f"hgrn1.channel_width={PUBLISHED_WIDTHS['hgrn1']}",
        f"hgrn2.expand_ratio={RATIOS}",
        "hgrn2.variant=paper,paper_lm",
        "hgrn1.variant=expand2",
        "updates=50_000",
        "warmup_steps=4000",
        "weight_decay=0.1",
        "clip=1.0",
        "dtype=bfloat16",
        "seed=0",
    ),
    tasks={"wikitext103": ()},
)

HGRN1 = Preset(
    summary="HGRN1's run on WikiText-103: complex HGRN, 100,000 updates, weight decay 0.2, float32",
    source="OpenNLPLab/HGRN script_lm.sh; OpenNLPLab/fairseq-evo hgrn_lm",
    source_models=("hgrn1",),
    words=(
        "model=hgrn1",
        *FAIRSEQ,
        f"channel_width={PUBLISHED_WIDTHS['hgrn1']}",
        "updates=100_000",
        "warmup_steps=8000",
        "weight_decay=0.2",
        "dtype=float32",
        "seed=0",
    ),
    tasks={"wikitext103": ()},
)

PRETRAIN = Preset(
    summary="sizes 130M, 340M and 1.3B on text files of your own: GPT-2 words, 2,048 tokens, half a million tokens an update, one epoch",
    source="ours, with the widths of GPT-2 small, fla's hgrn2_340M and fla-hub/hgrn2-1.3B-100B; the optimiser's values are the usual ones",
    words=(
        "model=hgrn2,attention",
        "dataset=text",
        "tokenizer=gpt2",
        "block=2048",
        "conv=0",
        "positions=none",
        "lr=3e-4",
        "beta2=0.95",
        "weight_decay=0.1",
        "clip=1.0",
        "schedule=cosine",
        "warmup=0.02",
        "batch_size=256",
        "micro_batch=8",
        "eval_batch_size=8",
        "dtype=bfloat16",
        "seed=0",
    ),
    tasks=dict(SIZES),
)

EVALUATE = Preset(
    summary="models that are trained already (model=DIR): WikiText-103 in blocks of 1,024, a window, a carried state, contexts to 4,096",
    source="ours",
    words=(
        "dataset=wikitext103",
        "tokenizer=gpt2",
        "block=1024",
        "window=512",
        "curve=4096",
        "eval_batch_size=8",
        "dtype=float32",
        "seed=0",
    ),
    tasks={"wikitext103": ()},
)

PRESETS = {"test": TEST, "smoke": SMOKE, "short": SHORT, "paper": PAPER, "hgrn1": HGRN1, "pretrain": PRETRAIN, "evaluate": EVALUATE}
