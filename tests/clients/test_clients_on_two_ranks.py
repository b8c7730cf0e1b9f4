"""SFT and DPO on two ranks, under DDP and ZeRO-2: where the penalty is off, or moves nothing, it changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fork import fork_script
from runs import assert_identical
from test_clients import logs_without
from two_ranks import CLIENTS_ON_RANKS, ENGINES_OF_CLIENTS


pytestmark = [pytest.mark.distributed, pytest.mark.slow]

pytest.importorskip("trl", reason="a client of the dev extra")

SCRIPT = Path(__file__).parent / "two_ranks.py"
TIMEOUT = 1200  # for hangs: the launch takes less than a minute on two free cores
CASES = [(client, engine) for client in CLIENTS_ON_RANKS for engine in ENGINES_OF_CLIENTS]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two_ranks")
    fork_script(SCRIPT, folder, ranks=2, timeout=TIMEOUT)
    return torch.load(folder / "results.pt", weights_only=True)


def assert_plain(results: dict[str, Any], case: str, penalty: str, *not_compared: str) -> None:
    result, expected = results[f"{case}-{penalty}"], results[f"{case}-plain"]
    for run in (expected, result):
        assert "error" not in run, run.get("error")
    logs, expected_logs = (logs_without(run["history"], *not_compared) for run in (result, expected))
    assert_identical(logs, expected_logs)
    for weights in ("weights", "masters"):
        assert_identical(result[weights], expected[weights], weights)


@pytest.mark.parametrize(("client", "engine"), CASES)
def test_alpha_zero_is_the_plain_trainer(results, client, engine):
    assert_plain(results, f"{client}-{engine}", "alpha0")


@pytest.mark.parametrize(("client", "engine"), CASES)
def test_unmoved_run_is_plain(results, client, engine):
    assert "gnp_sharpness" in results[f"{client}-{engine}-unmoved"]["history"][0]
    assert_plain(results, f"{client}-{engine}", "unmoved", "total_flos")
