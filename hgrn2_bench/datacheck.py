"""The checks that suites make of the user's data, run by name: `suites/<suite>/check.py` yields the findings."""

import importlib
from pathlib import Path

from hgrn2_bench import registry
from hgrn2_bench.doctor import PROBLEM, Finding, summary
from hgrn2_bench.errors import ConfigError, unknown
from hgrn2_bench.files import DATA, data_folder

ACTIONS = ("check",)


def check_data(suite: str, action: str, folder: Path | None = None) -> bool:
    """Print a line for each finding in a folder (the one that runs read, unless given), as it is found; whether there was no problem.

    ConfigError for an unknown suite or action, a suite that reads no data, and a folder that is not there or holds nothing of the suite.
    """
    checks = registry.data_checks()
    if suite not in checks:
        if suite in registry.suites():
            raise ConfigError(f"suite {suite} reads no data; suites that do: {', '.join(checks)}")
        raise unknown("suite", suite, [*registry.suites(), *checks])
    if action not in ACTIONS:
        raise unknown("action", action, ACTIONS)
    folder = data_folder() if folder is None else folder
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; name one, or set {DATA} to it")
    found: list[Finding] = []
    for each in importlib.import_module(checks[suite]).findings(folder):
        print(each, flush=True)
        found.append(each)
    print(summary(found, f"data {suite}"))
    return all(each.mark != PROBLEM for each in found)
