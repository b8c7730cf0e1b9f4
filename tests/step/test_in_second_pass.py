"""`trainer.in_second_pass`: what users guard by it happens once."""

import pytest
import torch
from runs import MICRO_BATCH, make_trainer, make_unmoved, trained, with_loss
from tiny import Net, collate, make_data
from transformers import Trainer, TrainerCallback

from hf_gnp import GNPMixin, GNPTrainer


class Sees(Trainer):
    """Notes the flag in everything that it does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        SEEN.clear()
        self.note("init")

    def note(self, where):
        SEEN.setdefault(where, []).append(self.in_second_pass)

    def training_step(self, *args, **kwargs):
        self.note("step")
        loss = super().training_step(*args, **kwargs)
        self.note("step")
        return loss

    def compute_loss(self, *args, **kwargs):
        self.note("loss")
        return super().compute_loss(*args, **kwargs)

    def log(self, *args, **kwargs):
        self.note("log")
        super().log(*args, **kwargs)


SEEN: dict[str, list[bool]] = {}  # not in an attribute, which would be put back


class SeesFirst(GNPMixin, Sees): ...


class SeesLast(Sees, GNPTrainer): ...


class SeesInCallbacks(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        self.trainer.note("callback")

    on_substep_end = on_pre_optimizer_step = on_step_end = on_evaluate = on_train_end = on_step_begin


@pytest.mark.parametrize("cls", [SeesFirst, SeesLast])
def test_in_second_pass(tmp_path, cls):
    callback = SeesInCallbacks()
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": make_data("net", 4), "callbacks": [callback]}
    trainer = make_unmoved(tmp_path, cls, max_steps=2, **options)
    callback.trainer = trainer
    trainer.train()
    evaluated = [False]  # after each step
    # The second pass of the first step comes after the probe's forward.
    assert SEEN["loss"] == [False, False, True, True, True, *evaluated, False, False, True, True, *evaluated]
    assert {where: set(flags) for where, flags in SEEN.items() if where != "loss"} == {
        where: {False} for where in ("init", "step", "log", "callback")
    }
    assert trainer.in_second_pass is False


@pytest.mark.parametrize("options", [{"gnp_alpha": 0.0}, {"gnp_direction": "momentum", "optim": "adamw_torch"}])
def test_in_second_pass_where_there_is_none(tmp_path, options):
    trainer = trained(tmp_path, "net", SeesLast, max_steps=3, **options)
    assert SEEN["loss"] == [False] * 3 and not trainer.in_second_pass


@pytest.mark.parametrize("cls", [SeesFirst, SeesLast])
def test_in_second_pass_outside_of_train(tmp_path, cls):
    trainer = make_trainer(tmp_path, "net", cls)
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, collate(make_data("net", MICRO_BATCH)))
    trainer.evaluate(make_data("net", 4))
    assert SEEN["loss"] == [False, False] and not trainer.in_second_pass


@pytest.mark.parametrize("pass_", ["first", "probe", "second", "backward"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_in_second_pass_after_a_swallowed_exception(tmp_path, order, pass_):
    """In the forward, or in the backward of the second pass: afterwards the flag is as in a new run."""
    fail_at = {"first": 1, "probe": 2, "second": 3, "backward": 3}[pass_]
    flags = []

    def fail(gradient=None):
        raise torch.OutOfMemoryError("injected")

    class Failing(Net):
        def forward(self, x, labels):
            outputs = super().forward(x, labels)
            flags.append(trainer.in_second_pass)
            if len(flags) == fail_at and pass_ == "backward":
                outputs["logits"].register_hook(fail)
            elif len(flags) == fail_at:
                fail()
            return outputs

    def swallowing(cls):
        class Swallows(cls):
            def training_step(self, *args, **kwargs):
                try:
                    return super().training_step(*args, **kwargs)
                except torch.OutOfMemoryError:
                    swallowed.append(self.in_second_pass)
                    return torch.zeros(())

        return Swallows

    swallowed = []
    if order == "after":
        cls = swallowing(GNPTrainer)
    else:
        cls = type("Mixed", (GNPMixin, swallowing(Trainer)), {})
        if pass_ != "first":  # such a trainer sees the first pass alone
            cls = swallowing(cls)
    trainer = make_trainer(tmp_path, "net", cls, model=Failing(), max_steps=3)
    trainer.train()
    assert swallowed == [False] and not trainer.in_second_pass
    # The failed step ends there. The probe is made once, unless it failed with its step.
    rest = {
        "first": [False, False, True, True, False, True],
        "probe": [False, True, False, True, False, True],
        "second": [False, True, True, False, True, False, True],
        "backward": [False, True, True, False, True, False, True],
    }[pass_]
    assert flags == rest


COUNT = {"guarded": 0, "all": 0}  # in a global, which is not put back


@pytest.mark.parametrize("base", [lambda cls: cls, lambda cls: type("Mixed", (GNPMixin, cls), {})])
def test_guarded_counter_counts_once(tmp_path, base):
    def counting(trainer, model, inputs):
        COUNT["all"] += 1
        COUNT["guarded"] += not getattr(trainer, "in_second_pass", False)
        return model(**inputs)["loss"]

    COUNT.update(guarded=0, all=0)
    cls = base(with_loss(Trainer, counting))
    make_unmoved(tmp_path, cls).train()
    assert list(COUNT.values()) == [6, 13 if issubclass(cls, GNPMixin) else 6]
