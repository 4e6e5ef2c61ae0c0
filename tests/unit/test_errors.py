"""`unknown` in words: what is wrong, the nearest name, the list."""

import pytest

from hgrn2_bench.errors import LISTED, ConfigError, one_line, unknown

MANY = [f"setting_{i}" for i in range(LISTED + 1)]


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("hgnr2", ["mamba", "hgrn2", "gla"], "Unknown model 'hgnr2'. Did you mean 'hgrn2'? Available: gla, hgrn2, mamba."),
        ("zzz", ["mamba", "hgrn2"], "Unknown model 'zzz'. Available: hgrn2, mamba."),
        ("gla", ["gla", "gla"], "Unknown model 'gla'. Did you mean 'gla'? Available: gla."),
        ("seting_20", MANY, "Unknown model 'seting_20'. Did you mean 'setting_20'?"),
        ("zzz", MANY, f"Unknown model 'zzz'. Available: {', '.join(sorted(MANY))}."),
    ],
    ids=["near", "far", "repeated", "near of many", "far of many"],
)
def test_unknown_names_the_nearest_and_lists_what_there_is(name, known, expected):
    error = unknown("model", name, known)
    assert isinstance(error, ConfigError)
    assert str(error) == expected


def test_unknown_takes_any_iterable_once():
    assert str(unknown("suite", "mqra", iter(["mqar", "lra"]))).endswith("Did you mean 'mqar'? Available: lra, mqar.")


def test_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)


WORKERS = """Caught DataError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 1, in loop
    data = fetch(index)
           ^^^^^^^^^^^^
OSError: truncated

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "pictures.py", line 2, in image
    raise DataError(told) from None
hgrn2_bench.errors.DataError: train/3.jpg: no picture,
  or cut short
"""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (ConfigError(WORKERS), "train/3.jpg: no picture, or cut short"),
        (RuntimeError("Caught Empty in thread.\nOriginal Traceback (most recent call last):\n  File\nEmpty\n"), "Empty"),
    ],
    ids=["plain", "of a worker", "without text"],
)
def test_one_line_is_what_was_said_where_it_went_wrong(error, expected):
    assert one_line(error) == expected
