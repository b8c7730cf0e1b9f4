"""The metrics in the logs, and the FLOPs in the state."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fork import fork_script
from runs import logs_of, make_trainer, run, trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import KINDS, Net, make_data, make_model
from transformers import Trainer, TrainerCallback

from hf_gnp import GNPArguments, GNPMixin, GNPTrainer
from hf_gnp.logs import RadiusHint


METRICS = ("gnp_grad_norm", "gnp_perturbed_loss", "gnp_sharpness")
OF_THE_STEP = ("gnp_r", "gnp_alpha", "gnp_on", "gnp_fidelity")
# The sums over steps are kept in fp32, or come from numbers that are.
ROUNDING = 1e-6


def test_metrics_are_means(tmp_path):
    each = trained(tmp_path, "vit", logging_steps=1)
    means = trained(tmp_path, "vit", logging_steps=3)
    assert [entry["step"] for entry in means.state.log_history if "loss" in entry] == [3, 6, 9, 12]
    per_step, per_log = logs_of(each, "loss", *METRICS), logs_of(means, "loss", *METRICS)
    for name, values in per_step.items():
        expected = [sum(values[i : i + 3]) / 3 for i in range(0, 12, 3)]
        assert per_log[name] == pytest.approx(expected, rel=ROUNDING), name


@pytest.mark.parametrize("strategy", [{"logging_steps": 5}, {"logging_strategy": "epoch", "num_train_epochs": 2}])
def test_metrics_are_in_training_logs_only(tmp_path, strategy):
    """Not in those of an evaluation, nor in the summary at the end, and nowhere else."""
    settings = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": make_data("vit", 8), **strategy}
    trainer = trained(tmp_path, "vit", **settings)
    names = {"loss": 0, "eval_loss": 0, "train_loss": 0}
    for entry in trainer.state.log_history:
        [name] = names.keys() & entry.keys()
        names[name] += 1
        assert {key for key in entry if key.startswith("gnp_")} == (
            {*METRICS, "gnp_cosine", *OF_THE_STEP} if name == "loss" else set()
        )
    epochs = strategy.get("num_train_epochs", 1)
    assert names == {"loss": 2, "eval_loss": 4 * epochs, "train_loss": 1}


@pytest.mark.parametrize("change", [lambda name: f"train/{name}", lambda name: None if name == "loss" else name])
def test_metrics_where_a_subclass_renames_or_drops_entries(tmp_path, change):
    class Renaming(GNPTrainer):
        def log(self, logs, *args, **kwargs):
            super().log({change(name): value for name, value in logs.items() if change(name)}, *args, **kwargs)

    trainer = trained(tmp_path, "net", Renaming, max_steps=2)
    expected = trained(tmp_path, "net", max_steps=2)
    names = ("gnp_grad_norm", "gnp_perturbed_loss", "gnp_on")
    assert len(expected.state.log_history) == len(trainer.state.log_history) == 3
    for entry, log in zip(trainer.state.log_history[:2], expected.state.log_history, strict=False):
        assert {name: entry[name] for name in names} == {name: log[name] for name in names}


def test_plain_training_logs_no_metrics(tmp_path):
    end = run(make_trainer(tmp_path, "vit", gnp_alpha=0.0, max_steps=2))
    assert [key for entry in end["logs"] for key in entry if key.startswith("gnp_")] == []
    assert len(end["logs"]) == 2


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_clean_loss(tmp_path, kind, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "learning_rate": 0.0}
    gnp = trained(tmp_path, kind, **settings)
    plain = trained(tmp_path, kind, Trainer, **settings)
    logs = logs_of(gnp, "loss", *METRICS)
    # The same forwards at the same weights, and with α = 1 - or any other - the same first gradient.
    assert logs["loss"] == logs_of(plain, "loss")["loss"]
    plain_norms = logs_of(plain, "grad_norm")["grad_norm"]
    assert logs["gnp_grad_norm"] == pytest.approx(plain_norms, rel=ROUNDING)
    differences = [
        perturbed - clean for perturbed, clean in zip(logs["gnp_perturbed_loss"], logs["loss"], strict=True)
    ]
    assert logs["gnp_sharpness"] == pytest.approx(differences, abs=ROUNDING * max(logs["gnp_perturbed_loss"]))
    assert all(value > 0 for value in logs["gnp_sharpness"])


def test_metrics_reach_tensorboard(tmp_path):
    trainer = trained(tmp_path, "vit", report_to=["tensorboard"], max_steps=3)
    [file] = [path for path in tmp_path.rglob("events.out.tfevents.*") if path.is_file()]
    events = EventAccumulator(str(file)).Reload()
    for name, values in logs_of(trainer, "loss", *METRICS).items():
        scalars = events.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx(values, rel=ROUNDING)  # event files hold fp32
    [arguments] = events.Tensors("args/text_summary")
    shown = json.loads(arguments.tensor_proto.string_val[0])
    assert {name: shown[name] for name in trainer.args.gnp_values()} == trainer.args.gnp_values()


TRACKIO = """
import json, sys
from runs import logs_of, make_trainer
from trackio.sqlite_storage import SQLiteStorage

trainer = make_trainer(sys.argv[1], "vit", report_to=["trackio"], max_steps=3, project="gnp", run_name="run")
trainer.train()
logged = logs_of(trainer, "loss", *sys.argv[2:])
shown = SQLiteStorage.get_logs("gnp", "run")
config = SQLiteStorage.get_run_config("gnp", "run")
print(json.dumps({"logged": logged, "shown": shown, "config": {k: v for k, v in config.items() if "gnp" in k}}))
"""
WANDB = """
import json, sys
import wandb
from runs import logs_of, make_trainer

trainer = make_trainer(sys.argv[1], "vit", report_to=["wandb"], max_steps=3)
trainer.train()
logged, run = logs_of(trainer, "loss", *sys.argv[2:]), wandb.run
shown = {name: run.summary[name] for name in run.summary.keys() if name.startswith("train/")}
print(json.dumps({"logged": logged, "shown": shown, "config": {k: v for k, v in run.config.items() if "gnp" in k}}))
"""


def run_apart(script: str, folder: Path, **environment: str) -> dict[str, Any]:
    """In a process of its own: trackers take their folders from the environment, and keep threads."""
    path = folder.with_suffix(".py")
    path.write_text(f"import os\nos.environ.update({environment!r})\n{script}")
    printed = fork_script(path, folder, *METRICS, timeout=600)
    return json.loads(next(line for line in printed.splitlines() if line.startswith('{"logged"')))


def test_metrics_reach_trackio(tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed: a part of the dev extra")
    found = run_apart(TRACKIO, tmp_path / "out", TRACKIO_DIR=str(tmp_path / "trackio"))
    steps = [entry for entry in found["shown"] if "train/gnp_sharpness" in entry]
    for name, values in found["logged"].items():
        assert [entry[f"train/{name}"] for entry in steps] == values
    assert (found["config"]["gnp_r"], found["config"]["gnp_alpha"]) == (0.05, 0.8)


def test_metrics_reach_wandb_offline(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed, nor a part of the dev extra: pip install wandb")
    folders = {f"WANDB_{kind}": str(tmp_path) for kind in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR")}
    found = run_apart(WANDB, tmp_path / "out", WANDB_MODE="offline", **folders)
    assert found["shown"]["train/global_step"] == 3
    for name, values in found["logged"].items():  # offline, W&B gives back the last value alone
        assert found["shown"][f"train/{name}"] == values[-1]
    assert (found["config"]["gnp_r"], found["config"]["gnp_alpha"]) == (0.05, 0.8)


@pytest.mark.parametrize("accumulation", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_flos_count_both_passes(tmp_path, kind, accumulation):
    totals = []
    for settings in ({"gnp_alpha": 1.0}, {"gnp_alpha": 0.0}):
        trainer = trained(tmp_path, kind, gradient_accumulation_steps=accumulation, **settings)
        totals.append(trainer.state.total_flos)
    assert totals[1] > 0
    assert totals[0] == 2 * totals[1]


class Whole(Net):
    """`Trainer` passes its loss on as it is, without a division that makes a new tensor."""

    def forward(self, x, labels, **kwargs):
        return super().forward(x, labels)


class OneBuffer(Whole):
    """Each forward writes over the loss of the one before, as a CUDA graph does."""

    last = None

    def forward(self, x, labels, **kwargs):
        outputs = super().forward(x, labels)
        if self.last is not None:
            self.last.data.fill_(float("nan"))
        self.last = outputs["loss"].detach()
        return outputs


def test_losses_outlive_the_next_pass(tmp_path):
    logs = []
    for cls in (Whole, OneBuffer):
        model = cls()
        settings = {"gradient_accumulation_steps": 2, "max_steps": 3, "average_tokens_across_devices": False}
        trainer = trained(tmp_path, "net", model=model, **settings)
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == logs[1]


# --- The hint of another r ---


@pytest.mark.parametrize(
    "gnp_r, metric, hint",
    [
        (20.0, "l2", "is too large for this model"),
        (0.05, "l2", None),
        (0.001, "l2", None),
        (None, "layer", "the default, changes little"),
    ],
)
def test_hint_of_another_r(tmp_path, monkeypatch, gnp_r, metric, hint):
    """Once, after three logs. A small r that the user chose gets none."""
    trainer = make_trainer(tmp_path, "vit", gnp_r=gnp_r, max_steps=8)
    told = []
    monkeypatch.setattr("hf_gnp.trainer.logger.warning", told.append)
    trainer.train()
    hints = [message for message in told if "gnp_cosine" in message]
    assert len(hints) == (hint is not None)
    if hint is not None:
        r = trainer.args.gnp_r
        assert f"gnp_r={r:g}" in hints[0] and hint in hints[0] and f"gnp_metric={metric}" in hints[0]
        suggested = re.search(r"Try gnp_r=([0-9.e-]+) with gnp_metric", hints[0])
        assert float(suggested[1]) < r if gnp_r else suggested is None


FAR = {"gnp_cosine": 0.2, "gnp_sharpness": 0.5, "loss": 1.0, "gnp_r": 0.1, "gnp_on": 1.0}
NEAR = FAR | {"gnp_cosine": 0.9}
SMALL, NEAR_SMALL = ({**logs, "gnp_r": 0.05} for logs in (FAR | {"gnp_cosine": 0.99}, NEAR))
IN_A_ROW = [False] * 5 + [True, False]


@pytest.mark.parametrize(
    "given, hints",
    [
        ([FAR, FAR, NEAR, FAR, FAR, FAR, FAR], IN_A_ROW),
        ([SMALL, SMALL, NEAR_SMALL, SMALL, SMALL, SMALL, SMALL], IN_A_ROW),
        ([FAR | {"gnp_cosine": 0.999, "gnp_r": 0.04}] * 4, [False] * 4),  # the default r still rises
        ([FAR | {"gnp_cosine": -1.0000001}] * 3, [False, False, True]),  # opposite gradients, rounded
    ],
)
def test_hint_needs_logs_in_a_row(given, hints):
    hint = RadiusHint(GNPArguments())
    assert [hint.after(dict(logs)) is not None for logs in given] == hints


def test_sharpness_where_a_subclass_scales_its_loss(tmp_path):
    class Scaled(Trainer):
        def training_step(self, *args, **kwargs):
            return 2 * super().training_step(*args, **kwargs)

    class Penalised(GNPMixin, Scaled): ...

    trainers = (trained(tmp_path, "net", cls) for cls in (Penalised, GNPTrainer))
    scaled, plain = (logs_of(trainer, "loss", "gnp_sharpness") for trainer in trainers)
    assert scaled["gnp_sharpness"] == plain["gnp_sharpness"]
    assert scaled["loss"] == pytest.approx([2 * loss for loss in plain["loss"]])


class OffAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        args.gnp_alpha = 0.8 if state.global_step < 2 else 0.0


def test_flos_after_the_penalty_is_switched_off(tmp_path):
    model, settings = lambda: make_model("bert"), {"max_steps": 6, "gradient_accumulation_steps": 2}
    part = trained(tmp_path, "bert", model=model(), callbacks=[OffAfter()], **settings)
    plain = trained(tmp_path, "bert", Trainer, model=model(), **settings)
    assert part.state.total_flos == pytest.approx(8 / 6 * plain.state.total_flos)
