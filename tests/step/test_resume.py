"""Checkpoints: a resumed run is the run that never stopped, and a saved run knows its gnp values."""

import json
import logging
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl
from runs import WeightsAtSaves, assert_identical, assert_loads, make_trainer, randomized, run, snapshot
from safetensors.torch import load_file
from tiny import KINDS, make_data, make_model
from transformers import Trainer, TrainerCallback

from hf_gnp import GNPTrainer


SETTINGS = {
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "train_sampling_strategy": "random",
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "weight_decay": 0.1,
    "save_strategy": "steps",
    "save_steps": 1,
}
STEPS_PER_EPOCH, STEPS = 3, 6
# Kind of model and arguments of runs that are resumed.
RUNS = {kind: (kind, {}) for kind in KINDS}
RUNS |= {
    f"bert-{metric}": ("bert", {"gnp_metric": metric, "gnp_r": r}) for metric, r in (("layer", 0.05), ("element", 0.5))
}
TAG = "gradient-norm-penalty"
PAPER = "https://arxiv.org/abs/2202.03599"


def make_resumable(output_dir, kind: str, cls=GNPTrainer, model=None, **kwargs) -> Trainer:
    model = make_model(kind, dropout=0.1) if model is None else model
    return make_trainer(output_dir, kind, cls, model=model, data=make_data(kind, 24), **{**SETTINGS, **kwargs})


@pytest.fixture(scope="module", params=RUNS)
def uninterrupted(request, tmp_path_factory):
    """A whole run of each of `RUNS`, with a checkpoint at each step."""
    output_dir = tmp_path_factory.mktemp(request.param)
    kind, args = RUNS[request.param]
    end = run(make_resumable(output_dir, kind, **args))
    assert len(end["logs"]) == STEPS
    return request.param, output_dir, end


@pytest.mark.parametrize("step", [STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1])
def test_resumed_run_is_the_whole_run(tmp_path, uninterrupted, step):
    """Stopped within the first epoch, at its end, and within the second."""
    name, output_dir, expected = uninterrupted
    kind, args = RUNS[name]
    model = randomized(make_model(kind, dropout=0.1))
    trainer = make_resumable(tmp_path, kind, model=model, save_strategy="no", **args)
    result = run(trainer, resume_from_checkpoint=str(output_dir / f"checkpoint-{step}"))
    assert_identical(result, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_best_model_is_loaded_at_the_end(tmp_path, kind):
    saves = WeightsAtSaves()
    trainer = make_resumable(
        tmp_path,
        kind,
        callbacks=[saves],
        eval_dataset=make_data(kind, 8, seed=2),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # whatever is best, as long as it is not the last
    )
    trainer.train()
    best = int(Path(trainer.state.best_model_checkpoint).name.removeprefix("checkpoint-"))
    assert best < STEPS
    assert_identical(snapshot(trainer.model), saves.weights[best])


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_checkpoint(tmp_path, kind):
    source = make_model(kind)
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_loads(tmp_path, source, make_model(kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_checkpoint_in_another_precision(tmp_path, dtype):
    source = make_model("vit").to(dtype)
    source.save_pretrained(tmp_path)
    assert_loads(tmp_path, source, make_model("vit").to(dtype))


# --- The gnp values of a checkpoint ---


def make_small(output_dir, cls=GNPTrainer, **kwargs) -> Trainer:
    return make_trainer(output_dir, "net", cls, **{"save_strategy": "steps", **kwargs})


def resume_warnings(caplog, output_dir, **kwargs) -> list[str]:
    """What hf_gnp says when a checkpoint of a run with r = 0.05, α = 0.8 is resumed with other arguments."""
    make_small(output_dir, max_steps=2, save_steps=2, gnp_r=0.05, gnp_alpha=0.8).train()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hf_gnp"):
        trainer = make_small(output_dir, max_steps=3, **kwargs)
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_gnp")]


@pytest.mark.parametrize("restore", [False, True])
def test_resume_with_other_values_warns(tmp_path, caplog, restore):
    settings = {"gnp_r": 0.1, "gnp_alpha": 0.8, "restore_callback_states_from_checkpoint": restore}
    [warning] = resume_warnings(caplog, tmp_path, **settings)
    assert "gnp_r=0.05 (now 0.1)" in warning
    assert "gnp_alpha" not in warning


@pytest.mark.parametrize("values", [{"gnp_r": 0.05}, {"gnp_r": 0.05, "gnp_alpha": 0.8}])
def test_resume_with_the_same_values_does_not_warn(tmp_path, caplog, values):
    assert resume_warnings(caplog, tmp_path, **values) == []


def test_resumed_run_saves_its_own_values(tmp_path, caplog):
    resume_warnings(caplog, tmp_path, save_steps=3, gnp_r=0.1, gnp_alpha=1.0)
    assert saved_values(tmp_path / "checkpoint-2") == {"gnp_r": 0.05, "gnp_alpha": 0.8}
    assert saved_values(tmp_path / "checkpoint-3") == {"gnp_r": 0.1, "gnp_alpha": 1.0}


def saved_values(checkpoint: Path) -> dict[str, float]:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["GNPStateCallback"]["args"]


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_stock_checkpoint_resumes(tmp_path, caplog, kind):
    saves = WeightsAtSaves()
    make_resumable(tmp_path, kind, Trainer, callbacks=[saves], max_steps=1).train()

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.step, self.weights = state.global_step, snapshot(model)

    start = Start()
    trainer = make_resumable(
        tmp_path, kind, model=randomized(make_model(kind, dropout=0.1)), callbacks=[start], max_steps=2
    )
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert start.step == 1
    assert_identical(start.weights, saves.weights[1])
    assert "gnp_sharpness" in trainer.state.log_history[1]
    assert not [record for record in caplog.records if record.name.startswith("hf_gnp")]
    assert saved_values(tmp_path / "checkpoint-2") == {"gnp_r": 0.05, "gnp_alpha": 0.8}


def test_saved_run_names_its_values(tmp_path):
    trainer = make_resumable(tmp_path, "vit", max_steps=1, gnp_r=0.07, gnp_alpha=0.3)
    trainer.train()
    trainer.save_model()
    arguments = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (arguments.gnp_r, arguments.gnp_alpha) == (0.07, 0.3)
    assert saved_values(tmp_path / "checkpoint-1") == {"gnp_r": 0.07, "gnp_alpha": 0.3}


def test_model_card(tmp_path):
    """Also when it is written again over the first, as each push to the hub does."""
    trainer = make_resumable(tmp_path, "vit", max_steps=1, gnp_r=0.07, gnp_alpha=0.3)
    trainer.train()
    for _ in range(2):
        trainer.create_model_card(tags=["mine"])
        card = ModelCard.load(tmp_path / "README.md")
        assert sorted(tag for tag in card.data.tags if tag in ("mine", TAG)) == [TAG, "mine"]
        assert card.text.count("- gnp_r: 0.07\n") == 1
        assert card.text.count("- gnp_alpha: 0.3\n") == 1
        [sentence] = [line for line in card.text.splitlines() if "gradient norm of the loss was penalised" in line]
        assert "α = 0.3" in sentence and "r = 0.07" in sentence and PAPER in sentence


def test_model_card_of_momentum(tmp_path):
    trainer = make_resumable(tmp_path, "vit", max_steps=1, gnp_r=0.07, gnp_alpha=1.0, gnp_direction="momentum")
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "takes the gradient at the weights moved by r = 0.07 against the optimizer's momentum" in text


def test_model_card_of_plain_training(tmp_path):
    trainer = make_resumable(tmp_path, "vit", max_steps=1, gnp_alpha=0.0)
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "gnp_" not in text and TAG not in text


def test_push_to_hub(tmp_path, monkeypatch):
    """At the hub's public functions: huggingface_hub has no stand-in for its server."""
    sent = {}

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/me/{repo_id}", endpoint="https://huggingface.co")

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        sent[repo_id] = {
            "card": (Path(folder_path) / "README.md").read_text(),
            "weights": load_file(Path(folder_path) / "model.safetensors"),
        }

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    trainer = make_resumable(tmp_path / "flat", "bert", max_steps=1, gnp_r=0.07, gnp_alpha=0.3)
    trainer.train()
    trainer.push_to_hub(tags=["mine"])
    [(name, pushed)] = sent.items()
    assert name == "me/flat"
    assert PAPER in pushed["card"] and TAG in pushed["card"] and "- gnp_r: 0.07\n" in pushed["card"]
    weights = trainer.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in pushed["weights"].items())
    assert pushed["weights"]
