"""What several files of unit tests share: small trained models in folders, made once a file."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def foreign_folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers, as `zeroshot_lms.foreign` makes it."""
    from zeroshot_lms import foreign

    return foreign(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours, as `zeroshot_lms.own` makes it."""
    from zeroshot_lms import own

    return own(tmp_path_factory.mktemp("own") / "model")
