"""The results of a file's `CASES`, which one launch runs for all of its tests."""

from pathlib import Path
from typing import Any

import pytest
from cases import RANKS, WORKER, run_cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cases")


@pytest.fixture(scope="module")
def results(request, folder) -> dict[str, Any]:
    """A module may have a number of `RANKS` and a `WORKER` of its own."""
    module = request.module
    ranks, worker = getattr(module, "RANKS", RANKS), getattr(module, "WORKER", WORKER)
    return run_cases(module.CASES, folder, ranks=ranks, worker=worker)
