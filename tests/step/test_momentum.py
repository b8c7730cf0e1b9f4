"""The perturbation along the optimizer's momentum (MSAM): its numbers, what it costs, and what it refuses."""

import collections
import functools

import pytest
import reference
import torch
from runs import (
    BASE,
    BOTH,
    MICRO_BATCH,
    assert_ends_at,
    assert_identical,
    inner,
    is_perturbed,
    logs_of,
    make_trainer,
    make_unmoved,
    msam_run,
    run,
    trained,
    window_loss,
    windows,
    with_loss,
)
from tiny import KINDS, Net, flat_weights, make_data, make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback

from hf_gnp import GNPTrainer


ADAMW = {"optim": "adamw_torch"}
OPTIMIZERS = {
    "adamw": (ADAMW, functools.partial(torch.optim.AdamW, weight_decay=0.0)),
    "sgd": ({"optim": "sgd", "optim_args": "momentum=0.9"}, functools.partial(torch.optim.SGD, momentum=0.9)),
}
MOMENTUM = {"gnp_direction": "momentum", **ADAMW}


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_momentum(tmp_path, kind, optimizer, accumulation):
    """MSAM's own formulation leaves the weights perturbed between steps. After each step, the clean ones agree."""
    arguments, make_optimizer = OPTIMIZERS[optimizer]
    data = make_data(kind, 6 * accumulation * MICRO_BATCH)
    settings = {"gradient_accumulation_steps": accumulation, "gnp_r": 0.3, **arguments}
    trainer = trained(tmp_path, kind, data=data, gnp_direction="momentum", **settings)
    expected = msam_run(kind, windows(kind, accumulation, data), 0.3, make_optimizer)
    assert_ends_at(trainer.model, expected)
    logs = logs_of(trainer, "loss", "gnp_on", "gnp_alpha", "gnp_grad_norm", "gnp_sharpness")
    assert logs["loss"] == pytest.approx([log["loss"] for log in expected[2]], rel=1e-4)
    assert logs["gnp_on"] == [0.0, *[1.0] * 5] and logs["gnp_alpha"] == [1.0] * 6
    assert logs["gnp_grad_norm"] == logs["gnp_sharpness"] == [None] * 6


def test_momentum_of_target_modules(tmp_path):
    """The perturbation of some parameters differs from that of all. One of length 0 is plain training."""
    ends = {}
    for name, arguments in {
        "all": {"gnp_r": 0.3},
        "norm": {"gnp_r": 0.3, "gnp_target_modules": "norm"},
        "none": {"gnp_r": 1e-30},
    }.items():
        trainer = trained(tmp_path, "vit", **MOMENTUM, **arguments)
        ends[name] = flat_weights(trainer.model)
    plain = trained(tmp_path, "vit", Trainer, **ADAMW)
    assert torch.equal(ends["none"], flat_weights(plain.model))
    assert not torch.equal(ends["all"], ends["norm"]) and not torch.equal(ends["norm"], ends["none"])


def counting(cls):
    class Counting(cls):
        losses = steps = 0

        def compute_loss(self, *args, **kwargs):
            self.losses += 1
            return super().compute_loss(*args, **kwargs)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.steps += 1
            return loss

    return Counting


class CountingLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.forwards += 1
        return x


@pytest.mark.parametrize("accumulation", [1, 4])
def test_momentum_counts_each_micro_batch_once(tmp_path, accumulation):
    """Counters, buffers and running statistics change once for each micro-batch, as in plain training."""
    ends = []
    for cls in BOTH:
        model = Net(lambda: torch.nn.BatchNorm1d(7), lambda: torch.nn.Dropout(0.3), CountingLayer)
        settings = {"gradient_accumulation_steps": accumulation, "learning_rate": 0.0, "max_steps": -1, **MOMENTUM}
        trainer = make_unmoved(tmp_path, inner(cls, counting), model=model, **settings)
        trainer.train()
        assert (trainer.losses, trainer.steps) == (12, 12)
        ends.append(dict(model.named_buffers()))
    plain, penalised = ends
    assert plain["layers.1.num_batches_tracked"] == penalised["layers.1.num_batches_tracked"] == 12
    assert plain["layers.3.forwards"] == penalised["layers.3.forwards"] == 12
    assert torch.allclose(plain["layers.1.running_mean"], penalised["layers.1.running_mean"], atol=1e-6)


def nan_at_moved_weights(trainer, model, inputs):
    loss = model(**inputs)["loss"]
    return loss * float("nan") if is_perturbed(trainer) else loss


@pytest.mark.parametrize("accumulation", [1, 2])
def test_momentum_skips_a_step_with_nan(tmp_path, accumulation):
    arguments = {"gradient_accumulation_steps": accumulation, "gnp_r": 0.3, **MOMENTUM}
    one_step = trained(tmp_path, "net", max_steps=1, **arguments)
    two_steps = trained(tmp_path, "net", with_loss(GNPTrainer, nan_at_moved_weights), max_steps=2, **arguments)
    assert torch.equal(flat_weights(two_steps.model), flat_weights(one_step.model))


class WeightsOutside(TrainerCallback):
    """The weights that a user sees outside of `training_step`, by step."""

    def __init__(self):
        self.seen = collections.defaultdict(list)

    def see(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step].append(flat_weights(model))

    on_step_begin = on_substep_end = on_pre_optimizer_step = see


def watched(tmp_path, cls, **kwargs):
    """A run with momentum, the weights at each forward, what `training_step` returned, and `WeightsOutside`."""
    outside, forwards, returned = WeightsOutside(), [], []

    class Watched(cls):
        def get_batch_samples(self, *args, **kwargs):
            outside.see(self.args, self.state, self.control, self.model)
            return super().get_batch_samples(*args, **kwargs)

        def _prepare_inputs(self, inputs):
            outside.see(self.args, self.state, self.control, self.model)
            return super()._prepare_inputs(inputs)

        def training_step(self, *args, **kwargs):
            outside.see(self.args, self.state, self.control, self.model)
            loss = super().training_step(*args, **kwargs)
            returned.append(loss.item())
            outside.see(self.args, self.state, self.control, self.model)
            return loss

    model = Net()
    model.register_forward_pre_hook(lambda *_: forwards.append(flat_weights(model)))
    settings = {"gnp_r": 0.3, "max_steps": 4, "num_train_epochs": 2, "callbacks": [outside], **MOMENTUM, **kwargs}
    trainer = make_trainer(tmp_path, "net", Watched, model=model, **settings)
    return trainer, outside, forwards, returned


@pytest.mark.parametrize("accumulation", [1, 3])
def test_momentum_shows_clean_weights(tmp_path, accumulation):
    """On one process, in callbacks, between micro-batches, and where trainers generate: only forwards are moved."""
    trainer, outside, forwards, _ = watched(tmp_path, GNPTrainer, gradient_accumulation_steps=accumulation)
    trainer.train()
    for step in range(4):
        theta, *others = outside.seen[step]
        # The first are those at the end of the step before, where the samples are fetched.
        assert len(others) >= 2 * accumulation + accumulation
        assert all(torch.equal(other, theta) for other in others)
        for weights in forwards[step * accumulation : (step + 1) * accumulation]:
            # The first step has no momentum. The sums of squares are of few numbers, in fp32.
            assert (weights - theta).norm().item() == pytest.approx(0.3 if step else 0.0, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_momentum_returns_the_loss_of_moved_weights(tmp_path, accumulation):
    trainer, _, forwards, returned = watched(tmp_path, GNPTrainer, gradient_accumulation_steps=accumulation)
    trainer.train()
    model, losses = Net(), []
    batches = [batch for window in windows("net", 1)[: 4 * accumulation] for batch in window]
    for weights, batch in zip(forwards, batches, strict=True):
        torch.nn.utils.vector_to_parameters(weights.float(), model.parameters())
        losses.append(model(**batch)["loss"].item() / accumulation)
    assert returned == pytest.approx(losses, rel=1e-6)
    sums = [sum(losses[start : start + accumulation]) for start in range(0, len(losses), accumulation)]
    assert logs_of(trainer, "loss")["loss"] == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward", "after the step"])
@pytest.mark.parametrize("micro_batch, accumulation", [(0, 1), (0, 2), (1, 2)])
def test_momentum_leaves_clean_weights_after_an_exception(tmp_path, micro_batch, accumulation, where, error):
    """Bit for bit those that the step began with."""
    calls = []

    def fail(*_):
        if trainer.state.global_step == 2:
            calls.append(is_perturbed(trainer))
            if len(calls) == micro_batch + 1:
                raise error("injected")

    class Fails(GNPTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if where == "forward":
                fail()
            elif where == "backward":
                loss.register_hook(fail)
            return loss

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if where == "after the step":
                fail()
            return loss

    trainer, outside, _, _ = watched(tmp_path, Fails, gradient_accumulation_steps=accumulation)
    with pytest.raises(error, match="injected"):
        trainer.train()
    assert calls[-1] == (where != "after the step")
    assert torch.equal(flat_weights(trainer.model), outside.seen[2][0]) and not is_perturbed(trainer)
    if where != "after the step":
        assert all(parameter.grad is None for parameter in trainer.model.parameters())


class NewOptimizer(TrainerCallback):
    """Makes the optimizer anew in the middle of training, as restarts do."""

    def __init__(self, at: int):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            trainer = self.trainer
            made = torch.optim.AdamW(trainer.model.parameters(), lr=args.learning_rate, weight_decay=0.0)
            trainer.optimizer = trainer.accelerator.prepare(made)
            trainer.callback_handler.optimizer = trainer.optimizer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_momentum_of_an_optimizer_made_anew(tmp_path, accumulation):
    """The weights move along the momentum of the one that steps, which has none in its first step."""
    callback = NewOptimizer(3)
    data = make_data("net", 6 * accumulation * MICRO_BATCH)
    settings = {"gradient_accumulation_steps": accumulation, "gnp_r": 0.3, "callbacks": [callback], **MOMENTUM}
    trainer = make_trainer(tmp_path, "net", data=data, **settings)
    callback.trainer = trainer
    trainer.train()
    model, steps, losses = Net(), windows("net", accumulation, data), []
    start = flat_weights(model)
    for part in (steps[:3], steps[3:]):
        optimizer = torch.optim.AdamW(model.parameters(), lr=BASE["learning_rate"], weight_decay=0.0)
        losses += reference.train_msam(model, optimizer, part, window_loss, 0.3, BASE["max_grad_norm"])
    assert_ends_at(trainer.model, (start, flat_weights(model), None))
    logs = logs_of(trainer, "loss", "gnp_on")
    assert logs["loss"] == pytest.approx(losses, rel=1e-4) and logs["gnp_on"] == [0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_momentum_costs_no_flops(tmp_path, kind):
    """There is no probe either: no clean first pass could be repeated."""

    def flops(cls) -> tuple[int, float]:
        settings = {"max_steps": 4, "gradient_accumulation_steps": 4, "num_train_epochs": 2}
        trainer = make_trainer(tmp_path, kind, cls, **settings, **MOMENTUM)
        with FlopCounterMode(display=False) as counter:
            trainer.train()
        return counter.get_total_flops(), trainer.state.total_flos

    assert flops(GNPTrainer) == flops(Trainer)


def test_momentum_resumes_exactly(tmp_path):
    def make(folder: str, **arguments):
        model = make_model("bert", dropout=0.1)
        plan = {"max_steps": 6, "gradient_accumulation_steps": 2, "num_train_epochs": 2, **MOMENTUM}
        return make_trainer(tmp_path / folder, "bert", model=model, **plan, **arguments)

    expected = run(make("whole", save_strategy="steps", save_steps=1))
    for step in (1, 3, 4):
        result = run(make("resumed"), resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_identical(result, expected, f"from step {step}")


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "rmsprop", "adamw_8bit", None])
def test_optimizer_without_momentum_is_refused(tmp_path, optim):
    name, settings = f"optim={optim}", {"optim": optim}
    if optim is None:
        name, settings = "SGD", {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
    with pytest.raises(ValueError, match=f"gnp_direction=momentum .*{name}"):
        make_trainer(tmp_path, "vit", gnp_direction="momentum", **settings)


def test_own_optimizer_without_momentum_is_refused(tmp_path):
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
