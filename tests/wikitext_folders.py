"""Tiny made-up texts, in every layout that the wikitext suite reads."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LINES = {
    "train": [" \n", " = Lobster = \n", " \n", " The lobster , a <unk> lobster , eats the the crab . \n", " Ünï 12 @-@ pound \n"],
    "validation": [" \n", " = Crab = \n", " the crab eats <unk> . \n"],
    "test": [" = Whale = \n", " the whale \n", " \n", " lobster\n"],
}
"""WikiText's spacing; `whale` is not in the training split."""
WORD = {"train": "train", "validation": "valid", "test": "test"}
BPE_TEXT = "the lobster"


def write_lines(folder, form="tokens", lines=LINES, name="wiki.{}.{}", ending=""):
    folder.mkdir(parents=True, exist_ok=True)
    for split, those in lines.items():
        content = "".join(those).encode()
        path = folder / (name.format(WORD[split], form) + ending)
        path.write_bytes(gzip.compress(content) if ending == ".gz" else content)


def write_parquet(folder, lines=LINES, parts=2):
    """As the hub has WikiText: a row for each line, blank ones empty; the training split in several files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, those in lines.items():
        rows = ["" if line == " \n" else line for line in those]
        number = parts if split == "train" else 1
        for i, part in enumerate(np.array_split(np.arange(len(rows)), number)):
            table = pa.table({"text": [rows[j] for j in part]})
            pq.write_table(table, folder / f"{split}-{i:05}-of-{number:05}.parquet")


def write_json(folder, lines=LINES, name="{}.jsonl", whole=False):
    """A row for each line, or with `whole` one row for the split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, those in lines.items():
        texts = ["".join(those)] if whole else [line.removesuffix("\n") for line in those]
        content = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()
        (folder / name.format(split)).write_bytes(gzip.compress(content) if name.endswith("gz") else content)


def write_fairseq(folder, ids, dictionary, dtype="<u2"):
    """`ids`: split -> ids of each line; `dictionary`: the entries after the specials."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dict.txt").write_text("".join(f"{entry} 1\n" for entry in dictionary))
    for split, lines in ids.items():
        flat = np.concatenate([np.array(line, dtype) for line in lines])
        flat.tofile(folder / f"{WORD[split]}.bin")
        sizes = np.array([len(line) for line in lines], "<i4")
        starts = (np.cumsum(sizes, dtype="<i8") - sizes) * flat.itemsize
        header = b"MMIDIDX\0\0" + np.uint64(1).tobytes() + bytes([{2: 8, 4: 4}[flat.itemsize]]) + np.uint64(len(sizes)).tobytes()
        (folder / f"{WORD[split]}.idx").write_bytes(header + sizes.tobytes() + starts.astype("<i8").tobytes())


def byte_alphabet():
    """GPT-2's characters for the 256 bytes."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def small_bpe():
    """Vocabulary and merges of a byte-level BPE with three merges."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    entries = [*byte_alphabet(), *("".join(pair) for pair in merges)]
    return {entry: i for i, entry in enumerate(entries)}, merges


def write_bpe(folder, kind):
    """`tokenizer`, `vocab` or `encoder`: the names that packages give the files."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = small_bpe()
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    if kind == "tokenizer":
        model = {"type": "BPE", "vocab": vocabulary, "merges": [list(pair) for pair in merges]}
        (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
        return
    names = {"vocab": ("vocab.json", "merges.txt"), "encoder": ("encoder.json", "vocab.bpe")}[kind]
    (folder / names[0]).write_text(json.dumps(vocabulary))
    (folder / names[1]).write_text("#version: 0.2\n" + lines)
