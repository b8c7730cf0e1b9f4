"""The example scripts, run as scripts, on the data that they embed and on the user's own."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from fork import fork_script
from PIL import Image as PILImage
from runs import needs_image_processors
from tiny import make_model, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).parents[2]
TIMEOUT = 1200
FAST = ["--report_to", "none", "--disable_tqdm", "true"]


def run_script(name: str, output: Path, *flags: str) -> dict[str, float]:
    """The metrics that the script writes."""
    printed = fork_script(f"examples/{name}.py", "--output_dir", output, *FAST, *flags, timeout=TIMEOUT)
    results = output / "all_results.json"
    return json.loads(results.read_text()) if results.exists() else {"printed": printed}


def test_vit_finetune_learns_the_digits(tmp_path):
    metrics = run_script("vit_finetune", tmp_path, "--num_train_epochs", "5")
    assert metrics["eval_accuracy"] > 0.5  # ten classes: an untrained model has 0.1, and 0.67 was seen
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    logs = [log for log in state["log_history"] if "gnp_sharpness" in log]
    assert logs and logs[-1]["loss"] < logs[0]["loss"]
    assert len([log for log in state["log_history"] if "eval_accuracy" in log]) >= 5  # each epoch
    card = (tmp_path / "README.md").read_text()
    assert "gnp_r: 0.05" in card and "gradient-norm-penalty" in card


def test_text_classification_learns_the_docstrings(tmp_path):
    metrics = run_script("text_classification", tmp_path, "--num_train_epochs", "3")
    assert metrics["eval_accuracy"] > 0.4  # the largest of eight packages has 0.2


def test_demo_compares_and_draws(tmp_path):
    flags = ["--seeds", 2, "--epochs", 1, "--processes", 1, "--output_dir", tmp_path]
    printed = fork_script("examples/demo.py", *flags, timeout=TIMEOUT)
    row = r"^(plain|plain, twice the epochs|penalised) +([\d.]+) +([\d.]+) ± [\d.]+ .* ([\d.]+) ± "
    passes = {method: float(count) for method, count, *_ in re.findall(row, printed, re.MULTILINE)}
    assert passes["plain"] == 1 and passes["plain, twice the epochs"] == 2
    # Of 19 steps, the 2 of the warm-up have no second pass.
    assert passes["penalised"] == pytest.approx(1 + 17 / 19, abs=0.05)
    picture = PILImage.open(tmp_path / "demo.png")
    assert len(picture.convert("L").getcolors()) > 10


def test_sft_lora_learns_and_merges(tmp_path):
    pytest.importorskip("trl", reason="TRL needs Python 3.11")
    metrics = run_script("sft_lora", tmp_path, "--max_steps", "30", "--logging_steps", "5")
    logs = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    logs = [log for log in logs if "gnp_sharpness" in log]
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.5  # from ln 1024 = 6.9 on
    assert_merged(tmp_path, metrics["eval_loss"])


def assert_merged(folder: Path, loss: float) -> None:
    """The merged model, without PEFT, is the adapter on the model it started from."""
    from peft import PeftModel

    inputs = AutoTokenizer.from_pretrained(folder / "merged")(
        "Return the next item of the queue.", return_tensors="pt"
    )
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    start = AutoModelForCausalLM.from_pretrained(folder / "start")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "start"), folder)
    with torch.no_grad():
        logits, expected, before = (model(**inputs).logits for model in (merged, adapted, start))
    # The adapter is added to the weights instead of its output to theirs: another order of fp32 roundings.
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - before).abs().max() > 0.1
    assert np.isfinite(loss)


def test_search_tries_and_draws(tmp_path):
    flags = ["--trials", "2", "--num_train_epochs", "1", "--max_train_samples", "64", "--max_eval_samples", "64"]
    printed = run_script("search", tmp_path, *flags)["printed"]
    assert len(re.findall(r"accuracy 0\.\d+  gnp_r=[\d.e-]+  gnp_alpha=[\d.]+  gnp_scope=\w+", printed)) == 2
    picture = PILImage.open(tmp_path / "search.png")
    assert len(picture.convert("L").getcolors()) > 10


def test_config_flag(tmp_path, monkeypatch):
    config = tmp_path / "run.yaml"
    config.write_text("gnp_r: 0.3\nlearning_rate: 0.007\n")
    for flags in ([f"--config={config}"], ["--config", str(config)]):
        args = parsed(monkeypatch, *flags)
        assert (args.gnp_r, args.learning_rate, args.num_train_epochs) == (0.3, 0.007, 6)
        args = parsed(monkeypatch, *flags, "--gnp_r=0.1")
        assert (args.gnp_r, args.learning_rate) == (0.1, 0.007)


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--model-name-or-path", "--model_name", "--dataset-name"])
def test_defaults_of_the_embedded_model(monkeypatch, flag):
    assert parsed(monkeypatch).learning_rate == 1e-3
    assert parsed(monkeypatch, flag, "theirs").learning_rate == 5e-5


def parsed(monkeypatch, *flags: str):
    """The training arguments that a script makes of its flags."""
    monkeypatch.setattr(sys, "argv", ["script.py", "--report_to", "none", *flags])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    common = importlib.import_module("common")
    embedded = {"learning_rate": 1e-3, "num_train_epochs": 6}
    return common.parse_args(common.DataArguments, embedded)[2]


def test_unknown_config_key_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("gnp_rr: 0.1\n")
    message = re.escape("run.yaml has keys that are no arguments of this script: ['gnp_rr']")
    with pytest.raises(AssertionError, match=message):
        fork_script("examples/vit_finetune.py", "--config", tmp_path / "run.yaml", timeout=TIMEOUT)


def test_own_model_and_parquet_file(tmp_path):
    needs_image_processors()
    make_model("vit").save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=40)
    images = [
        PILImage.fromarray((generator.random((8, 8, 3)) * 100 + 100 * label).astype("uint8")) for label in labels
    ]
    features = Features({"img": Image(), "label": ClassLabel(names=["dark", "bright"])})
    Dataset.from_dict({"img": images, "label": labels}, features).to_parquet(tmp_path / "data.parquet")
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data.parquet")]
    flags += ["--ignore_mismatched_sizes", "true", "--train_val_split", "0.25", "--num_train_epochs", "10"]
    metrics = run_script("vit_finetune", tmp_path / "out", *flags, "--learning_rate", "1e-3")
    assert metrics["eval_accuracy"] > 0.8  # brightness tells them apart


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_accepted(tmp_path, recipe):
    """On the small data of a test, with a small model where the recipe names one of the hub."""
    script = "text_classification" if recipe.stem.startswith("text") else "vit_finetune"
    if script == "vit_finetune":
        needs_image_processors()
    if script == "text_classification":
        make_model("bert").save_pretrained(tmp_path / "model")
        data = Dataset.from_dict({"sentence": ["good film", "bad film"] * 8, "label": [1, 0] * 8})
    else:
        make_model("vit").save_pretrained(tmp_path / "model")
        pixels = np.random.default_rng(0).integers(255, size=(16, 32, 32, 3), dtype="uint8")
        features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
        data = Dataset.from_dict({"image": [PILImage.fromarray(p) for p in pixels], "label": [0, 1] * 8}, features)
    data.to_parquet(tmp_path / "data.parquet")
    flags = ["--config", str(recipe), "--dataset_name", str(tmp_path / "data.parquet"), "--max_steps", "2"]
    flags += ["--eval_strategy", "no", "--save_strategy", "no", "--bf16", "false"]
    flags += ["--per_device_train_batch_size", "4"]
    if script == "text_classification":
        save_tokenizer(tmp_path / "model", ["[CLS]", "[SEP]", "good", "bad", "film"])
    if "model_name_or_path" in recipe.read_text():
        flags += ["--model_name_or_path", str(tmp_path / "model"), "--ignore_mismatched_sizes", "true"]
    metrics = run_script(script, tmp_path / "out", *flags)
    assert np.isfinite(metrics["train_loss"])
