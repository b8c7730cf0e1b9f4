"""Ray Train: two workers train as one process does on the same global batches."""

import sys
from pathlib import Path

import pytest
import torch
from launch import launch
from runs import LOG_TOLERANCE, WEIGHTS_TOLERANCE, make_trainer
from tiny import flat_weights, make_model, relative_distance


pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).parent / "ray_workers.py"
TIMEOUT = 1200  # for hangs: it takes less than a minute on two free cores


def test_two_workers_train_as_one_process(tmp_path):
    pytest.importorskip("ray", reason="Ray is not a part of the dev extra: pip install 'ray[train]'")
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    launch(command, TIMEOUT, RAY_USAGE_STATS_ENABLED="0")
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert result["ranks"] == 2
    expected = make_trainer(tmp_path / "one", "vit", max_steps=3)
    expected.train()
    logs = [entry for entry in expected.state.log_history if "loss" in entry]
    for name in ("loss", "grad_norm", "gnp_grad_norm", "gnp_perturbed_loss"):
        values = [entry[name] for entry in result["history"]]
        assert values == pytest.approx([entry[name] for entry in logs], rel=LOG_TOLERANCE), name
    weights, start = flat_weights(expected.model), flat_weights(make_model("vit"))
    assert relative_distance(result["weights"], weights, start) < WEIGHTS_TOLERANCE
