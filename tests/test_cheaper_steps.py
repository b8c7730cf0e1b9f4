"""Penalised steps that cost less than two: a part of the step's examples, the momentum, a penalty that is reused."""

import functools
from pathlib import Path

import pytest
import reference
import torch
from runs import (
    BASE,
    MICRO_BATCH,
    WEIGHTS_TOLERANCE,
    ascent_from,
    assert_identical,
    logs_of,
    make_args,
    make_trainer,
    reference_run,
    run,
    window_loss,
    windows,
)
from tiny import KINDS, Net, flat_weights, make_data, make_model, relative_distance
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer

from hf_gnp import GNPMixin, GNPTrainer, GNPTrainingArguments
from hf_gnp.replay.window import first_rows


ADAMW = {"optim": "adamw_torch"}
SGD = {"optim": "sgd", "optim_args": "momentum=0.9"}
OPTIMIZERS = {
    "adamw": (ADAMW, functools.partial(torch.optim.AdamW, weight_decay=0.0)),
    "sgd": (SGD, functools.partial(torch.optim.SGD, momentum=0.9)),
}
# The last window is incomplete, and so is its last micro-batch.
RAGGED = 9 * MICRO_BATCH + 2


# --- a part of the examples ---


@pytest.mark.parametrize("accumulation, fraction", [(2, 0.5), (4, 0.25), (4, 0.6), (3, 0.01)])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_fraction(tmp_path, kind, alpha, accumulation, fraction):
    data = make_data(kind, RAGGED)
    settings = {"gradient_accumulation_steps": accumulation, "gnp_alpha": alpha, "gnp_r": 0.1}
    trainer = make_trainer(tmp_path, kind, data=data, gnp_ascent_fraction=fraction, **settings)
    trainer.train()
    steps = windows(kind, accumulation, data)
    ascent = ascent_from(fraction)
    start, expected, logs = reference_run(kind, accumulation, r=0.1, alpha=alpha, steps=steps, ascent=ascent)
    assert relative_distance(flat_weights(trainer.model), expected, start) < WEIGHTS_TOLERANCE
    for name in ("loss", "gnp_grad_norm", "gnp_perturbed_loss"):
        assert logs_of(trainer, name)[name] == pytest.approx([log[name] for log in logs], rel=1e-5), name
    _, whole, _ = reference_run(kind, accumulation, r=0.1, alpha=alpha, steps=steps)
    assert relative_distance(whole, expected, start) > 10 * WEIGHTS_TOLERANCE  # else the test would not tell


@pytest.mark.parametrize("kind", KINDS)
def test_fraction_of_one_micro_batch_is_its_first_rows(tmp_path, kind):
    data = make_data(kind, RAGGED)
    trainer = make_trainer(tmp_path, kind, data=data, gnp_ascent_fraction=0.3, gnp_r=0.1)
    trainer.train()
    steps = windows(kind, 1, data)
    start, expected, logs = reference_run(kind, 1, r=0.1, steps=steps, ascent=ascent_from(0.3, rows=True))
    assert relative_distance(flat_weights(trainer.model), expected, start) < WEIGHTS_TOLERANCE
    for name in ("loss", "gnp_grad_norm", "gnp_perturbed_loss"):
        assert logs_of(trainer, name)[name] == pytest.approx([log[name] for log in logs], rel=1e-5), name
    assert logs_of(trainer, "gnp_sharpness")["gnp_sharpness"] == [None] * len(steps)  # of no one set of examples


@pytest.mark.parametrize("accumulation", [1, 4])
def test_fraction_of_one_is_the_whole(tmp_path, accumulation):
    """Also if it comes to the whole by being rounded up."""
    settings = {"gradient_accumulation_steps": accumulation, **ADAMW}
    make = functools.partial(make_model, "bert", dropout=0.2)
    ends = [
        run(make_trainer(tmp_path, "bert", model=make(), gnp_ascent_fraction=fraction, **settings))
        for fraction in (1.0, 1 - 1e-6)
    ]
    if accumulation == 1:  # of rows, whichever they are, there is no sharpness
        for entry in (*ends[0].pop("logs"), *ends[1]["logs"]):
            entry.pop("gnp_sharpness", None)
        assert ends[1].pop("logs")
    assert_identical(*ends)


def test_rows_where_there_are_none(tmp_path):
    inputs = {"pixel_values": torch.zeros(4, 3), "image_grid": torch.zeros(2, 3), "return_loss": True}
    with pytest.raises(ValueError, match=r"gnp_ascent_fraction .*found 2, 4.*gradient_accumulation_steps"):
        first_rows(inputs, lambda rows: 1)
    with pytest.raises(ValueError, match="gnp_ascent_fraction"):
        first_rows({"x": torch.zeros(4), "scale": torch.tensor(1.0)}, lambda rows: 1)
    part = first_rows({"x": torch.arange(4), "texts": list("abcd"), "use_cache": False}, lambda rows: 3)
    assert part["x"].tolist() == [0, 1, 2] and part["texts"] == ["a", "b", "c"] and part["use_cache"] is False


class CountingStep(Trainer):
    """Counts in its own state, before and after what `Trainer` does."""

    losses = steps = 0

    def compute_loss(self, *args, **kwargs):
        self.losses += 1
        return super().compute_loss(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.steps += 1
        return loss


class GNPCountingStep(GNPMixin, CountingStep):
    pass


class CountingLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.forwards += 1
        return x


@pytest.mark.parametrize("settings", [{"gnp_ascent_fraction": 0.5}, {"gnp_direction": "momentum", **ADAMW}])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_each_micro_batch_leaves_its_traces_once(tmp_path, settings, accumulation):
    """Counters, buffers and running statistics are moved once for each micro-batch, as in plain training."""
    ends = {}
    for name, cls, arguments in (("plain", CountingStep, {}), ("gnp", GNPCountingStep, {"gnp_r": 1e-30, **settings})):
        model = Net(lambda: torch.nn.BatchNorm1d(7), lambda: torch.nn.Dropout(0.3), CountingLayer)
        optim = {"optim": settings.get("optim", "sgd"), "learning_rate": 0.0}
        trainer = make_trainer(
            tmp_path, "net", cls, model=model, gradient_accumulation_steps=accumulation, **(optim | arguments)
        )
        trainer.train()
        ends[name] = trainer
    assert (ends["gnp"].losses, ends["gnp"].steps) == (ends["plain"].losses, ends["plain"].steps) == (12, 12)
    plain, penalised = (dict(ends[name].model.named_buffers()) for name in ends)
    assert plain["layers.1.num_batches_tracked"] == penalised["layers.1.num_batches_tracked"] == 12
    assert plain["layers.3.forwards"] == penalised["layers.3.forwards"] == 12
    assert torch.allclose(plain["layers.1.running_mean"], penalised["layers.1.running_mean"], atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_first_part_without_labels_gives_a_plain_step(tmp_path, accumulation):
    """Its gradient is 0: it says neither where to move, nor anything of the step's gradient."""
    data = make_data("llama", 8 * accumulation)
    for index, sample in enumerate(data):
        if index % (4 * accumulation) < 2 * accumulation:
            sample["labels"] = torch.full_like(sample["labels"], -100)
    settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.0}
    ends = []
    for cls, arguments in ((Trainer, {}), (GNPTrainer, {"gnp_ascent_fraction": 0.5, "gnp_alpha": 0.5})):
        trainer = make_trainer(tmp_path, "llama", cls, data=data, **settings, **arguments)
        trainer.train()
        ends.append(flat_weights(trainer.model))
    assert relative_distance(ends[1], ends[0], flat_weights(make_model("llama"))) < WEIGHTS_TOLERANCE
    assert logs_of(trainer, "gnp_on")["gnp_on"] == [0.0, 0.0]


class MeanOfMicroBatches(GNPTrainer):
    """A loss that is a mean over the labels of each micro-batch by itself, and says so."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=None)


@pytest.mark.skipif(not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="transformers 5.17 does not ask for it")
def test_a_loss_that_does_not_count_labels_is_scaled_by_micro_batches(tmp_path):
    data = make_data("llama", 16)
    for sample in data[:4]:
        sample["labels"][:-1] = -100  # a label each in the first micro-batch
    trainer = make_trainer(
        tmp_path, "llama", MeanOfMicroBatches, data=data, gradient_accumulation_steps=2, gnp_ascent_fraction=0.5
    )
    trainer.train()
    steps = windows("llama", 2, data)

    def loss(model, window):
        return sum(window_loss(model, [batch]) for batch in window) / len(window)

    start, expected, logs = reference_run("llama", 2, steps=steps, loss=loss, ascent=lambda window: (window[:1], 1.0))
    assert relative_distance(flat_weights(trainer.model), expected, start) < WEIGHTS_TOLERANCE
    assert logs_of(trainer, "loss")["loss"] == pytest.approx([log["loss"] for log in logs], rel=1e-5)


def test_alpha_goes_with_the_direction_unless_it_was_set(tmp_path):
    args = make_args(tmp_path)
    args.gnp_direction = "momentum"  # as a hyperparameter search does
    args.check_gnp_values()
    assert args.gnp_alpha == 1.0
    args.gnp_direction = "gradient"
    args.check_gnp_values()
    assert args.gnp_alpha == 0.8
    args.gnp_direction, args.gnp_alpha = "momentum", 0.7
    with pytest.raises(ValueError, match=r"gnp_direction=momentum .*gnp_alpha is 1 .*0\.7"):
        args.check_gnp_values()


class Failing(GNPTrainer):
    """Spoils the loss at moved weights, in the second step."""

    fault: str

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        is_moved = self._gnp_run is not None and self._gnp_run.is_perturbed
        if self.state.global_step == 1 and is_moved:
            if self.fault == "raise":
                raise RuntimeError("injected")
            loss = loss * float(self.fault)
        return loss


@pytest.mark.parametrize(
    "settings", [{"gnp_ascent_fraction": 0.5}, {"gnp_direction": "momentum"}, {"gnp_reuse": True, "gnp_interval": 2}]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_faults_at_moved_weights_leave_no_trace(tmp_path, settings, accumulation):
    """An exception leaves the weights of the start of the step; of a NaN, the step is skipped."""
    arguments = {"gradient_accumulation_steps": accumulation, "gnp_r": 0.3, **ADAMW, **settings}
    one_step = make_trainer(tmp_path, "vit", max_steps=1, **arguments)
    one_step.train()
    trainer = make_trainer(tmp_path, "vit", Failing, max_steps=3, **arguments)
    trainer.fault = "raise"
    with pytest.raises(RuntimeError, match="injected"):
        trainer.train()
    assert torch.equal(flat_weights(trainer.model), flat_weights(one_step.model))
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer = make_trainer(tmp_path, "vit", Failing, max_steps=2, **arguments)
    trainer.fault = "nan"
    trainer.train()
    assert torch.equal(flat_weights(trainer.model), flat_weights(one_step.model))


# --- momentum ---


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_momentum(tmp_path, kind, optimizer, accumulation):
    """MSAM's own formulation leaves the weights moved between steps: after each, the clean ones are the same."""
    arguments, make_optimizer = OPTIMIZERS[optimizer]
    data = make_data(kind, 6 * accumulation * MICRO_BATCH)
    settings = {"gradient_accumulation_steps": accumulation, "gnp_r": 0.3, **arguments}
    trainer = make_trainer(tmp_path, kind, data=data, gnp_direction="momentum", **settings)
    trainer.train()
    model = make_model(kind).train()
    start = flat_weights(model)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], lr=BASE["learning_rate"])
    steps = windows(kind, accumulation, data)
    losses = reference.train_msam(model, optimizer, steps, window_loss, r=0.3, max_norm=BASE["max_grad_norm"])
    assert relative_distance(flat_weights(trainer.model), flat_weights(model), start) < WEIGHTS_TOLERANCE
    assert logs_of(trainer, "loss")["loss"] == pytest.approx(losses, rel=1e-4)
    logs = logs_of(trainer, "gnp_on", "gnp_alpha", "gnp_grad_norm", "gnp_sharpness", "gnp_fidelity")
    assert logs["gnp_on"] == [0.0, *[1.0] * 5] and logs["gnp_alpha"] == [1.0] * 6
    assert logs["gnp_grad_norm"] == logs["gnp_sharpness"] == [None] * 6


def test_momentum_of_some_parameters(tmp_path):
    """At r → 0 plain training; with a target, only what is moved matters."""
    settings = {"gnp_direction": "momentum", **ADAMW}
    ends = {}
    for name, arguments in {
        "all": {"gnp_r": 0.3},
        "norm": {"gnp_r": 0.3, "gnp_target_modules": "norm"},
        "none": {"gnp_r": 1e-30},
    }.items():
        trainer = make_trainer(tmp_path, "vit", **settings, **arguments)
        trainer.train()
        ends[name] = flat_weights(trainer.model)
    plain = make_trainer(tmp_path, "vit", Trainer, **ADAMW)
    plain.train()
    assert torch.equal(ends["none"], flat_weights(plain.model))
    assert not torch.equal(ends["all"], ends["norm"]) and not torch.equal(ends["norm"], ends["none"])


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"optim": "sgd"}, "optim=sgd"),
        ({"optim": "adafactor"}, "optim=adafactor"),
        ({"optim": "rmsprop"}, "optim=rmsprop"),
        ({"optim": "adamw_8bit"}, "optim=adamw_8bit"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}, "SGD"),
    ],
)
def test_optimizers_without_momentum_are_refused_by_name(tmp_path, settings, name):
    with pytest.raises(ValueError, match=f"gnp_direction=momentum .*{name}"):
        make_trainer(tmp_path, "vit", gnp_direction="momentum", **settings)
    with pytest.raises(ValueError, match=f"gnp_precondition .*{name}"):
        make_trainer(tmp_path, "vit", gnp_precondition=True, **settings)


def test_an_optimizer_at_hand_is_refused_too(tmp_path):
    model = make_model("vit")
    for optimizer, accepted in (
        (torch.optim.SGD(model.parameters(), lr=0.1), False),
        (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), True),
        (torch.optim.NAdam(model.parameters()), True),
        (torch.optim.Adagrad(model.parameters()), False),
    ):
        make = functools.partial(make_trainer, tmp_path, "vit", model=model, optimizers=(optimizer, None))
        if accepted:
            make(gnp_direction="momentum").train()
        else:
            with pytest.raises(ValueError, match=f"gnp_direction=momentum .*{type(optimizer).__name__}"):
                make(gnp_direction="momentum")


# --- a penalty that is reused ---


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_reuse(tmp_path, kind, alpha, accumulation):
    data = make_data(kind, 7 * accumulation * MICRO_BATCH)
    settings = {"gradient_accumulation_steps": accumulation, "gnp_alpha": alpha, "gnp_r": 0.1, "gnp_interval": 3}
    trainer = make_trainer(tmp_path, kind, data=data, gnp_reuse=True, **settings)
    trainer.train()
    model = make_model(kind).train()
    start = flat_weights(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=BASE["learning_rate"])
    steps = windows(kind, accumulation, data)
    arguments = {"r": 0.1, "alpha": alpha, "interval": 3, "max_norm": BASE["max_grad_norm"]}
    losses = reference.train_looksam(model, optimizer, steps, window_loss, **arguments)
    assert relative_distance(flat_weights(trainer.model), flat_weights(model), start) < WEIGHTS_TOLERANCE
    assert logs_of(trainer, "loss")["loss"] == pytest.approx(losses, rel=1e-4)
    assert logs_of(trainer, "gnp_on")["gnp_on"] == [0, 0, 1, 0, 0, 1, 0]


def test_reuse_ends_with_the_penalty(tmp_path):
    trainer = make_trainer(tmp_path, "vit", gnp_reuse=True, gnp_interval=2, gnp_alpha=1.0, max_steps=6, gnp_end=0.5)
    trainer.train()
    model = make_model("vit").train()
    start, steps = flat_weights(model), windows("vit", 1)[:6]
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE["learning_rate"])
    max_norm = BASE["max_grad_norm"]
    reference.train_looksam(model, optimizer, steps[:3], window_loss, r=0.05, alpha=1.0, interval=2, max_norm=max_norm)
    reference.train(model, optimizer, steps[3:], window_loss, lambda step: (0.05, 0.0), max_norm)
    assert relative_distance(flat_weights(trainer.model), flat_weights(model), start) < WEIGHTS_TOLERANCE


# --- what they cost ---


@pytest.mark.parametrize(
    "settings, factor",
    [
        ({"gnp_ascent_fraction": 0.25}, 1.25),
        ({"gnp_ascent_fraction": 0.5}, 1.5),
        ({"gnp_direction": "momentum", **ADAMW}, 1.0),
        ({"gnp_interval": 2, "gnp_reuse": True}, 1.5),
        ({"gnp_interval": 4, "gnp_reuse": True}, 1.25),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_flops(tmp_path, kind, settings, factor):
    def flops(cls, **arguments) -> tuple[int, float]:
        trainer = make_trainer(tmp_path, kind, cls, max_steps=4, gradient_accumulation_steps=4, **arguments)
        with FlopCounterMode(display=False) as counter:
            trainer.train()
        return counter.get_total_flops(), trainer.state.total_flos

    make_data(kind)
    plain, plain_flos = flops(Trainer, num_train_epochs=2)
    penalised, flos = flops(GNPTrainer, num_train_epochs=2, **settings)
    probes = penalised - factor * plain
    # The probe is one forward of one micro-batch, a third of its FLOPs; there is none without a clean first pass.
    assert probes == (0 if factor == 1 else pytest.approx(plain / 16 / 3, rel=0.05))
    assert flos == factor * plain_flos  # what `Trainer` reports


# --- resuming ---


@pytest.mark.parametrize(
    "settings",
    [
        {"gnp_ascent_fraction": 0.5},
        {"gnp_direction": "momentum"},
        {"gnp_interval": 3, "gnp_reuse": True},
        {"gnp_precondition": True, "gnp_r": 0.01},
    ],
    ids=str,
)
def test_resumed_run_is_the_run_that_never_stopped(tmp_path, settings):
    def make(folder: str, **arguments):
        model = make_model("bert", dropout=0.1)
        plan = {"max_steps": 6, "gradient_accumulation_steps": 2, "num_train_epochs": 2, **ADAMW}
        return make_trainer(tmp_path / folder, "bert", model=model, **(plan | settings | arguments))

    expected = run(make("whole", save_strategy="steps", save_steps=1))
    for step in (1, 3, 4):
        result = run(make("resumed"), resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_identical(result, expected, f"from step {step}")


@pytest.mark.parametrize("should_save", [True, False])
def test_reuse_is_saved_where_trainer_saves(tmp_path, monkeypatch, should_save):
    """With `save_on_each_node` that is a process of each node."""
    monkeypatch.setattr(GNPTrainingArguments, "should_save", should_save)
    settings = {"gnp_interval": 2, "gnp_reuse": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, "vit", **settings).train()
    assert Path(tmp_path, "checkpoint-1", "gnp_reuse.pt").exists() == should_save


def test_reuse_resumes_without_its_file_by_a_penalised_step(tmp_path):
    """As a run does that goes on with another number of ranks."""
    settings = {"gnp_interval": 3, "gnp_reuse": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, "vit", **settings).train()
    (file,) = Path(tmp_path, "checkpoint-4").glob("gnp_reuse*")
    file.unlink()
    trainer = make_trainer(tmp_path, "vit", **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logs_of(trainer, "gnp_on")["gnp_on"] == [0, 0, 1, 0, 1, 1]
