"""The benchmark scripts on tiny models and data: the numbers that do not depend on the machine, and what is kept."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_model, save_tokenizer


datasets = pytest.importorskip("datasets", reason="the benchmarks read parquet with it")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TIMEOUT = 1200
CONTENDERS = ("gnp", "sam", "gnp_interval_2", "loop_sam")
METHODS = {"cifar10": 5, "sst2": 4}
WORDS = ("good", "bad", "film", "plot", "a", "the", "fine", "dull")


def run_script(name: str, *flags: Any) -> str:
    """Its standard output; a failure raises, with what it said."""
    root = BENCHMARKS.parent
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Files of the format of ../shared/data: 96 small images, 96 sentences."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    images = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    sentences = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    pixels = generator.integers(256, size=(96, 32, 32, 3), dtype=np.uint8)
    columns = {
        "cifar10/test": ({"image": list(pixels), "label": generator.integers(10, size=96)}, images),
        "sst2/validation": (
            {
                "sentence": [" ".join(generator.choice(WORDS, size=5)) for _ in range(96)],
                "label": generator.integers(2, size=96),
            },
            sentences,
        ),
    }
    for name, (values, features) in columns.items():
        task, test = name.split("/")
        (folder / task).mkdir()
        split = datasets.Dataset.from_dict(values, features)
        for file in ("train", test):
            split.to_parquet(folder / task / f"{file}.parquet")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    save_tokenizer(folder, WORDS)
    make_model("bert", dropout=0.1).bert.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_cost_counts_flops_and_memory(tmp_path):
    pytest.importorskip("matplotlib", reason="the benchmarks draw with it")
    flags = ("--model", "bert-tiny", "--steps", 10, "--contenders", *CONTENDERS)
    output = run_script("cost.py", *flags, "--output_dir", tmp_path)
    report = json.loads((tmp_path / "cost_bert-tiny.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["plain", *CONTENDERS]
    flops = {name: row["flops_ratio"] for name, row in rows.items()}
    assert flops == {"plain": 1.0, "gnp": 2.0, "sam": 2.0, "gnp_interval_2": 1.5, "loop_sam": 2.0}
    for name, row in rows.items():
        low, middle, high = row["ratio"]
        assert 0 < low <= middle <= high < math.inf
        assert len(row["steps"]) == 10
        assert f"| {name} |" in output
    # The copy of the weights; the first gradient stays where the second one accumulates, which sam does not need. And
    # the copied inputs of a step.
    assert rows["gnp"]["peak_over_plain_in_weights"] <= 2.1
    assert rows["sam"]["peak_over_plain_in_weights"] <= 1.1
    assert (tmp_path / "cost_bert-tiny.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_cost_counts_bytes_of_ranks(tmp_path):
    run_script("cost.py", "--model", "vit-tiny", "--ranks", 2, "--engines", "zero2", "--output_dir", tmp_path)
    (row,) = json.loads((tmp_path / "cost_vit-tiny_2_ranks.json").read_text(encoding="utf-8"))["rows"]
    assert row["bytes_ratio"] == pytest.approx(2, rel=1e-3)
    # What is held is counted by tests/distributed/test_launches.py: a profiler's figure depends on the machine's load.
    assert all(math.isfinite(peak) for peak in row["peak_over_plain_in_weights"])


@pytest.mark.slow
def test_generalization_runs_once_and_reports(tmp_path, data, encoder):
    pytest.importorskip("matplotlib", reason="the benchmarks draw with it")
    flags = ("--quick", "--data", data, "--model_path", encoder, "--output_dir", tmp_path)
    output = run_script("generalization.py", *flags)
    assert "prove nothing" in output and "Nothing is left." in output
    kept = (tmp_path / "generalization.json").read_text(encoding="utf-8")
    runs = json.loads(kept)["runs"]
    for task, methods in METHODS.items():
        of_task = [run for run in runs if run["settings"]["task"] == task]
        assert len({(run["method"], run["seed"]) for run in of_task}) == len(of_task) == 2 * methods
    for run in runs:
        assert 0 <= run["accuracy"] <= 1 and 0 <= run["calibration_error"] <= 1
        assert math.isfinite(run["loss"])
        assert run["curve"][-1][1] == run["accuracy"]
        assert len(run["curve"]) == (2 if run["method"] == "plain2x" else 1)
        assert f"seed {run['seed']} {run['method']}: " in output
    assert len(list(tmp_path.glob("generalization_*.png"))) == 2

    again = run_script("generalization.py", *flags)
    assert " seed " not in again and "Nothing is left." in again
    assert (tmp_path / "generalization.json").read_text(encoding="utf-8") == kept


def test_interrupted_run_goes_on_where_it_stopped(tmp_path, data):
    import generalization
    import tasks
    import torch

    args = argparse.Namespace(data=str(data), quick=True, learning_rate=None, batch_size=None)
    task = tasks.cifar10(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    method = generalization.METHODS["cifar10"]["gnp"]
    whole = generalization.train(task, method, 0, 2, tmp_path / "whole", deadline=math.inf)
    assert generalization.train(task, method, 0, 2, tmp_path / "parts", deadline=0) is None
    assert generalization.train(task, method, 0, 2, tmp_path / "parts", deadline=math.inf) == whole
    assert not (tmp_path / "parts").exists()


def test_augmentation_moves_and_mirrors():
    import tasks
    import torch

    torch.manual_seed(0)
    image = torch.arange(1.0, 65.0).reshape(1, 1, 8, 8).expand(64, 3, 8, 8)
    for result in tasks.crop_and_mirror(image):
        # Undone by the move and mirror that bring the first pixel inside of the picture back to its place.
        candidates = []
        padded = torch.nn.functional.pad(image[0], [tasks.PADDING] * 4)
        for top in range(2 * tasks.PADDING + 1):
            for left in range(2 * tasks.PADDING + 1):
                crop = padded[:, top : top + 8, left : left + 8]
                candidates += [crop, crop.flip(-1)]
        assert any(torch.equal(result, candidate) for candidate in candidates)


def test_statistics():
    import results

    assert results.mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    zeros = {"calibration_error": 0.0, "loss": 0.0}
    runs = {
        method: {seed: {"accuracy": accuracy, **zeros} for seed, accuracy in enumerate(by_seed)}
        for method, by_seed in {"plain": (0.5, 0.6), "same": (0.6, 0.7), "other": (0.7, 0.6)}.items()
    }
    _, same, other = results.summarise(runs, baseline="plain")
    assert same["accuracy_gain"][0] == pytest.approx(0.1) and math.isnan(same["accuracy_p"])
    # t = mean / error = 0.1 / 0.1 with one degree of freedom, where Student's distribution is Cauchy's: p = 1/2.
    assert other["accuracy_gain"] == pytest.approx((0.1, 0.1)) and other["accuracy_p"] == pytest.approx(0.5)
    # Sure and always wrong; then 75% sure and right in three cases of four.
    assert results.calibration_error(np.array([[1.0, 0.0]]), np.array([1])) == 1.0
    assert results.calibration_error(np.array([[0.75, 0.25]] * 4), np.array([0, 0, 0, 1])) == pytest.approx(0.0)
