"""The zeroshot suite's presets: every number of a protocol, each with its source. Imports neither torch nor numpy."""

from hgrn2_bench.markov_recipe import RECALL
from hgrn2_bench.protocol import Preset
from suites.zeroshot.settings import SMOKE as GROUP

SIX = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The tasks of the HGRN2 table, in its order."""

TEST = Preset(
    summary="the whole path in seconds: one layer of width 16, 20 steps, 8 items of each task; no model learns anything",
    source="ours: for the contract test",
    words=(
        "model=hgrn2,attention",
        *RECALL,
        "symbols=16",
        "facts=2",
        "document=24",
        "block=64",
        "d_model=16",
        "num_layers=1",
        "batch_size=8",
        "train_tokens=10_240",
        "limit=8",
    ),
    tasks={GROUP: ()},
)

SMOKE = Preset(
    summary="without data: models that learn a source with facts in place, 600 steps on a CPU, and five tasks that ask for the facts",
    source="ours: as preset smoke of suite wikitext, with shorter documents",
    words=(
        "model=hgrn2,attention",
        *RECALL,
        "symbols=32",
        "facts=4",
        "document=64",
        "block=64",
        "d_model=64",
        "num_layers=2",
        "hgrn2.expand_ratio=64",
        "batch_size=32",
        "train_tokens=1_228_800",
    ),
    tasks={GROUP: ()},
)

EVALUATE = Preset(
    summary="models that are trained already (model=DIR): the six tasks of the HGRN2 table; task= takes any of lm-eval's",
    source="zero-shot table of arXiv 2404.07904; lm-eval's own prompts, no solved items; which accuracy each column holds is inferred",
    words=("eval_batch_size=32", "dtype=float32", "seed=0"),
    tasks={name: (f"lm_task={name}",) for name in SIX},
    reproduces=("zero_shot_main",),
    open_tasks=True,
)

PRESETS = {"test": TEST, "smoke": SMOKE, "evaluate": EVALUATE}
