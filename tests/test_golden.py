"""Fixed-seed loss curves: a refactor leaves them as they are, an intended change updates them in the same commit.

To update: `python tests/test_golden.py`, and raise the version of the mixer or protocol whose numbers moved.
"""

import json
import tempfile
from pathlib import Path

import pytest

from hgrn2_bench import engine, registry
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.plan import make_plan

GOLDEN = Path(__file__).parent / "golden/loss_curves.json"
WORDS = ("suite=mqar", "preset=test", "train_examples=3_200", "lr=1e-2", "eval_every=50", "conv=0,4")


def curves():
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        deeper = [f"{name}.num_layers=2" for name, model in registry.models().items() if "parts" in model.facts]  # one layer for each part
        for cell in make_plan([*WORDS, f"model={','.join(registry.models())}", *deeper], "cpu").cells:
            made = CellFolder(Path(folder), cell)
            with made.lock():
                engine.run_cell(cell, made, lambda *_: None, lambda: False)
            records = [json.loads(line) for line in made.curve.read_text().splitlines()]
            found[f"{cell.model} conv {cell.model_config.conv}"] = [round(r["loss"], 5) for r in records if "loss" in r]
    return found


def test_loss_curves_are_the_golden_ones():
    golden = json.loads(GOLDEN.read_text())
    found = curves()
    assert found.keys() == golden.keys()
    for name, losses in found.items():
        assert losses == pytest.approx(golden[name], rel=2e-3), name  # other processors round otherwise; a changed equation moves far more
        assert losses[-1] < losses[0], name


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(curves(), indent=1) + "\n")
