"""What the tests of suite zeroshot share: rows in the schema of every known task, files of them, and a model that answers by lengths."""

import base64
import gzip
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hgrn2_bench.files import CACHE, DATA
from suites.zeroshot import catalogue, network, packaged, places, schemas
from suites.zeroshot.settings import ZeroshotConfig

lm_eval_model = pytest.importorskip("lm_eval.api.model", reason="needs lm-eval")
harness = pytest.importorskip("suites.zeroshot.harness")

PIQA = [{"goal": f"open jar {i}", "sol1": "turn " * (1 + i % 3), "sol2": "pull " * (1 + i % 2), "label": i % 2} for i in range(10)]
LAMBADA = [{"text": f"the door was {'o' * (1 + i % 4)}pen"} for i in range(7)]
ENDINGS = ["runs.", "sits down.", "[title] waits", "goes"]
HELLASWAG = [{"ctx_a": "A dog", "ctx_b": "it", "activity_label": "Dogs", "endings": ENDINGS, "label": str(i % 4)} for i in range(8)]
WINOGRANDE = [{"sentence": "Ann saw Bob so _ left .", "option1": "Ann", "option2": "Bob", "answer": str(1 + i % 2)} for i in range(6)]
FOUR = {"text": ["ice", "steam", "fog", "rain"], "label": ["A", "B", "C", "D"]}
THREE = {"text": ["one", "two", "three"], "label": ["1", "2", "3"]}
ARC = [{"question": f"What is {i}?", "choices": THREE if i % 2 else FOUR, "answerKey": "2" if i % 2 else "B"} for i in range(6)]
OPENBOOKQA = [{"question_stem": "Water is", "choices": FOUR, "answerKey": " C"} for _ in range(4)]
BOOLQ = [{"passage": "Cats purr.", "question": "do cats purr", "label": i % 2} for i in range(5)]
SCIQ = [{"support": "", "question": "Why?", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d"}] * 3
WIKITEXT = [{"page": " = Cat = \n A cat sat @-@ down . \n" * (i + 1)} for i in range(3)]
FDA = [{"text": f"Device {i} name :", "value": "device"} for i in range(4)]
ROWS = {
    "piqa": PIQA,
    "lambada_openai": LAMBADA,
    "hellaswag": HELLASWAG,
    "winogrande": WINOGRANDE,
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "openbookqa": OPENBOOKQA,
    "boolq": BOOLQ,
    "sciq": SCIQ,
    "wikitext": WIKITEXT,
    "fda": FDA,
    "swde": FDA,
    "squad_completion": FDA,
}
HUB = {
    "piqa": "piqa/plain_text/validation-00000-of-00001.parquet",
    "hellaswag": "hellaswag/data/validation-00000-of-00001.parquet",
    "winogrande": "winogrande/winogrande_xl/validation-00000-of-00001.parquet",
    "arc_easy": "ai2_arc/ARC-Easy/test-00000-of-00001.parquet",
    "arc_challenge": "ai2_arc/ARC-Challenge/test-00000-of-00001.parquet",
    "openbookqa": "openbookqa/main/test-00000-of-00001.parquet",
    "boolq": "super_glue/boolq/validation-00000-of-00001.parquet",
    "sciq": "sciq/data/test-00000-of-00001.parquet",
    "wikitext": "wikitext_document_level/wikitext-2-raw-v1/test-00000-of-00001.parquet",
    "lambada_openai": "lambada_openai/default/test-00000-of-00001.parquet",
}


class Lengths(lm_eval_model.LM):
    """Every character of a continuation costs a nat, and those of even length are what it would have said."""

    def __init__(self, rank: int = 0, size: int = 1, mail: dict | None = None) -> None:
        super().__init__()
        self._rank, self._world_size, self._device = rank, size, torch.device("cpu")
        self.mail = {} if mail is None else mail
        self.told_items: dict[str, list[dict[str, Any]]] = {}
        self.asked: list[Any] = []

    def loglikelihood(self, requests, **_):
        self.asked += [request.args for request in requests]
        return [(-float(len(request.args[1])), len(request.args[1]) % 2 == 0) for request in requests]

    def loglikelihood_rolling(self, requests, **_):
        return [-0.5 * len(request.args[0]) for request in requests]

    def generate_until(self, requests, **_):
        return [request.args[0][:12] for request in requests]

    def told(self):
        return {"bos": "never", "items": self.told_items}

    def all_gather(self, tensor):
        return torch.full((self._world_size,), int(tensor))  # all alike: nothing is padded, and each rank runs its own items alone

    def gather_object(self, obj, dst=0):
        """Ranks run one after another here, rank 0 last; a rank's sendings are numbered."""
        self.mail.setdefault(self._rank, []).append(obj)
        if self._rank != dst:
            return None
        number = len(self.mail[dst]) - 1
        return [self.mail[rank][number] for rank in range(self._world_size)]

    def barrier(self):
        pass


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix.lower() == ".gz" else text)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the test's own, tasks whose size is that of the rows here, and no network."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv(DATA, str(folder))
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    small = {name: catalogue.Known(**{**vars(known), "size": len(ROWS.get(name, ()))}) for name, known in catalogue.TASKS.items()}
    for module in (catalogue, places, schemas, packaged, harness):
        monkeypatch.setattr(module, "TASKS", small)
    monkeypatch.setattr(network, "reaches_hub", lambda: False)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a test went to the network"))
    return folder


def ask(task: str, lm: Any = None, folder: Path | None = None, own: Path | None = None, **settings: Any) -> Any:
    return harness.evaluate(lm or Lengths(), ZeroshotConfig(lm_task=task, **settings), folder, own)


def value(outcome: Any, name: str, split: str = "test") -> float:
    (found,) = [metric.value for metric in outcome.metrics if (metric.split, metric.name) == (split, name)]
    return found


def bits_of(entry: dict) -> list[bool]:
    packed = np.frombuffer(base64.b64decode(entry["bits"]), np.uint8)
    return np.unpackbits(packed)[: entry["n"]].astype(bool).tolist()


def write_own(folder: Path, sizes: tuple[int, int] = (10, 1000)) -> None:
    """Two tasks in LAMBADA's schema, of which one is right on every second item and the other never, as a group `made`."""
    folder.mkdir()
    for name, size, words in zip(("small", "large"), sizes, (("ab", "abc"), ("ab", "abcd")), strict=True):
        write_lines(folder / f"{name}.jsonl", [{"text": f"so {words[i % 2]}"} for i in range(size)])
        content = {"include": str(catalogue.tasks_folder() / "lambada/lambada_openai.yaml"), "task": name}
        content |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        (folder / f"{name}.yaml").write_text(json.dumps(content))
    (folder / "made.yaml").write_text(json.dumps({"group": "made", "task": ["small", "large"]}))
