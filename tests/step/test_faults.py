"""Faults in either pass: exceptions, losses that are not finite, gradients that are zero, overflow under fp16."""

import math
import signal
from collections import Counter
from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from runs import (
    MICRO_BATCH,
    assert_ends_at,
    assert_identical,
    generators,
    is_perturbed,
    logs_of,
    make_trainer,
    reference_run,
    run,
    trained,
    windows,
    with_loss,
    without_gnp,
)
from safetensors.torch import load_file
from tiny import Net, flat_weights
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_gnp import GNPTrainer, penalty
from hf_gnp.engines.private import optimizer_that_skips
from hf_gnp.second_pass.probe import replaced


FIRST, SECOND = 0, 1
ACCUMULATION = 3
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adamw_torch": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.0),
    "adamw_torch_fused": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.0, fused=True),  # skips by itself
}


class Fault(NamedTuple):
    """What happens to the loss of one forward: it goes through `change`, which may raise."""

    step: int
    pass_: int
    micro_batch: int
    change: Callable[[torch.Tensor], torch.Tensor]


def faulty_loss(trainer, model, inputs):
    loss = model(**inputs)["loss"]
    place = trainer.state.global_step, SECOND if is_perturbed(trainer) else FIRST
    micro_batch = trainer.count(place)
    for fault in trainer.faults:
        if fault[:3] == (*place, micro_batch):
            loss = fault.change(loss)
    return loss


def forwards(trainer: Trainer, step: int) -> int:
    """Those of the step, without the probe of a run's first penalised one."""
    first, second = (trainer.calls.get((step, pass_), 0) for pass_ in (FIRST, SECOND))
    return min(first, trainer.args.gradient_accumulation_steps) + second


class StepStarts(TrainerCallback):
    """Keeps the weights before each step."""

    def __init__(self):
        self.weights = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(flat_weights(model))


def make_faulty(tmp_path, *faults: Fault, cls=GNPTrainer, **kwargs):
    """Its losses go through `faults`; `calls` counts the forwards of each step and pass."""
    kwargs = {"gradient_accumulation_steps": ACCUMULATION, **kwargs}
    starts = StepStarts()
    trainer = make_trainer(tmp_path, "net", with_loss(cls, faulty_loss), callbacks=[starts], **kwargs)
    trainer.faults, trainer.starts = faults, starts
    calls = Counter()  # out of reach of the replay, which puts a trainer's own counters back

    def count(place: tuple[int, int]) -> int:
        calls[place] += 1
        return calls[place] - 1

    trainer.count, trainer.calls = count, MappingProxyType(calls)
    return trainer


# --- Exceptions ---


def raise_in_forward(error: BaseException) -> Callable:
    def change(loss):
        raise error

    return change


def raise_in_backward(error: BaseException) -> Callable:
    def change(loss):
        loss.register_hook(raise_in_forward(error))
        return loss

    return change


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("where", [raise_in_forward, raise_in_backward])
@pytest.mark.parametrize("micro_batch", range(ACCUMULATION))
@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), KeyboardInterrupt(), torch.OutOfMemoryError("out of memory.")]
)
def test_error_in_the_second_pass(tmp_path, error, micro_batch, where, alpha):
    model = Net(lambda: nn.BatchNorm1d(7), lambda: nn.Dropout(0.5))
    start = flat_weights(model)
    trainer = make_faulty(tmp_path, Fault(1, SECOND, micro_batch, where(error)), model=model, gnp_alpha=alpha)
    seen = []  # the generators and buffers that the first pass of the step left
    trainer.faults += (Fault(1, FIRST, ACCUMULATION - 1, lambda loss: seen.extend(after(trainer)) or loss),)
    with pytest.raises(type(error)) as raised:
        trainer.train()
    assert raised.value is error
    assert forwards(trainer, 1) == ACCUMULATION + micro_batch + 1
    assert_identical(flat_weights(model), trainer.starts.weights[1])
    assert not torch.equal(flat_weights(model), start)  # step 0 went well
    assert all(p.grad is None for p in model.parameters())
    assert_identical(after(trainer), seen)
    assert trainer.accelerator.sync_gradients


@pytest.mark.parametrize("function", ["move_", "scale_"])
def test_error_while_perturbing(tmp_path, monkeypatch, function):
    change = getattr(penalty, function)

    def change_and_fail(*args, **kwargs):
        change(*args, **kwargs)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(penalty, function, change_and_fail)
    trainer = make_faulty(tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert_identical(flat_weights(trainer.model), trainer.starts.weights[0])
    assert all(p.grad is None for p in trainer.model.parameters())


def test_perturbed_weights_are_not_saved(tmp_path):
    """As a signal handler would, that comes during the second pass; before and after it saving is as ever."""
    trainer = make_faulty(tmp_path, max_steps=2)

    def save(loss):
        trainer.save_model(tmp_path / "saved")
        return loss

    def fail_to_save(loss):
        with pytest.raises(RuntimeError, match="perturbed"):
            trainer.save_model(tmp_path / "perturbed")
        return loss

    trainer.faults = (Fault(1, FIRST, 1, save), Fault(1, SECOND, 0, fail_to_save), Fault(1, SECOND, 2, fail_to_save))
    trainer.train()
    assert not (tmp_path / "perturbed").exists()
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    weights = torch.cat([saved[name].double().flatten() for name, _ in trainer.model.named_parameters()])
    assert_identical(weights, trainer.starts.weights[1])
    trainer.save_model(tmp_path / "end")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGALRM])
def test_signal_in_the_second_pass(tmp_path, number):
    """Also where it does not wait for clean weights: SIGALRM's is that of a watchdog, which must not."""
    trainer = make_faulty(tmp_path, max_steps=4)

    def raise_signal(loss):
        signal.raise_signal(number)
        return loss

    trainer.faults = (Fault(1, SECOND, 1, raise_signal),)
    before = signal.signal(number, lambda *_: setattr(trainer.control, "should_training_stop", True))
    try:
        trainer.train()
    finally:
        signal.signal(number, before)
    assert trainer.state.global_step == 2


def after(trainer) -> list:
    return [generators(), [buffer.clone() for buffer in trainer.model.buffers()]]


@pytest.mark.parametrize(("optim", "step"), [("sgd", 0), ("sgd", 1), ("adamw_torch", 0)])
def test_auto_find_batch_size(tmp_path, optim, step):
    """It ends as a run does that starts with the smaller batch at the weights of the step that ran out of memory."""
    settings = {"optim": optim, "gradient_accumulation_steps": 2}
    errors = [RuntimeError("CUDA out of memory.")]
    fault = Fault(step, SECOND, 1, lambda loss: raise_in_forward(errors.pop())(loss) if errors else loss)
    trainer = make_faulty(tmp_path, fault, auto_find_batch_size=True, **settings)
    sizes = []
    trainer.model.register_forward_pre_hook(lambda *call: sizes.append(len(call[2]["x"])), with_kwargs=True)
    result = run(trainer)
    before = 4 * (step + 1) + 1  # and the probe
    found = sizes[before]
    assert found < MICRO_BATCH
    assert sizes == [MICRO_BATCH] * before + [found] * (len(sizes) - before)

    model = Net()
    torch.nn.utils.vector_to_parameters(trainer.starts.weights[step].float(), model.parameters())
    expected = run(make_trainer(tmp_path, "net", model=model, per_device_train_batch_size=found, **settings))
    assert len(expected["logs"]) == 48 // (2 * found)
    for name in ("weights", "optimizer", "logs"):
        assert_identical(result[name], expected[name])


# --- Losses that are not finite, gradients that are zero ---


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("pass_", [FIRST, SECOND])
@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e38])  # the last: only the norm is not finite
def test_gradient_that_is_not_finite(tmp_path, factor, pass_, optim, alpha):
    """The other steps are those of the reference loop without that window."""
    trainer = make_faulty(tmp_path, Fault(1, pass_, 1, lambda loss: loss * factor), optim=optim, gnp_alpha=alpha)
    trainer.train()
    weights = trainer.starts.weights
    assert_identical(weights[2], weights[1])
    assert not torch.equal(weights[3], weights[2])
    assert forwards(trainer, 1) == ACCUMULATION * (1 + pass_)
    assert ("gnp_sharpness" in trainer.state.log_history[1]) == (pass_ == SECOND)

    [first, _, *others] = windows("net", ACCUMULATION)
    variant = {"alpha": alpha, "optimizer": OPTIMIZERS[optim]}
    expected = reference_run("net", ACCUMULATION, steps=[first, *others], **variant)
    assert_ends_at(trainer.model, expected)


NOT_A_NUMBER = Fault(1, SECOND, 1, lambda loss: loss * math.nan)


def assert_nothing_left_to_skip(trainer: Trainer) -> None:
    optimizer = trainer.optimizer.optimizer
    assert not hasattr(optimizer, "found_inf") and not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(("logging", "step"), [({"logging_steps": 2}, 2), ({"logging_strategy": "no"}, 3)])
def test_skipped_fused_step_is_logged(tmp_path, monkeypatch, logging, step):
    told: list[str] = []
    monkeypatch.setattr("hf_gnp.trainer.logger.warning", told.append)
    trainer = make_faulty(tmp_path, NOT_A_NUMBER, optim="adamw_torch_fused", max_steps=3, **logging)
    trainer.train()
    [told_once] = [text for text in told if "not finite" in text]
    assert told_once.startswith(f"1 of the last steps, to step {step}: the gradient is not finite")
    assert_nothing_left_to_skip(trainer)


class BeforeSecondStep(TrainerCallback):
    def __init__(self, act: Callable[[torch.optim.Optimizer], None]):
        self.act = act

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 1:
            self.act(optimizer.optimizer)


def test_exception_before_a_skipped_fused_step(tmp_path):
    trainer = make_faulty(tmp_path, NOT_A_NUMBER, optim="adamw_torch_fused", max_steps=3)
    trainer.add_callback(BeforeSecondStep(raise_in_forward(ValueError("in a callback"))))
    with pytest.raises(ValueError, match="in a callback"):
        trainer.train()
    assert_nothing_left_to_skip(trainer)
    trainer.pop_callback(BeforeSecondStep)
    trainer.faults = ()
    before = flat_weights(trainer.model)
    trainer.train()  # with the same optimizer
    assert not torch.equal(flat_weights(trainer.model), before)


def test_hooks_after_a_skipped_fused_step(tmp_path):
    ran = []

    def add_hook(optimizer):
        optimizer.register_step_post_hook(lambda *_: ran.append(1))

    trainer = make_faulty(tmp_path, NOT_A_NUMBER, optim="adamw_torch_fused", max_steps=3)
    trainer.add_callback(BeforeSecondStep(add_hook))
    trainer.train()
    assert len(ran) == 2
    assert_identical(trainer.starts.weights[2], trainer.starts.weights[1])


def test_skip_flag_is_on_the_device_of_the_weights():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], fused=True)
    assert optimizer_that_skips(optimizer, torch.device("cpu")) is optimizer
    assert optimizer_that_skips(optimizer, torch.device("meta")) is None


@pytest.mark.parametrize("logging_nan_inf_filter", [True, False])
def test_log_of_a_loss_that_is_not_finite(tmp_path, logging_nan_inf_filter):
    settings = {"max_steps": 1, "logging_nan_inf_filter": logging_nan_inf_filter}
    logged = []
    for cls in (GNPTrainer, Trainer):
        trainer = make_faulty(tmp_path, Fault(0, FIRST, 1, lambda loss: loss * math.nan), cls=cls, **settings)
        trainer.train()
        logged += logs_of(trainer, "loss")["loss"]
    assert math.isnan(logged[0]) != logging_nan_inf_filter
    # Both add the same numbers in the same order.
    assert logged[0] == pytest.approx(logged[1], rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_zero_gradient_makes_a_plain_step(tmp_path, alpha):
    faults = [Fault(step, FIRST, index, lambda loss: loss * 0) for step in range(4) for index in range(ACCUMULATION)]
    settings = {"optim": "adamw_torch", "weight_decay": 0.1}
    gnp = make_faulty(tmp_path, *faults, gnp_alpha=alpha, **settings)
    result = run(gnp)
    expected = run(make_faulty(tmp_path, *faults, cls=Trainer, **settings))
    assert dict(gnp.calls) == {(step, FIRST): ACCUMULATION for step in range(4)}
    assert not torch.equal(gnp.starts.weights[0], gnp.starts.weights[1])  # the weight decay of a plain step
    result["logs"] = without_gnp(result["logs"])
    assert_identical(result, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gnp_scope": "micro_batch"},
        {"gnp_scope": "rank"},
        {"gnp_scope": "rank_micro_batch"},
        {"gnp_direction": "momentum"},
        {"gnp_alpha": 1.0, "gnp_interval": 2},
    ],
)
def test_constant_loss_makes_a_plain_step(tmp_path, settings):
    """A constant, as of a batch without pairs: of the first and the third window, and of half of the second."""
    constant = {batch["x"][0, 0].item() for (batch,) in (windows("net", 1)[index] for index in (0, 1, 3, 4, 5))}

    def sparse(trainer, model, inputs):
        if inputs["x"][0, 0].item() in constant:
            return torch.zeros((), requires_grad=True)
        return model(**inputs)["loss"]

    def train(cls):
        optim = {"optim": "sgd", "optim_args": "momentum=0.9", "gradient_accumulation_steps": 2}
        return flat_weights(trained(tmp_path, "net", with_loss(cls, sparse), gnp_r=1e-30, **optim, **settings).model)

    # The moves change nothing; the parts of a window are summed in another order.
    assert torch.allclose(train(GNPTrainer), train(Trainer), rtol=1e-6, atol=1e-8)


# --- fp16 ---


class ScalerHistory(TrainerCallback):
    """What the loss scaler did at each step."""

    def __init__(self, accelerator):
        self.accelerator, self.steps = accelerator, []

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        skipped = self.accelerator.optimizer_step_was_skipped
        self.steps.append((self.accelerator.scaler.get_scale(), skipped, lr_scheduler.get_last_lr()))


def make_fp16(tmp_path, *faults: Fault, **kwargs):
    """fp16 autocast with a loss scaler, both of which accelerate leaves out on a CPU, where torch has them."""
    trainer = make_faulty(tmp_path, *faults, fp16=True, lr_scheduler_type="linear", **kwargs)
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=2)
    history = ScalerHistory(trainer.accelerator)
    trainer.add_callback(history)
    return trainer, history


@pytest.mark.parametrize("max_grad_norm", [0, 0.5])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("pass_", [FIRST, SECOND])
def test_loss_scaler(tmp_path, pass_, alpha, max_grad_norm):
    def overflow(loss):
        return loss * 1e38  # finite in fp32, and not after scaling

    settings = {"max_grad_norm": max_grad_norm}
    gnp, history = make_fp16(tmp_path, Fault(1, pass_, 1, overflow), gnp_alpha=alpha, **settings)
    gnp.train()
    plain, expected = make_fp16(tmp_path, Fault(1, FIRST, 1, overflow), cls=Trainer, **settings)
    plain.train()
    assert [skipped for _, skipped, _ in expected.steps] == [False, True, False, False]
    assert history.steps == expected.steps
    assert forwards(gnp, 1) == ACCUMULATION * (1 + pass_)
    weights = gnp.starts.weights
    assert_identical(weights[2], weights[1])
    assert not torch.equal(weights[3], weights[2])
    assert flat_weights(gnp.model).isfinite().all()


def test_fp16_metrics_are_unscaled(tmp_path):
    trainer, _ = make_fp16(tmp_path, max_steps=1)
    trainer.train()
    exact = make_faulty(tmp_path, max_steps=1)
    exact.train()
    names = ("loss", "gnp_grad_norm", "gnp_perturbed_loss", "grad_norm")
    logs, expected = logs_of(trainer, *names), logs_of(exact, *names)
    assert logs != expected  # there was fp16 in it
    for name in names:
        # A chain of a few operations that each round to the 11 bits of fp16: 2^-11 times about 10.
        assert logs[name] == pytest.approx(expected[name], rel=5e-3), name


# contract? A context manager of its own file.
def test_ctrl_c_while_methods_are_replaced():
    class Owner:
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "second":
                raise KeyboardInterrupt

        def first(self): ...

        def second(self): ...

    owner = Owner()
    with pytest.raises(KeyboardInterrupt), replaced(owner, first=print, second=print):
        pass
    assert not vars(owner)
