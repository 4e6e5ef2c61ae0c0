"""The exceptions that mean the user's words or files are wrong: printed as one line, exit code 2."""

import difflib
import re
from collections.abc import Iterable

LISTED = 20
"""Lists of names up to this long are always shown."""


class ConfigError(ValueError):
    """Bad input: a name, value or combination that cannot run. Its text is the one line that the user sees."""


class DataError(ConfigError):
    """A file of the user's data is missing, damaged or of another kind. Its text is one line that names the file, and the line in it."""


TRACEBACK = "Traceback (most recent call last):\n"


def one_line(error: object) -> str:
    """The text of any error as one line; of one that torch raises again for a loader's worker or thread, what it said there, no frames."""
    text = str(error)
    if TRACEBACK in text:
        said = re.sub(r"\A( .*\n)*", "", text.rpartition(TRACEBACK)[2])
        text = said.partition(": ")[2] or said
    return " ".join(text.split())


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """`Unknown model 'hgnr2'. Did you mean 'hgrn2'? Available: ...` as an error to raise; long lists only where nothing is near."""
    names = sorted(set(known))
    lower = {each.lower(): each for each in names}
    close = [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)]
    words = [f"Unknown {kind} {name!r}."] + [f"Did you mean {close[0]!r}?" for _ in close]
    if not close or len(names) <= LISTED:
        words.append(f"Available: {', '.join(names)}.")
    return ConfigError(" ".join(words))
