"""Invented data for text, retrieval and images, where there are no files: the shapes and sizes of the real tasks, and nothing else of them.

A model that learns them has shown that it runs. Their task names begin with `standin`, and no row of theirs meets one of the real task.

Shape letters: N items, T tokens, A letters of the alphabet, H height, W width.
"""

import numpy as np

from suites.lra.items import Split, Texts

END = 2
FIRST_LETTER = 3
LETTERS = 29
VOCABULARY = FIRST_LETTER + LETTERS
AUTHORS = 2
"""Each author is a table of how likely a letter follows another."""


def authors(seed: int) -> np.ndarray:
    """The tables (AUTHORS, A, A), cumulated along the last axis: two random habits, each mixed with what both share."""
    rng = np.random.default_rng([seed, 0])
    shared, own = rng.dirichlet(np.full(LETTERS, 0.3), LETTERS), rng.dirichlet(np.full(LETTERS, 0.3), (AUTHORS, LETTERS))
    return (0.7 * shared + 0.3 * own).cumsum(-1)


def write(tables_AAA: np.ndarray, who_N: np.ndarray, lengths_N: np.ndarray, rng: np.random.Generator) -> Texts:
    """One text by each author, of so many letters and the end token."""
    N, T = len(who_N), int(lengths_N.max())
    letters_NT = np.empty((N, T), np.uint8)
    now_N = rng.integers(LETTERS, size=N)
    for t in range(T):
        letters_NT[:, t] = now_N
        now_N = np.minimum((tables_AAA[who_N, now_N] < rng.random((N, 1))).sum(-1), LETTERS - 1)
    ids_NT = np.concatenate([letters_NT + FIRST_LETTER, np.zeros((N, 1), np.uint8)], 1)
    ids_NT[np.arange(N), lengths_N] = END
    kept_NT = np.arange(T + 1) <= lengths_N[:, None]
    return Texts(ids_NT[kept_NT], np.cumsum(lengths_N + 1))


def texts(count: int, max_len: int, seed: int, split: int) -> Split:
    """Texts of a quarter of `max_len` tokens and more; the label is the author."""
    rng = np.random.default_rng([seed, 1, split])
    labels_N = rng.integers(AUTHORS, size=count)
    return Split(write(authors(seed), labels_N, _lengths(count, max_len, rng), rng), labels_N)


def pairs(count: int, max_len: int, seed: int, split: int) -> Split:
    """Pairs of texts; the label is whether one author wrote both."""
    rng = np.random.default_rng([seed, 2, split])
    who_2N = rng.integers(AUTHORS, size=(2, count))
    first, second = (write(authors(seed), who, _lengths(count, max_len, rng), rng) for who in who_2N)
    return Split(first, (who_2N[0] == who_2N[1]).astype(np.int64), second)


def _lengths(count: int, max_len: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(max(1, max_len // 4), max_len, size=count)


def images(count: int, channels: int, seed: int, split: int) -> Split:
    """Noisy gratings, uint8 (N, 32, 32, C), of ten directions; the label is the direction."""
    rng = np.random.default_rng([seed, 3, split])
    labels_N = rng.integers(10, size=count)
    y_H1, x_1W = np.mgrid[:32, :1][0], np.mgrid[:1, :32][1]
    angle_N11 = (labels_N * np.pi / 10)[:, None, None]
    along_NHW = np.cos(angle_N11) * x_1W + np.sin(angle_N11) * y_H1
    wave_NHW = np.sin(2 * np.pi * (along_NHW / rng.uniform(5, 8, (count, 1, 1)) + rng.random((count, 1, 1))))
    noisy_NHWC = 127.5 + 60 * wave_NHW[..., None] + 30 * rng.standard_normal((count, 32, 32, channels))
    return Split(noisy_NHWC.clip(0, 255).astype(np.uint8), labels_N)
