"""
What hf_gnp relies on in transformers and accelerate without their promising it. A release that changes it fails here,
with a message that says what broke, before it shows as a wrong number elsewhere.
"""

import inspect

import pytest
import torch
from runs import make_trainer
from safetensors.torch import load_file
from tiny import make_data, make_model
from transformers import Trainer


class Order(Trainer):
    """Notes the order of what happens between backward and the optimizer step."""

    def note(self, name, result):
        self.events.append(name)
        return result

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.events.append(("step", self.accelerator.sync_gradients, self.current_gradient_accumulation_steps))
        return super().training_step(model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model):
        return self.note("clip", super()._clip_grad_norm(model))

    def _get_grad_norm(self, model, grad_norm=None):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.norms.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item())
        result = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.results.append(float(result))
        return self.note("norm", result)


def run_in_order(tmp_path, **kwargs) -> Order:
    trainer = make_trainer(tmp_path, "vit", Order, **kwargs)
    trainer.events, trainer.norms, trainer.results = [], [], []
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: trainer.events.append("optimizer"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("max_grad_norm", [0, 1e-2])
def test_order_of_clipping_and_grad_norm(tmp_path, max_grad_norm):
    trainer = run_in_order(tmp_path, max_steps=2, max_grad_norm=max_grad_norm)
    clip = ["clip"] if max_grad_norm else []
    expected = [("step", True, 1), *clip, "norm", "optimizer"] * 2
    assert trainer.events == expected, (
        "GNPMixin._get_grad_norm drops a gradient that is not finite: Trainer must call _get_grad_norm once a step, "
        "after _clip_grad_norm and before optimizer.step()."
    )
    if max_grad_norm:
        assert trainer.norms == pytest.approx([max_grad_norm] * 2, rel=1e-3), "the gradient is clipped by then"
        assert min(trainer.results) > 10 * max_grad_norm, "the norm passed on is that before clipping"
    else:
        assert trainer.results == pytest.approx(trainer.norms, rel=1e-5), "without clipping it is the gradient's norm"


def test_training_step_knows_its_window(tmp_path):
    """At `training_step` the flag tells the window's last micro-batch, and the attribute the window's length."""
    trainer = run_in_order(tmp_path, data=make_data("vit", 20), gradient_accumulation_steps=3, max_grad_norm=0)
    full = [("step", False, 3), ("step", False, 3), ("step", True, 3)]
    ragged = [("step", False, 2), ("step", True, 2)]
    assert trainer.events == [*full, "norm", "optimizer", *ragged, "norm", "optimizer"], (
        "GNPMixin.training_step ends a window where accelerator.sync_gradients is set, and replays a micro-batch "
        "under its current_gradient_accumulation_steps."
    )


def test_training_step_divides_by_the_attribute(tmp_path):
    trainer = make_trainer(tmp_path, "vit", Trainer)
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    losses = []
    for trainer.current_gradient_accumulation_steps in (1, 4):
        losses.append(trainer.training_step(trainer.model, batch).item())
    assert losses[0] == 4 * losses[1], "a replay sets current_gradient_accumulation_steps for the division of the loss"


SIGNATURES = {
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "_get_grad_norm": ("self", "model", "grad_norm"),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_load_best_model": ("self",),
    "_issue_warnings_after_load": ("self", "load_result"),
    "floating_point_ops": ("self", "inputs"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    method = getattr(Trainer, name, None)
    assert method is not None, f"hf_gnp overrides or calls Trainer.{name}, which is gone"
    parameters = tuple(inspect.signature(method).parameters)
    assert parameters == SIGNATURES[name], f"hf_gnp overrides or calls Trainer.{name}, whose parameters are now others"


class Loaded(Trainer):
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.calls.append(("checkpoint", resume_from_checkpoint, self.state.global_step))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        self.calls.append(("best", self.state.best_model_checkpoint))
        super()._load_best_model()


def test_overridden_load_methods(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"eval_dataset": make_data("bert", 8), "load_best_model_at_end": True}
    checkpoint = str(tmp_path / "checkpoint-1")
    make_trainer(tmp_path, "bert", Trainer, max_steps=1, **settings, **best).train()
    trainer = make_trainer(tmp_path, "bert", Loaded, max_steps=2, **settings, **best)
    trainer.calls = []
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.calls == [("checkpoint", checkpoint, 0), ("best", trainer.state.best_model_checkpoint)], (
        "hf_gnp loads renamed keys in _load_from_checkpoint and _load_best_model"
    )


def load_saved(model, folder):
    model.save_pretrained(folder)
    return set(load_file(folder / "model.safetensors"))


def test_stock_loads_renamed_weights_in_part(tmp_path):
    saved = load_saved(make_model("vit"), tmp_path)
    model = make_model("vit")
    assert not saved <= model.state_dict().keys()
    torch.nn.init.normal_(weight := model.vit.layers[0].attention.q_proj.weight)
    before = weight.detach().clone()
    make_trainer(tmp_path / "out", "vit", Trainer, model=model)._load_from_checkpoint(str(tmp_path))
    assert torch.equal(weight, before), "Trainer converts now: checkpoint.load_renamed is needed for older ones only"
