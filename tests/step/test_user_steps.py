"""Subclasses that do something around the step: call it twice, call backward themselves, swallow what it raises."""

import collections

import pytest
import reference
import torch
from runs import (
    UNMOVED,
    Gradients,
    assert_ends_at,
    assert_identical,
    assert_matches_reference,
    inner,
    make_trainer,
    make_unmoved,
    reference_run,
    run,
    skipping,
    snapshot,
    trained,
    windows,
    with_loss,
)
from tiny import Net, collate, make_data
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_gnp import GNPTrainer


def gradients(tmp_path, cls, **kwargs) -> list[dict[str, torch.Tensor]]:
    seen = Gradients()
    settings = {"max_steps": 2, "max_grad_norm": 0, "callbacks": [seen], **kwargs}
    make_trainer(tmp_path, "net", cls, **settings).train()
    return seen.steps


def calling_backward(cls, where: str, through_accelerator: bool):
    """A regulariser with a backward of its own: before, after or inside of the loss, on each micro-batch."""

    class Regularised(cls):
        def training_step(self, *args, **kwargs):
            if where == "before":
                self.regularise()
            loss = super().training_step(*args, **kwargs)
            if where == "after":
                self.regularise()
            return loss

        def compute_loss(self, *args, **kwargs):
            if where == "inside":
                self.regularise()
            return super().compute_loss(*args, **kwargs)

        def regularise(self):
            penalty = sum(p.square().sum() for p in self.model.parameters())
            self.accelerator.backward(penalty) if through_accelerator else penalty.backward()

    return Regularised


def adversarial(cls):
    """Fast gradient method: the step again at other embeddings, whose gradient is added (Miyato et al. 2017)."""

    class Adversarial(cls):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            first = self.model.layers[0].weight
            kept, shift = first.detach().clone(), 0.1 * first.grad / first.grad.norm()
            with torch.no_grad():
                first.add_(shift)
            super().training_step(*args, **kwargs)
            with torch.no_grad():
                first.copy_(kept)
            return loss

    return Adversarial


# --- More than one backward for a step ---

SUBCLASSES = {
    "before": (lambda cls: calling_backward(cls, "before", True), {}),
    "before, by torch": (lambda cls: calling_backward(cls, "before", False), {}),
    "before, accumulated": (lambda cls: calling_backward(cls, "before", True), {"gradient_accumulation_steps": 3}),
    "after": (lambda cls: calling_backward(cls, "after", True), {"max_steps": 1}),
    "inside": (lambda cls: calling_backward(cls, "inside", False), {}),
    "inside, by accelerate": (lambda cls: calling_backward(cls, "inside", True), {}),
    "inside, accumulated": (lambda cls: calling_backward(cls, "inside", True), {"gradient_accumulation_steps": 3}),
    "twice": (adversarial, {"max_steps": 1}),
}


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("name", SUBCLASSES)
def test_own_backward_is_added_once(tmp_path, name, alpha):
    """What is there when a window begins is not g₁, and what accelerate's backward adds in its middle is not."""
    subclass, settings = SUBCLASSES[name]
    expected = gradients(tmp_path, subclass(Trainer), **settings)
    result = gradients(tmp_path, subclass(GNPTrainer), **UNMOVED | {"gnp_alpha": alpha}, **settings)
    for step, step_expected in zip(result, expected, strict=True):
        for name, gradient in step_expected.items():
            # The parts are added in another order.
            assert torch.allclose(step[name], gradient, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("where", ["before", "inside"])
def test_own_backward_is_not_penalised(tmp_path, where, accumulation, alpha):
    """The regulariser's gradient at θ is added to the penalised gradient of the loss, and is no part of g₁."""
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 1}
    penalised = {"gnp_alpha": alpha, "gnp_r": 0.3}
    [alone] = gradients(tmp_path, GNPTrainer, **settings, **penalised)
    [both] = gradients(tmp_path, calling_backward(GNPTrainer, where, True), **settings, **penalised)
    for name, parameter in Net().named_parameters():
        torch.testing.assert_close(
            both[name], alone[name] + 2 * accumulation * parameter.detach(), rtol=1e-5, atol=1e-6
        )


def at_adversarial_inputs(model, inputs, gradient_of) -> torch.Tensor:
    x = inputs["x"].clone().requires_grad_()
    gradient = gradient_of(model(x, inputs["labels"])["loss"], x)
    return model(inputs["x"] + 0.1 * gradient.sign(), inputs["labels"])["loss"]


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_loss_that_zeroes_the_gradient(tmp_path, alpha):
    """Adversarial inputs (Goodfellow et al. 2015), as people write them: backward, and `zero_grad` after it."""

    def by_backward(loss, x):
        loss.backward()
        trainer.model.zero_grad()
        return x.grad

    def loss(model, window):
        return at_adversarial_inputs(model, window[0], lambda loss, x: torch.autograd.grad(loss, x)[0])

    adversarial = with_loss(GNPTrainer, lambda trainer, *args: at_adversarial_inputs(*args, by_backward))
    trainer = make_trainer(tmp_path, "net", adversarial, gnp_alpha=alpha)
    trainer.train()
    assert_matches_reference(trainer, reference_run("net", 1, alpha=alpha, loss=loss))


def test_own_backward_between_micro_batches_is_refused(tmp_path):
    cls = calling_backward(GNPTrainer, "before", False)
    trainer = make_trainer(tmp_path, "net", cls, gradient_accumulation_steps=3)
    start = snapshot(trainer.model)
    with pytest.raises(RuntimeError, match=r"between the micro-batches.*accelerator\.backward.*gnp_alpha=0"):
        trainer.train()
    assert_identical(snapshot(trainer.model), start)


@pytest.mark.parametrize("make, name", [(adversarial, "Adversarial"), (lambda cls: inner(cls, adversarial), "Own")])
def test_step_made_twice_within_a_window_is_refused(tmp_path, make, name):
    """What the subclass changed between the two calls would be gone in the second pass."""
    trainer = make_trainer(tmp_path, "net", make(GNPTrainer), gradient_accumulation_steps=2)
    with pytest.raises(NotImplementedError, match=rf"{name} calls training_step twice.*gnp_alpha=0"):
        trainer.train()


@pytest.mark.parametrize("steps", [False, True])
def test_loader_that_repeats_one_batch(tmp_path, steps):
    """The same object each time, as to see whether a model can learn one batch by heart."""
    batch = collate(make_data("net", 4))

    def base(cls):
        class Repeats(cls):
            def get_train_dataloader(self):
                return [batch] * 12

            if steps:

                def training_step(self, *args, **kwargs):
                    return super().training_step(*args, **kwargs)

        return Repeats

    settings = {"gradient_accumulation_steps": 3, "max_steps": 4}
    expected = run(make_trainer(tmp_path, "net", base(Trainer), **settings))
    result = run(make_trainer(tmp_path, "net", base(GNPTrainer), **settings, **UNMOVED))
    assert_identical(result["weights"], expected["weights"])


# --- Steps that Trainer never sees ---


class OwnStep(GNPTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class OwnLoss(GNPTrainer):
    """Reaches `super()` at the second step only, as a trainer may that warms something up."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step > 0:
            return super().training_step(model, inputs, num_items_in_batch)
        return OwnStep.training_step(self, model, inputs, num_items_in_batch)


@pytest.mark.parametrize("max_grad_norm", [0, 0.5])
@pytest.mark.parametrize("cls", [OwnStep, OwnLoss])
def test_step_that_never_reaches_trainers_is_refused(tmp_path, cls, max_grad_norm):
    trainer = make_trainer(tmp_path, "net", cls, max_grad_norm=max_grad_norm)
    start = snapshot(trainer.model)
    with pytest.raises(NotImplementedError, match=rf"{cls.__name__}\.training_step never reaches.*gnp_alpha=0"):
        trainer.train()
    assert_identical(snapshot(trainer.model), start)
    make_trainer(tmp_path, "net", cls, gnp_alpha=0.0, max_steps=1).train()


class SkippingUnseen(GNPTrainer):
    """Leaves out a batch without a look at its loss, in one of three steps."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step % 3 == 0:
            return torch.zeros(())
        return super().training_step(model, inputs, num_items_in_batch)


def test_step_that_is_skipped_whole(tmp_path):
    trainer = trained(tmp_path, "net", SkippingUnseen, max_steps=5)
    steps = [window for step, window in enumerate(windows("net", 1)[:5]) if step % 3]
    assert_ends_at(trainer.model, reference_run("net", 1, steps=steps))


class SkippingLast(GNPTrainer):
    """Leaves out the last micro-batch of the second step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == 1 and self.accelerator.sync_gradients:
            return torch.zeros(())
        return super().training_step(model, inputs, num_items_in_batch)


class PlainSecondStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        args.gnp_alpha = 0.0 if state.global_step == 1 else 0.8


def test_step_whose_last_micro_batch_is_skipped(tmp_path, caplog):
    """The step is a plain one, as no second pass follows, and a warning says so."""
    settings = {"gradient_accumulation_steps": 2, "max_steps": 4}
    trainer = trained(tmp_path, "net", SkippingLast, **settings)
    assert "Step 1 was not penalised: SkippingLast.training_step skipped" in caplog.text
    plain = trained(tmp_path, "net", SkippingLast, callbacks=[PlainSecondStep()], **settings)
    assert_identical(snapshot(trainer.model), snapshot(plain.model))


# --- Exceptions that the subclass swallows ---


FORWARDS: list[float] = []  # the first number of what each forward saw


class Failing(Net):
    """Runs out of memory in its n-th forward."""

    fail_at = 0

    def forward(self, x, labels):
        FORWARDS.append(x[0, 0].item())
        if len(FORWARDS) == self.fail_at:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x, labels)


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("pass_", [0, 1])
def test_skipped_batch_leaves_no_trace(tmp_path, pass_, accumulation, alpha):
    """Weights are those of the reference without that window, and no forward runs on its batches again."""
    FORWARDS.clear()
    model = Failing()
    first_step = 2 * accumulation + 1  # and the probe
    model.fail_at = first_step + pass_ * accumulation + accumulation  # the last micro-batch of either pass
    settings = {"gradient_accumulation_steps": accumulation, "gnp_alpha": alpha, "max_steps": 4}
    trainer = trained(tmp_path, "net", skipping(GNPTrainer), model=model, **settings)
    assert trainer.state.global_step == 4
    batches = [[b["x"][0, 0].item() for b in window] for window in windows("net", accumulation)[:4]]
    after = FORWARDS[model.fail_at :]
    assert after == [x for window in batches[2:] for x in 2 * window]
    steps = windows("net", accumulation)[:4]
    expected = reference_run("net", accumulation, alpha=alpha, steps=[steps[0], *steps[2:]])
    assert_ends_at(model, expected)


# --- What belongs to the step ---


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("where", ["callback", "training_step", "compute_loss"])
def test_layers_unfrozen_during_training(tmp_path, where, alpha):
    def unfreeze(of, state):
        if of == where:
            trainer.model.layers[0].requires_grad_(state.global_step >= 2)

    class Callback(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            unfreeze("callback", state)

    class Unfreezing(GNPTrainer):
        def training_step(self, *args, **kwargs):
            unfreeze("training_step", self.state)
            return super().training_step(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            unfreeze("compute_loss", self.state)
            return super().compute_loss(*args, **kwargs)

    settings = {"max_steps": 4, "gnp_alpha": alpha, "callbacks": [Callback()], "max_grad_norm": 0.5}
    trainer = make_trainer(tmp_path, "net", Unfreezing, **settings)
    trainer.train()
    model, steps = Net(), windows("net", 1)[:4]
    model.layers[0].requires_grad_(False)
    reference_run("net", 1, alpha=alpha, model=model, steps=steps[:2])
    model.layers[0].requires_grad_(True)
    assert_ends_at(trainer.model, reference_run("net", 1, alpha=alpha, model=model, steps=steps[2:]))


def test_target_modules_are_looked_up_anew(tmp_path):
    """A callback replaces the head: the new one is what moves."""
    moved = []

    class NewHead(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 1:
                model.layers[-1].weight = nn.Parameter(model.layers[-1].weight.detach() + 0.0)
                optimizer.param_groups[0]["params"].append(model.layers[-1].weight)

    model = Net()
    names = ["layers.2"]
    trainer = make_trainer(
        tmp_path, "net", model=model, max_steps=2, gnp_target_modules=names, callbacks=[NewHead()], gnp_r=0.3
    )
    model.register_forward_pre_hook(lambda *_: moved.append(snapshot(model)))
    trainer.train()
    first, second = moved[-2:]
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"layers.2.weight", "layers.2.bias"}


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_parameters_of_the_loss(tmp_path, accumulation, alpha):
    """ArcFace centres, uncertainty weights are in the optimizer, not in the model: mixed, and not perturbed."""
    seen = []

    def make_loss():
        torch.manual_seed(3)
        return nn.Linear(3, 3)

    def loss_of(model, centres, batch):
        return nn.functional.cross_entropy(centres(model.layers(batch["x"])), batch["labels"])

    def loss(trainer, model, inputs):
        seen.append(trainer.centres.weight.detach().clone())
        return loss_of(model, trainer.centres, inputs)

    model, centres = Net(), make_loss()
    parameters = [*model.parameters(), *centres.parameters()]
    start = [p.detach().clone() for p in parameters]
    optimizers = torch.optim.SGD(parameters, lr=1.0), None
    settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0, "gnp_alpha": alpha, "gnp_r": 0.1}
    trainer = make_trainer(
        tmp_path, "net", with_loss(GNPTrainer, loss), model=model, optimizers=optimizers, max_steps=1, **settings
    )
    trainer.centres = centres
    trainer.train()
    assert all(torch.equal(weight, seen[0]) for weight in seen)

    twin, centres = Net(), make_loss()
    twin_parameters = [*twin.parameters(), *centres.parameters()]

    def differentiate():
        value = sum(loss_of(twin, centres, batch) for batch in windows("net", accumulation)[0]) / accumulation
        return torch.autograd.grad(value, twin_parameters)

    g1 = differentiate()
    inside = g1[: len(list(twin.parameters()))]
    reference.add_(list(twin.parameters()), [0.1 * g for g in reference.unit(inside)])
    for before, end, right in zip(start, parameters, reference.paper_mix(g1, differentiate(), alpha), strict=True):
        assert torch.allclose(before - end, right, rtol=1e-4, atol=1e-6)


def test_code_around_the_step_runs_once(tmp_path):
    """A subclass that counts and times around the step, which happens once, is the plain penalised run."""

    class Timed(GNPTrainer):
        steps = 0

        def training_step(self, *args, **kwargs):
            self.steps += 1
            return super().training_step(*args, **kwargs)

    trainer = make_trainer(tmp_path, "vit", Timed, gradient_accumulation_steps=2)
    result = run(trainer)
    assert trainer.steps == 2 * len(result["logs"])
    assert_matches_reference(trainer, reference_run("vit", 2))


# --- The trainer around both passes ---


@pytest.mark.parametrize("scope, expected", [("step", [0, 1, 0, 1]), ("micro_batch", [0, 0, 1, 1])])
def test_sync_gradients_in_the_second_pass(tmp_path, scope, expected):
    seen = []

    def asking(trainer, model, inputs):
        seen.append(int(trainer.accelerator.sync_gradients))
        return model(**inputs)["loss"]

    make_unmoved(tmp_path, with_loss(GNPTrainer, asking), gnp_scope=scope, max_steps=2).train()
    assert seen[-4:] == expected


@pytest.mark.parametrize("when", ["before", "in the forward"])
def test_inner_trainer_that_skips_a_batch(tmp_path, when):
    def results_of(cls):
        calls = collections.Counter()

        class Failing(Net):
            def forward(self, x, labels):
                if when == "in the forward" and not calls["failed"] and calls["steps"] == 3:
                    calls["failed"] += 1
                    raise torch.OutOfMemoryError("injected")
                return super().forward(x, labels)

        def base(parent):
            class Own(parent):
                def training_step(self, *args, **kwargs):
                    calls["steps"] += 1
                    if when == "before" and calls["steps"] in (1, 4):
                        return torch.zeros(())
                    return super().training_step(*args, **kwargs)

            return skipping(Own)

        trainer = make_unmoved(tmp_path, inner(cls, base), model=Failing(), max_steps=6)
        trainer.train()
        return trainer.model.state_dict()

    torch.testing.assert_close(results_of(GNPTrainer), results_of(Trainer), rtol=0, atol=0)
