"""MQAR data: the reference's golden files to the byte, and the fast mode by its rules, its exact distribution and its pinned bytes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hgrn2_bench.errors import ConfigError
from suites.mqar import data
from suites.mqar.data import IGNORED, Examples, data_hash, generate, generate_reference
from suites.mqar.protocol import MQAR

GOLDEN = Path(__file__).parents[1] / "golden"


def task(vocab_size=8192, seq_len=64, num_pairs=4, power_a=0.01, fill=False):
    return MQAR(vocab_size=vocab_size, seq_len=seq_len, num_pairs=num_pairs, power_a=power_a, random_fill=fill)


# file, task, rows, NumPy seed, torch seed, hash
GOLDENS = [
    ("small_v64_l32_kv4", task(64, 32, 4), 32, 1, None, "b85c57d34995f5f4"),
    ("small_v64_l32_kv4_fill", task(64, 32, 4, fill=True), 32, 1, 7, "8dee42928536556f"),
    ("full_v8192_l64_kv4", task(8192, 64, 4), 64, 123, None, "02a4c6a57aecfbed"),
    ("full_v8192_l64_kv4_fill", task(8192, 64, 4, fill=True), 64, 123, 0, "55787842d5b18a8b"),
    ("full_v8192_l128_kv32", task(8192, 128, 32), 16, 42, None, "6b5c4c73a9e9a538"),
    ("full_v8192_l256_kv64", task(8192, 256, 64), 8, 42, None, "e20428461f365868"),
    ("full_v8192_l512_kv64", task(8192, 512, 64), 8, 2024, None, "0914edae9f8c1810"),
    ("uniform_v8192_l64_kv8", task(8192, 64, 8, power_a=1.0), 32, 5, None, "8e4cf79333a7c95f"),
]

# Odd vocabularies, more pairs than the draws allow without repeats, all keys used (k = V//2 - 1), V below L, every cell used (4k = L),
# more rows than one chunk holds, vocabularies at the edges of the integer types.
SETTINGS = [(task(32, 32, 4), 3000), (task(32, 64, 15), 3000), (task(33, 60, 15, fill=True), 3000), (task(10, 16, 4), 3000)]
SETTINGS += [(task(4, 4, 1), 50), (task(128, 256, 4), 2000), (task(128, 256, 4, fill=True), 2000), (task(8192, 64, 4), 9000)]
SETTINGS += [(task(8192, 256, 64), 1500), (task(8192, 1024, 256), 300), (task(8192, 1024, 256, fill=True), 300)]
SETTINGS += [(task(8192, 512, 64, power_a=1.0), 600), (task(70_000, 32, 4, fill=True), 2000)]
SETTINGS += [(task(v, 32, 4, fill=True), 500) for v in (32_768, 32_769, 2**31)]


def name(value):
    return f"v{value.vocab_size}-l{value.seq_len}-k{value.num_pairs}-fill{value.random_fill:d}" if isinstance(value, MQAR) else str(value)


def parts(t: MQAR, examples: Examples):
    """Keys, values and cells, (n, k) each in pair order, read back from the tokens and checked against every rule on the way."""
    inputs, labels, context = examples.inputs.astype(np.int64), examples.labels.astype(np.int64), 2 * t.num_pairs
    keys, values = inputs[:, 0:context:2], inputs[:, 1:context:2]
    asked = labels != IGNORED
    assert (asked.sum(axis=1) == t.num_pairs).all()
    assert set(np.nonzero(asked)[1]) <= set(range(context, t.seq_len, 2))
    for tokens, low, high in ((keys, 1, t.vocab_size // 2 - 1), (values, t.vocab_size // 2, t.vocab_size - 1)):
        assert low <= tokens.min() <= tokens.max() <= high
        assert (np.diff(np.sort(tokens, axis=1), axis=1) > 0).all()
    position = np.nonzero(asked)[1].reshape(-1, t.num_pairs)
    queries, answers = np.take_along_axis(inputs, position, 1), np.take_along_axis(labels, position, 1)
    match = queries[:, None, :] == keys[:, :, None]  # (n, pair, query)
    assert (match.sum(axis=1) == 1).all()
    assert (match.sum(axis=2) == 1).all()
    assert (answers == np.take_along_axis(values, match.argmax(axis=1), 1)).all()
    return keys, values, np.take_along_axis((position - context) // 2, match.argmax(axis=2), 1)


def excess(counts, share):
    """Chi-square of counts against expected shares, in standard deviations above its mean: about standard normal if they agree."""
    expected = np.broadcast_to(share, np.shape(counts)) * np.sum(counts)
    assert expected.min() > 5
    degrees = np.size(counts) - 1
    return (np.sum((counts - expected) ** 2 / expected) - degrees) / np.sqrt(2 * degrees)


def weights(t: MQAR):
    weight = np.array([(i + 1.0) ** (t.power_a - 1.0) for i in range(t.slots)])
    return weight / weight.sum()


def ordered(t: MQAR):
    """Every ordered choice of k cells with its probability under drawing one after the other."""
    share, found = weights(t), {}
    for cells in itertools.permutations(range(t.slots), t.num_pairs):
        left = 1.0 - np.concatenate([[0.0], np.cumsum(share[list(cells)])[:-1]])
        found[cells] = float(np.prod(share[list(cells)] / left))
    assert sum(found.values()) == pytest.approx(1.0)
    return found


@pytest.mark.parametrize(("stem", "t", "rows", "seed", "torch_seed", "digest"), GOLDENS, ids=[g[0] for g in GOLDENS])
def test_reference_mode_reproduces_golden(stem, t, rows, seed, torch_seed, digest):
    examples = generate_reference(t, rows, seed, torch_seed)
    with np.load(GOLDEN / f"mqar_{stem}.npz") as golden:
        np.testing.assert_array_equal(examples.inputs, golden["inputs"].astype(np.int64))
        np.testing.assert_array_equal(examples.labels, golden["labels"].astype(np.int64))
    assert examples.inputs.dtype == examples.labels.dtype == np.int64
    assert data_hash(examples) == digest
    parts(t, examples)


def test_segment_seeds_match_zoology():
    seeds = data.segment_seeds(123, 5, 7)
    assert seeds.train == (843828734, 914636141, 1228959102, 1840268610, 974319580)
    assert seeds.test == (2967327842, 2367878886, 3088727057, 3090095699, 4256823402, 3964712059, 3350193721)
    assert data.segment_seeds(123, 1, 0).train == seeds.train[:1]
    assert data.segment_seeds(124, 5, 7) != seeds


@pytest.mark.parametrize(("t", "rows"), SETTINGS, ids=name)
def test_generate_keeps_every_rule(t, rows):
    examples = generate(t, rows, seed=3)
    assert examples.inputs.shape == examples.labels.shape == (rows, t.seq_len)
    assert examples.inputs.dtype == examples.labels.dtype == (np.int16 if t.vocab_size <= 32_768 else np.int32)
    keys, values, _ = parts(t, examples)
    zeros = (examples.inputs == 0).sum(axis=1)
    assert 0 <= examples.inputs.min() <= examples.inputs.max() < t.vocab_size
    if t.random_fill:
        assert zeros.mean() == pytest.approx((t.seq_len - 3 * t.num_pairs) / t.vocab_size, rel=0.3, abs=0.05)
    else:
        assert (zeros == t.seq_len - 3 * t.num_pairs).all()
        assert set(np.unique(examples.inputs)) <= {0, *np.unique(keys), *np.unique(values)}


@pytest.mark.parametrize("t", [task(64, 32, 4), task(8192, 128, 8)], ids=name)
def test_fill_changes_nothing_but_fillers(t):
    rows = 2 * data.CHUNK_TOKENS // t.seq_len + 5
    plain = generate(t, rows, seed=4)
    filled = generate(task(t.vocab_size, t.seq_len, t.num_pairs, fill=True), rows, seed=4)
    np.testing.assert_array_equal(plain.labels, filled.labels)
    held = plain.inputs != 0
    np.testing.assert_array_equal(plain.inputs[held], filled.inputs[held])
    assert excess(np.bincount(filled.inputs[~held], minlength=t.vocab_size), 1 / t.vocab_size) < 4
    keys = plain.inputs[:, 0 : 2 * t.num_pairs : 2].ravel()  # a fill drawn from the keys' own stream would repeat them
    both = np.stack([keys, filled.inputs.ravel()[: len(keys)]])[:, ~held.ravel()[: len(keys)]]
    assert abs(np.corrcoef(both)[0, 1]) < 0.1


def test_generate_has_the_exact_joint_distribution():
    """Keys, values and cells at once: all 6 * 12 * 12 outcomes of a setting small enough to list."""
    t = task(8, 12, 2)
    keys, values, cells = parts(t, generate(t, 200_000, seed=0))
    code = [(x[:, 0] - low) * 4 + x[:, 1] - low for x, low in ((keys, 1), (values, 4), (cells, 0))]
    counts = np.bincount((code[0] * 16 + code[1]) * 16 + code[2], minlength=16**3).reshape(16, 16, 16)
    share = np.zeros((16, 16, 16))
    for (a, b), (c, d) in itertools.product(itertools.permutations(range(3), 2), itertools.permutations(range(4), 2)):
        for (e, f), chance in ordered(t).items():
            share[4 * a + b, 4 * c + d, 4 * e + f] = chance / 72
    possible = share > 0
    assert counts[~possible].sum() == 0
    assert abs(excess(counts[possible], share[possible])) < 4


def cells_excess(t: MQAR, cells):
    """Every ordered choice of four cells against its exact probability, the rare ones taken together."""
    code, exact = t.slots ** np.arange(4), ordered(t)
    common = [choice for choice, chance in exact.items() if chance * len(cells) > 8]
    counts = np.bincount(cells @ code, minlength=t.slots**4)[np.array(common) @ code]
    share = [exact[choice] for choice in common]
    if (rest := 1.0 - sum(share)) > 1e-4:
        counts, share = np.append(counts, len(cells) - counts.sum()), [*share, rest]
    return excess(counts, np.array(share))


@pytest.mark.parametrize("t", [task(14, 20, 4), task(14, 20, 4, power_a=1.0), task(14, 16, 4, power_a=2.5)], ids=str)
def test_cells_follow_sequential_weighted_draws(t):
    assert abs(cells_excess(t, parts(t, generate(t, 120_000, seed=1))[2])) < 4


def test_the_chi_square_notices_wrong_cells():
    """The test above can fail: a slightly other power, and the right cells handed to the keys in another order."""
    t, other = task(14, 20, 4), task(14, 20, 4, power_a=0.05)
    assert cells_excess(t, parts(other, generate(other, 120_000, seed=1))[2]) > 5
    cells = parts(t, generate(t, 120_000, seed=1))[2]
    assert cells_excess(t, np.sort(cells, axis=1)) > 100
    assert cells_excess(t, np.roll(cells, 1, axis=1)) > 100


@pytest.mark.parametrize("vocab", [10, 11])
def test_tiny_vocabularies_use_all_orders_alike(vocab):
    """All keys of the vocabulary in every row (4 of 4), nearly all values (4 of 5 or 6)."""
    t = task(vocab, 16, 4)
    keys, values, _ = parts(t, generate(t, 60_000, seed=2))
    for tokens, low, n in ((keys, 1, 4), (values, vocab // 2, t.num_values)):
        counts = np.bincount((tokens - low) @ n ** np.arange(4), minlength=n**4)
        counts = counts[[np.dot(order, n ** np.arange(4)) for order in itertools.permutations(range(n), 4)]]
        assert counts.sum() == len(tokens)
        assert abs(excess(counts, 1 / len(counts))) < 4


@pytest.mark.parametrize(("t", "rows"), [(task(32, 64, 15), 20_000), (task(8192, 256, 64), 4_000), (task(1024, 1024, 256), 900)], ids=name)
def test_each_place_in_the_context_is_uniform(t, rows):
    keys, values, _ = parts(t, generate(t, rows, seed=6))
    for tokens, low, n in ((keys, 1, t.num_keys), (values, t.vocab_size // 2, t.num_values)):
        marginal = (np.bincount((tokens - low).ravel(), minlength=n) - rows * t.num_pairs / n) / np.sqrt(rows * t.num_pairs / n)
        assert np.abs(marginal).max() < 5
        tenths = np.bincount(np.arange(n) * 10 // n, minlength=10) / n  # of the vocabulary
        for place in (0, t.num_pairs // 2, t.num_pairs - 1):
            assert excess(np.bincount((tokens[:, place] - low) * 10 // n, minlength=10), tenths) < 5
        rises = (np.diff(tokens, axis=1) > 0).mean(axis=0)  # each of two neighbours is as often the larger
        assert np.abs(rises - 0.5).max() < 5 * 0.5 / np.sqrt(rows)


@pytest.mark.parametrize(("seq_len", "pairs", "power_a"), [(64, 8, 0.01), (64, 8, 1.0), (64, 8, 2.0), (2400, 400, 0.01)])
def test_first_key_cell_follows_the_power_law(seq_len, pairs, power_a):
    t = task(8192, seq_len, pairs, power_a)
    inputs = generate(t, min(40_000, 10_000_000 // seq_len), seed=7).inputs
    counts = np.bincount((inputs[:, 2 * pairs :: 2] == inputs[:, :1]).argmax(axis=1), minlength=t.slots)
    found, share = (np.append(x[:23], x[23:].sum()) for x in (counts, weights(t)))
    assert abs(excess(found, share)) < 4


# Shares of the reference over 40,000 rows: cells 0..7, the last cell, the mean cell.
SHARES = [
    (64, 4, (0.723, 0.473, 0.352, 0.271, 0.226, 0.190, 0.165, 0.144), 0.043, 7.14),
    (64, 8, (0.958, 0.818, 0.689, 0.584, 0.502, 0.440, 0.391, 0.351), 0.135, 7.45),
    (128, 8, (0.895, 0.689, 0.541, 0.448, 0.374, 0.320, 0.287, 0.254), 0.041, 14.19),
]


@pytest.mark.parametrize(("seq_len", "pairs", "early", "last", "mean"), SHARES)
def test_slot_shares_match_the_reference(seq_len, pairs, early, last, mean):
    t = task(64, seq_len, pairs)
    cells = parts(t, generate(t, 40_000, seed=0))[2]
    share = np.bincount(cells.ravel(), minlength=t.slots) / len(cells)
    np.testing.assert_allclose(share[:8], early, atol=0.01)
    assert share[-1] == pytest.approx(last, abs=0.01)
    assert cells.mean() == pytest.approx(mean, abs=0.1)


@pytest.mark.parametrize("t", [task(14, 20, 4), task(32, 32, 4, fill=True)], ids=name)
def test_fast_and_reference_modes_agree(t):
    """Tokens at each position, cells of each key, and the order in which the pairs are asked."""
    modes = generate(t, 15_000, seed=8), generate_reference(t, 15_000, 8, 8)
    tokens = [np.bincount((np.arange(t.seq_len) * t.vocab_size + x.inputs).ravel(), minlength=t.seq_len * t.vocab_size) for x in modes]
    cells = [parts(t, x)[2] for x in modes]
    each = [np.bincount((np.arange(4) * t.slots + c).ravel(), minlength=4 * t.slots) for c in cells]
    order = [np.bincount(np.argsort(c, axis=1) @ 4 ** np.arange(4), minlength=256) for c in cells]
    for fast, slow in (tokens, each, order):
        assert abs(two_sample_excess(fast, slow)) < 4


def two_sample_excess(a, b):
    """Chi-square of two equally large samples' counts, in standard deviations above its mean; rare outcomes are left out."""
    common = a + b > 20
    assert common.sum() > 5
    return (np.sum((a - b)[common] ** 2 / (a + b)[common]) - common.sum()) / np.sqrt(2 * common.sum())


# Pinned bytes of the fast mode, seed 0: a change means another data set for every user, whether from here or from numpy's streams.
PINNED = [(task(8192, 64, 4), 10_000, "30c70a60bf5575f4"), (task(8192, 256, 64), 1_000, "00fcff8581abf93b")]
PINNED += [(task(32, 64, 15, fill=True), 1_000, "2739b0381eee4804")]


@pytest.mark.parametrize(("t", "rows", "digest"), PINNED, ids=name)
def test_generate_bytes_are_pinned(t, rows, digest):
    assert data_hash(generate(t, rows, seed=0)) == digest


def test_generate_is_the_same_in_every_process():
    code = (
        "import sys; from suites.mqar.data import MQAR, data_hash, generate; "
        "print(data_hash(generate(MQAR(vocab_size=128, seq_len=256, num_pairs=4, random_fill=True), 3000, 5)), 'torch' in sys.modules)"
    )
    here = data_hash(generate(task(128, 256, 4, fill=True), 3000, 5))
    for hash_seed in ("1", "2"):
        env, command = {**os.environ, "PYTHONHASHSEED": hash_seed}, [sys.executable, "-W", "error", "-c", code]
        assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split() == [here, "False"]


def test_global_random_state_is_neither_used_nor_moved():
    t, found = task(64, 32, 4, fill=True), []
    for state in (1, 2):
        np.random.seed(state)
        torch.manual_seed(state)
        numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
        hashes = data_hash(generate(t, 50, 9)), data_hash(generate_reference(t, 50, 9, 9))
        found.append((*hashes, data.segment_seeds(9, 2, 2), data.recall_free_floor(t, 100)))
        np.testing.assert_array_equal(numpy_before, np.random.get_state()[1])
        assert torch.equal(torch_before, torch.get_rng_state())
    assert found[0] == found[1]


@pytest.mark.parametrize("fill", [False, True])
def test_different_seeds_differ(fill):
    t = task(fill=fill)
    a, b = generate(t, 1000, 1), generate(t, 1000, 2)
    assert (a.inputs[:, :8] == b.inputs[:, :8]).all(axis=1).sum() == 0
    assert len(np.unique(a.inputs, axis=0)) == 1000  # nor do rows repeat inside one
    assert data_hash(generate(t, 1000, 1)) == data_hash(a)


def test_data_hash_ignores_type_and_block_size(monkeypatch):
    examples = generate(task(), 300, seed=0)
    wide = Examples(examples.inputs.astype(np.int64), np.asfortranarray(examples.labels.astype(np.int32)))
    assert (digest := data_hash(examples)) == data_hash(wide)
    monkeypatch.setattr(data, "CHUNK_TOKENS", 1000)
    assert data_hash(examples) == digest
    changed = examples.labels.copy()
    changed[-1, -1] += 1
    assert data_hash(Examples(examples.inputs, changed)) != digest


ERRORS = [
    ({"seq_len": 63}, r"seq_len=63 must be even; nearest legal for num_pairs=4: 62 or 64"),
    ({"seq_len": 17, "num_pairs": 5}, r"seq_len=17 must be even; nearest legal for num_pairs=5: 20"),
    ({"seq_len": 19, "num_pairs": 5}, r"seq_len=19 must be even; nearest legal for num_pairs=5: 20"),
    ({"seq_len": 16, "num_pairs": 5}, r"num_pairs=5 does not fit in seq_len=16 .*: num_pairs at most 4, or seq_len at least 20"),
    ({"seq_len": 16, "num_pairs": 5, "vocab_size": 8}, r"num_pairs=5 .* seq_len=16 .*: num_pairs at most 3, or seq_len at least 20"),
    ({"seq_len": 2, "num_pairs": 1}, r"num_pairs=1 does not fit in seq_len=2 \(4 tokens a pair\): seq_len at least 4"),
    ({"seq_len": 0, "num_pairs": 1}, r"seq_len at least 4"),
    ({"vocab_size": 8}, r"num_pairs=4 needs .* vocab_size=8 has 3 .*: num_pairs at most 3, or vocab_size at least 10"),
    ({"vocab_size": 2, "num_pairs": 1}, r"vocab_size=2 has 0 \(V//2 - 1\): vocab_size at least 4"),
    ({"vocab_size": 2**31 + 1}, r"vocab_size=2147483649 must be at most 2147483648"),
    ({"num_pairs": 0}, r"num_pairs=0 must be at least 1 and at most 16"),
    ({"num_pairs": -1, "vocab_size": 2}, r"num_pairs=-1 must be at least 1$"),
    ({"power_a": 0.0}, r"power_a=0.0 must be above 0 and at most 10"),
    ({"power_a": float("nan")}, r"power_a=nan must be above 0"),
    ({"power_a": 11.0}, r"power_a=11.0 .* at most 10"),
    ({"seq_len": 64.0}, r"seq_len=64.0 must be a whole number"),
]


@pytest.mark.parametrize(("changes", "words"), ERRORS, ids=str)
def test_impossible_settings_are_refused_in_one_line(changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        MQAR(**{"seq_len": 64, "num_pairs": 4, **changes})
    assert "\n" not in str(error.value)


LEGAL = [{"seq_len": 16}, {"vocab_size": 10}, {"vocab_size": 128, "seq_len": 256}, {"vocab_size": 2**31}, {"power_a": 10.0}]


@pytest.mark.parametrize("changes", LEGAL, ids=str)
def test_settings_named_as_legal_are_legal(changes):
    assert MQAR(**{"seq_len": 64, "num_pairs": 4, **changes}).slots > 0


def test_more_passes_over_the_pairs_are_refused():
    with pytest.raises(TypeError, match="num_passes"):
        MQAR(seq_len=64, num_pairs=4, num_passes=2)  # type: ignore[call-arg]


REQUESTS = [
    (lambda: generate(task(), 0, 0), "num_examples=0 must be at least 1"),
    (lambda: generate(task(), 1, -1), "seed=-1 must be 0 or more"),
    (lambda: generate_reference(task(), 0, 0), "num_examples=0 must be at least 1"),
    (lambda: generate_reference(task(), 1, 2**32), "seed=4294967296 must be 0 or more and below 4294967296"),
    (lambda: generate_reference(task(fill=True), 2, 1), "needs torch_seed"),
    (lambda: data.segment_seeds(-1, 1, 1), "seed=-1"),
    (lambda: data.recall_free_floor(task(), 1), "num_examples=1 must be at least 2"),
]


@pytest.mark.parametrize(("call", "words"), REQUESTS)
def test_impossible_requests_are_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


FLOORS = [(32, 4, 0.01, 0.309), (64, 4, 0.01, 0.290), (64, 8, 0.01, 0.167), (256, 64, 0.01, 0.035), (64, 4, 1.0, 0.25), (64, 1, 0.01, 1.0)]


@pytest.mark.parametrize(("vocab", "floor"), [(8192, 1 / 4096), (32, 1 / 16), (33, 1 / 17), (4, 1 / 2)])
def test_uniform_floor_is_one_over_the_values(vocab, floor):
    t = task(vocab, 32, 1)
    assert data.uniform_floor(t) == floor
    if vocab < 100:  # no constant answer does better
        labels = generate(t, 20_000, 0).labels
        assert np.bincount(labels[labels != IGNORED]).max() / 20_000 == pytest.approx(floor, abs=0.01)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("seq_len", "pairs", "power_a", "floor"), FLOORS)
def test_recall_free_floor_values(seq_len, pairs, power_a, floor, seed):
    assert data.recall_free_floor(task(8192, seq_len, pairs, power_a), seed=seed) == pytest.approx(floor, abs=0.004)


def test_recall_free_floor_is_not_biased_upward_by_few_rows():
    """Uniform cells tell nothing, so however few the rows to learn from, the mean score is 1/k."""
    assert np.mean([data.recall_free_floor(task(power_a=1.0), 20, seed) for seed in range(200)]) == pytest.approx(0.25, abs=0.02)


def test_recall_free_floor_matches_the_exact_answer():
    """A setting small enough to list: the best pair for each (rank, cell), weighed by its exact probability."""
    t = task(8, 12, 2)
    chance = {}
    for cells, p in ordered(t).items():
        for rank, pair in enumerate(np.argsort(cells)):
            place = chance.setdefault((rank, cells[pair]), [0.0, 0.0])
            place[pair] += p / 2
    assert data.recall_free_floor(t) == pytest.approx(sum(map(max, chance.values())), abs=0.003)
