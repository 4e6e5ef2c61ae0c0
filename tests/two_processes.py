"""What two processes do together, for `unit/test_distributed.py`: start it with torchrun and the folder of the results.

Every case trains one cell into a folder of its own name; those called `half` are interrupted on the way, and then go on in another way.
"""

import dataclasses
import sys
from pathlib import Path

from hgrn2_bench import distributed, engine
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.plan import Cell, make_plan
from hgrn2_bench.stopping import InterruptedTrainingError

WORDS = (
    *("suite=mqar", "preset=test", "seed=0", "train_examples=1_255", "model=hgrn2", "num_layers=2", "lower_bound=exclusive"),
    *("schedule=inverse_sqrt", "warmup=0", "warmup_steps=10", "clip=1.0", "beta2=0.98", "decay_all=true", "tie_embeddings=true"),
)
STOP_AT = 20


def cell(*words: str) -> Cell:
    """Forty steps, the last of which has 7 examples."""
    return make_plan([*WORDS, *words], "cpu").cells[0]


IMAGES = ("suite=imagenet", "preset=test", "model=hgrn2", "mix_group=2", "repeats=2", "train_examples=18", "batch_size=6", "epochs=2")
CASES = {
    "ddp": cell(),
    "fsdp": cell("parallel=fsdp"),
    "ddp in pieces": cell("micro_batch=5"),
    "fsdp in pieces": cell("micro_batch=5", "parallel=fsdp"),
    "images": make_plan([*IMAGES, "ema=0.8", "test_examples=11", "eval_batch_size=2"], "cpu").cells[0],
    "half": cell(),
}


def run(results: Path, made: Cell, stop_at: int = 0) -> None:
    """Run a cell as one process of `distributed.current()`, to step `stop_at` where one is given."""
    folder = CellFolder(results, made, writes=distributed.current().rank == 0)
    if folder.writes:
        with folder.lock():
            _run(folder, made, stop_at)
    else:
        _run(folder, made, stop_at)


def _run(folder: CellFolder, made: Cell, stop_at: int) -> None:
    asked = iter(range(1_000_000))
    every = 10 if distributed.current().size > 1 else 1
    try:
        engine.run_cell(made, folder, lambda *_: None, lambda: (next(asked) + 1) * every == stop_at)
    except InterruptedTrainingError:
        assert stop_at


def main(results: Path) -> None:
    """Every case; `half` twice, so that one copy goes on here with FSDP2 and one is left."""
    with distributed.group("cpu"):
        for name, made in CASES.items():
            run(results / name, made, STOP_AT if name == "half" else 0)
        sharded = dataclasses.replace(CASES["half"], train=dataclasses.replace(CASES["half"].train, parallel="fsdp"))
        run(results / "half, then fsdp", sharded, STOP_AT)
        distributed.gathered(None)  # rank 0 has written its checkpoint
        run(results / "half, then fsdp", CASES["half"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
