"""Copies of weights: casts that autocast keeps, `parametrize.cached`, a shadow copy. The second pass computes anew."""

import pytest
import torch
from runs import assert_identical, inner, logs_of, make_trainer, make_unmoved, run, snapshot, trained, without_gnp
from tiny import Net, flat_weights, relative_distance
from torch import nn
from torch.nn.utils import parametrize
from transformers import Trainer, TrainerCallback

from hf_gnp import GNPTrainer


# Both compute in bfloat16, whose rounding is 2^-9 of a number: they differ in where logits are cast back.
BF16_TOLERANCE = 2**-7
NEVER_REACHED = r"the move never reached the forward.*copies of the weights.*gnp_alpha=0"


def within(context):
    """Return a function of a trainer's class: its `training_step` runs within `context()`."""

    def around(cls):
        class Around(cls):
            def training_step(self, *args, **kwargs):
                with context():
                    return super().training_step(*args, **kwargs)

        return Around

    return around


def in_loss(context):
    def around(cls):
        class Around(cls):
            def compute_loss(self, *args, **kwargs):
                with context():
                    return super().compute_loss(*args, **kwargs)

        return Around

    return around


PLACES = {
    "subclass": lambda context: within(context)(GNPTrainer),
    "mixin": lambda context: inner(GNPTrainer, within(context)),
    "loss": lambda context: in_loss(context)(GNPTrainer),
}


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("place", PLACES)
def test_autocast_around_the_step(tmp_path, place, alpha, accumulation):
    """As with bf16=True."""
    settings = {"gnp_alpha": alpha, "gnp_r": 0.5, "gnp_warmup_type": "none", "max_steps": 6}
    settings |= {"gradient_accumulation_steps": accumulation, "num_train_epochs": 3}
    start = flat_weights(Net())
    trainers = []
    for cls, more in ((GNPTrainer, {"bf16": True}), (PLACES[place](bfloat16), {})):
        trainers.append(make_trainer(tmp_path, "net", cls, **settings, **more))
        trainers[-1].train()
    expected, result = (flat_weights(trainer.model) for trainer in trainers)
    assert relative_distance(result, expected, start) < BF16_TOLERANCE
    logs = [logs_of(trainer, "loss", "gnp_perturbed_loss", "gnp_sharpness") for trainer in trainers]
    for name in ("loss", "gnp_perturbed_loss"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=BF16_TOLERANCE)
    assert min(logs[1]["gnp_sharpness"]) > 0.05


@pytest.mark.parametrize("place", PLACES)
def test_autocast_around_the_step_at_nothing(tmp_path, place):
    """Without a move the step is that of stock `Trainer` within the same context."""
    around = in_loss(bfloat16) if place == "loss" else within(bfloat16)
    plain, gnp = (run(make_unmoved(tmp_path, cls)) for cls in (around(Trainer), PLACES[place](bfloat16)))
    gnp["logs"] = without_gnp(gnp["logs"])
    assert_identical(gnp, plain)


class Scaled(nn.Module):
    """A parametrisation of a weight."""

    def forward(self, weight):
        return weight * weight.norm().tanh()


def parametrised() -> Net:
    model = Net()
    for layer in (model.layers[0], model.layers[-1]):
        parametrize.register_parametrization(layer, "weight", Scaled())
    return model


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("place", PLACES)
def test_cached_parametrisation(tmp_path, place, alpha):
    """A cache of weights within a step changes no number."""
    settings = {"gnp_alpha": alpha, "gnp_r": 0.3, "max_steps": 4}
    expected, result = (
        run(make_trainer(tmp_path, "net", cls, model=parametrised(), **settings))
        for cls in (GNPTrainer, PLACES[place](parametrize.cached))
    )
    assert min(log["gnp_sharpness"] for log in expected["logs"]) > 0.01
    assert_identical(result, expected)


# --- The probe at θ + e ---


class Shadowed(Net):
    """Computes with a copy of its first weight, through which gradients go straight to the weight."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 3))
        self.register_buffer("shadow", self.layers[0].weight.detach().clone())
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x, labels):
        weight = self.layers[0].weight
        logits = x @ (self.shadow + (weight - weight.detach())).T
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Refresh(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.shadow.copy_(model.layers[0].weight)


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("plain_steps", [0, 2])
def test_shadow_copy_of_weights_is_refused(tmp_path, plain_steps, accumulation, alpha):
    model = Shadowed()
    settings = {"gradient_accumulation_steps": accumulation, "gnp_alpha": alpha, "gnp_interval": plain_steps + 1}
    trainer = make_trainer(tmp_path, "net", model=model, callbacks=[Refresh()], **settings)
    weights = []
    model.register_forward_pre_hook(lambda *_: weights.append(snapshot(model)))
    with pytest.raises(RuntimeError, match=NEVER_REACHED):
        trainer.train()
    assert trainer.state.global_step == plain_steps  # the first penalised step
    assert torch.equal(model.layers[0].weight, weights[plain_steps * accumulation]["layers.0.weight"])
    assert model.layers[0].weight.grad is None and not trainer.in_second_pass


def constant(logits):
    return 0 * logits.sum() + 1


def surrogate(logits):
    """Always 0: its gradient alone is of use, as that of a policy."""
    value = logits.square().mean()
    return value - value.detach()


@pytest.mark.parametrize("loss, r", [(None, 1e-30), (constant, 0.05), (constant, 1e-30), (surrogate, 0.05)])
def test_same_losses_of_both_passes_are_right(tmp_path, loss, r):
    """Where nothing can be seen of a move, and where the gradients of constant losses differ."""

    class Own(Net):
        def forward(self, x, labels):
            outputs = super().forward(x, labels)
            return outputs if loss is None else {**outputs, "loss": loss(outputs["logits"])}

    trainer = trained(tmp_path, "net", model=Own(), gnp_r=r, gnp_warmup_type="none", max_steps=3)
    assert trainer.state.global_step == 3
    plain = trained(tmp_path, "net", Trainer, model=Own(), max_steps=3)
    ends = [snapshot(each.model) for each in (trainer, plain)]
    if loss is surrogate:
        assert not torch.equal(ends[0]["layers.0.weight"], ends[1]["layers.0.weight"])
    else:  # (1-α) g₁ + α g₁ rounds
        torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)
