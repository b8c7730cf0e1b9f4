"""An exception in the second pass on one rank: clean weights there, and the job ends with the error."""

import json
from pathlib import Path

import pytest
import torch
from launch import free_port, launch
from tiny import make_model


SCRIPT = Path(__file__).parent / "one_rank_fails.py"

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_one_rank_fails(tmp_path, engine):
    command = ["torchrun", "--nproc_per_node=2", f"--master_port={free_port()}", str(SCRIPT), engine, str(tmp_path)]
    # The other rank waits in a collective, at most for the process group's 60 seconds; the rest is starting up.
    with pytest.raises(AssertionError, match="failed"):
        launch(command, timeout=900)
    report = json.loads((tmp_path / "report0.json").read_text())
    assert report["error"] == "injected at 1.4"
    if engine == "zero2":
        assert report["own_partition_clean"]
        assert "nothing was saved" in report["refused"]
        assert not (tmp_path / "saved").exists()
    else:
        assert report["clean"]
    if engine == "ddp":
        saved = type(make_model("vit")).from_pretrained(tmp_path / "saved")
        start = torch.load(tmp_path / "start0.pt")
        assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), start, strict=True))
