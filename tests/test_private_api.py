"""
What hf_gnp relies on in transformers and accelerate without their promising it. A release that changes it fails here,
with a message that says what broke, before it shows as a wrong number elsewhere.
"""

import inspect

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from runs import make_trainer
from safetensors.torch import load_file
from tiny import make_data, make_model
from transformers import Trainer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.trainer_callback import ExportableState, TrainerState


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
def test_grad_norm_is_taken_between_clipping_and_the_optimizer_step(tmp_path, max_grad_norm):
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


def test_gradient_state_has_a_setter():
    accelerator = Accelerator(cpu=True)
    assert isinstance(accelerator.gradient_state, GradientState)
    for value in (False, True):
        accelerator.gradient_state._set_sync_gradients(value)
        assert accelerator.sync_gradients is value, "the native engine sets sync_gradients for each replay"
    assert accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False) is False
    assert accelerator.scaler is None


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


def test_trainer_loads_through_the_methods_that_are_overridden(tmp_path):
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


def test_trainer_counts_flops_in_the_attribute(tmp_path):
    trainer = make_trainer(tmp_path, "vit", Trainer, max_steps=1)
    trainer.train()
    before = trainer.state.total_flos
    trainer.current_flos += 12.0
    trainer.store_flos()
    assert trainer.state.total_flos == before + 12, "the second pass adds its FLOPs to current_flos"


def test_exportable_callbacks_are_saved_by_class_name():
    class Callback(ExportableState):
        def state(self):
            return {"args": {"x": 1}, "attributes": {}}

    state = TrainerState(stateful_callbacks=[Callback()])
    assert state.stateful_callbacks == {"Callback": {"args": {"x": 1}, "attributes": {}}}, (
        "GNPStateCallback finds the values of the checkpoint in the state under its own name"
    )


# --- The conversion of weights between the original format and the model's ---


def load_saved(model, folder):
    model.save_pretrained(folder)
    return set(load_file(folder / "model.safetensors"))


def test_from_pretrained_notes_the_users_key_mapping(tmp_path):
    make_model("bert").save_pretrained(tmp_path)
    model = make_model("bert", loaded_from=tmp_path, key_mapping={"^bert": "bert"})
    used = [(t.source_patterns, t.target_patterns) for t in getattr(model, "_weight_conversions", [])]
    assert used == [(["^bert"], ["bert"])], "checkpoint._weight_transforms finds the user's key_mapping there"


def test_conversion_mapping_names_weights_as_from_pretrained_does(tmp_path):
    model = make_model("vit")
    own = model.state_dict()
    saved = load_saved(model, tmp_path)
    renamings = get_model_conversion_mapping(model)
    assert all(isinstance(transform, WeightRenaming) for transform in renamings)
    targets = {rename_source_key(name, renamings, [], model.base_model_prefix, own)[0] for name in saved}
    assert targets == own.keys(), "checkpoint._Conversion renames by these two functions"
    assert rename_source_key("layers.0.x", [], [], "vit", {"vit.layers.0.x": torch.ones(1)}) == (
        "vit.layers.0.x",
        None,
    )


def test_converter_merges_what_is_added_to_it():
    converter = WeightConverter(["experts.*.up"], ["experts.merged"], [MergeModulelist(dim=0)])
    source, target, pattern = "a.experts.1.up", *rename_source_key("a.experts.1.up", [], [converter])
    assert (target, pattern) == ("a.experts.merged", "experts.*.up")
    for value in (1.0, 2.0):
        converter.add_tensor(target, source, pattern, torch.full((2,), value))
    converted = converter.convert(target, model=None, config=None)
    assert list(converted) == [target], "checkpoint._Conversion.convert merges and splits weights through converters"
    assert converted[target].tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert sorted(["x.10", "x.9"], key=dot_natural_key) == ["x.9", "x.10"]


def test_trainer_still_loads_a_renamed_checkpoint_in_part(tmp_path):
    saved = load_saved(make_model("vit"), tmp_path)
    model = make_model("vit")
    assert not saved <= model.state_dict().keys()
    torch.nn.init.normal_(weight := model.vit.layers[0].attention.q_proj.weight)
    before = weight.detach().clone()
    make_trainer(tmp_path / "out", "vit", Trainer, model=model)._load_from_checkpoint(str(tmp_path))
    assert torch.equal(weight, before), "Trainer converts now: checkpoint.load_renamed is needed for older ones only"
