"""`python -m hf_gnp.sharpness` under accelerate's launcher: 2 processes, gloo, CPU."""

import json

import pytest
from launch import free_port, launch
from test_sharpness_tools import FLAGS, save_checkpoints

from hf_gnp.sharpness.__main__ import main


pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_launched_it_measures_what_one_process_does(tmp_path, config):
    checkpoints, data = save_checkpoints(tmp_path, "llama")
    flags = [*checkpoints, "--data", data, *FLAGS, "--no-pictures"]
    launcher = ["accelerate", "launch", "--config_file", f"configs/accelerate/{config}.yaml"]
    launcher += ["--num_processes", "2", "--main_process_port", str(free_port())]
    launch([*launcher, "-m", "hf_gnp.sharpness", *flags, "--output_dir", str(tmp_path / config)], timeout=1200)
    rows = json.loads((tmp_path / config / "sharpness.json").read_text())
    for row, expected in zip(rows, main([*flags, "--output_dir", str(tmp_path / "one")]), strict=True):
        # Means in fp32, in another order; products of them, see test_sharpness_on_engines.py.
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert row["top_eigenvalues"] == pytest.approx(expected["top_eigenvalues"], rel=2e-3)
