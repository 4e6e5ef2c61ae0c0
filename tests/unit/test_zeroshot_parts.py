"""Parts of zero-shot scoring that need no model: the store, the hub, ranks, end strings, and the choice of what is checked."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hgrn2_bench import hub
from hgrn2_bench.errors import ConfigError, DataError
from suites.zeroshot import generation, invariance
from suites.zeroshot.ranks import Ranks
from suites.zeroshot.store import Store, key_of

ROOT = Path(__file__).parents[2]


def test_a_store_keeps_whole_lines_and_drops_one_that_was_cut(tmp_path):
    path = tmp_path / "a" / "results.jsonl"
    first = Store(path)
    first.add({"x": [-1.5, True]})
    first.add({"y": [float("nan"), False], "z": "text\n"})
    with path.open("a") as file:
        file.write('{"w": [1')
    again = Store(path)
    assert sorted(again.found) == ["x", "y", "z"]
    again.add({"v": [0.1 + 0.2, True]})
    assert Store(path).found["v"] == [0.1 + 0.2, True]
    assert path.read_text().count("\n") == 3


def test_a_store_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Store(tmp_path / "file" / "results.jsonl")


def test_keys_differ_where_any_part_does():
    assert len({key_of("a", "b", "c"), key_of("ab", "", "c"), key_of("a", "bc", ""), key_of("a", ["b"], "c")}) == 4


def test_a_folder_counts_before_a_name_and_nonsense_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert hub.folder_of("owner/model") == Path("owner/model")
    for ref in ("other", "/no/such/folder", "a/b/c"):
        with pytest.raises(DataError, match="no such folder, and no name on the Hugging Face hub"):
            hub.folder_of(ref)


def test_the_hub_is_asked_for_files_that_hold_no_code_and_its_refusal_is_one_line(monkeypatch, tmp_path):
    asked: dict[str, Any] = {}
    library = SimpleNamespace(snapshot_download=lambda name, **words: asked.update(words, name=name) or str(tmp_path))
    monkeypatch.setattr(hub, "needed", lambda *_: library)
    assert hub.folder_of("fla-hub/hgrn2-1.3B-100B") == tmp_path
    assert asked["name"] == "fla-hub/hgrn2-1.3B-100B"
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["allow_patterns"])

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("no route\nto host")

    library.snapshot_download = refuse
    with pytest.raises(ConfigError, match=r"did not give it \(OSError: no route to host\)"):
        hub.fetch("a/b")


def test_prompts_step_together_where_their_states_can_be_joined():
    prompts = [[0] * n for n in (3, 5, 3, 5, 4)]
    assert generation.batches(prompts, 2, can_join=False) == [[1, 3], [4], [0, 2]]
    assert generation.batches(prompts, 4, can_join=True) == [[1, 3, 4, 0], [2]]


def test_text_ends_before_the_first_end_string():
    assert generation.cut_at("a stop b end", ["end", "stop", ""]) == "a "
    assert generation.settings_of({"until": "x", "max_new_tokens": 3}) == generation.Settings(("x",), 3)
    assert generation.settings_of({"do_sample": False, "temperature": 0.7}).most == generation.MAX_GEN_TOKENS


def test_what_is_checked_spans_the_lengths_and_has_choices_of_one_context():
    pairs = [([0] * n, [1] * m) for n in range(1, 40) for m in (1, 2, 3)]
    chosen = invariance.spread(pairs, 8)
    assert len(chosen) == 8
    lengths = [len(context) for context, _ in chosen]
    assert lengths[0] == 1
    assert lengths[-1] > 25
    assert len(set(lengths)) == 4
    assert invariance.spread(pairs[:3], 8) == pairs[:3]


def test_one_process_is_the_only_one():
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.gather_object("a")) == (0, 1, ["a"])
    assert ranks.all_gather(torch.tensor(3)).item() == 3


CHILD = """
import sys, json, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
from zeroshot_lms import Request, model_of, tokenizer
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from suites.zeroshot.lm import BenchLM
bench = BenchLM(model=model_of(), tokenizer=tokenizer(), check=False)
manager = TaskManager(include_path=sys.argv[2], include_defaults=False)
found = evaluator.simple_evaluate(bench, tasks=["sums"], task_manager=manager, bootstrap_iters=0, log_samples=True)
if found is not None:
    samples = found["samples"]["sums"]
    answers = [[s["doc_id"], s["filtered_resps"][0][0]] for s in samples]
    print(json.dumps([bench.world_size, found["n-samples"]["sums"], sorted(answers), found["results"]["sums"]["acc,none"]]))
bench.barrier()  # the first process serves the others until all are done
"""
TASK = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [" yes", " no"]
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.mark.parametrize(
    ("asked", "has_gpu", "device"),
    [
        (None, True, "cuda:2"),
        ("cuda:0", True, "cuda:2"),
        ("cuda:1", True, "cuda:1"),
        ("cpu", True, "cpu"),
        (None, False, "cpu"),
        ("cuda:0", False, "cpu"),
    ],
)
def test_where_lm_eval_names_its_usual_device_each_process_takes_its_own(monkeypatch, asked, has_gpu, device):
    """`lm_eval` without --device says cuda:0, on machines without a GPU too, and to each of several processes."""
    ranks = Ranks()
    ranks.local_rank = 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert ranks.device(asked) == device


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("task")
    (folder / "test.jsonl").write_text("".join(f'{{"question": "Is {n} plus {n} even?"}}\n' for n in range(10)))
    (folder / "sums.yaml").write_text(TASK.replace("FILE", str(folder / "test.jsonl")))
    return folder


def evaluated(task: Path, size: int) -> str:
    """What the first of so many processes says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(task)}
    if size > 1:
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    command = [sys.executable, "-c", CHILD, str(ROOT / "tests"), str(task)]
    children = []
    for rank in range(size):
        more = {"RANK": str(rank), "LOCAL_RANK": "0"} if size > 1 else {}
        children.append(subprocess.Popen(command, env=os.environ | own | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    done = [child.communicate(timeout=300) for child in children]
    assert all(child.returncode == 0 for child in children), done
    return done[0][0].strip().splitlines()[-1]


def test_three_processes_score_the_items_of_one_each_once(task):
    one, three = (json.loads(evaluated(task, size)) for size in (1, 3))
    assert (one[0], three[0]) == (1, 3)
    assert [number for number, _ in one[2]] == [number for number, _ in three[2]] == list(range(10))
    for (_, a), (_, b) in zip(one[2], three[2], strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert one[3] == three[3]
