"""State that a first pass changes: buffers, teachers, counters, queues. The second pass finds it as the first did."""

import copy
import itertools
import types
from collections import Counter, deque

import numpy as np
import pytest
import torch
from runs import (
    BOTH,
    assert_identical,
    assert_matches_reference,
    assert_unmoved_is_plain,
    inner,
    logs_of,
    make_trainer,
    make_unmoved,
    reference_run,
    run,
    skipping,
    snapshot,
    window_loss,
    with_loss,
)
from tiny import Net, UnlabelledNet
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import TrainerCallback

from hf_gnp import GNPTrainer


# --- Attributes of the trainer, the loss and the model ---

CASES = {}


def case(make):
    """`make(cls)` returns a class of trainer and what `trainer_of` takes."""
    CASES[make.__name__] = make
    return make


def trainer_of(tmp_path, cls, accumulation=1, **options):
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 6, "learning_rate": 0.05, **options}
    return make_unmoved(tmp_path, cls, **settings)


def loss_case(setup=None, **options):
    """As `case`, of a function that is the trainer's `compute_loss`."""

    def register(loss):
        CASES[loss.__name__] = lambda cls: (with_loss(cls, loss), {"setup": setup, **options})
        return loss

    return register


def model_case(**options):
    """As `case`, of a class of models."""

    def register(model_cls):
        CASES[model_cls.__name__] = lambda cls: (cls, {"model": model_cls(), **options})
        return model_cls

    return register


def layer_case(**options):
    """As `case`, of a class of layers of the model."""

    def register(layer_cls):
        CASES[layer_cls.__name__] = lambda cls: (cls, {"model": Net(layer_cls), **options})
        return layer_cls

    return register


def attributes(**values):
    """A setup that makes attributes of the trainer by functions of it."""

    def setup(trainer):
        torch.manual_seed(1)
        for name, make in values.items():
            setattr(trainer, name, make(trainer))

    return setup


@model_case()
class HiddenStateWithItsGraph(Net):
    def __init__(self):
        super().__init__()
        self.cell, self.head, self.hidden = nn.GRUCell(5, 7), nn.Linear(7, 3), None

    def forward(self, x, labels):
        before = torch.zeros(len(x), 7) if self.hidden is None else self.hidden.detach()
        self.hidden = self.cell(x, before)
        return {"loss": cross_entropy(self.head(self.hidden), labels)}


@loss_case(attributes(last=lambda trainer: None))
def logits_of_the_last_step(self, model, inputs):
    outputs = model(**inputs)
    loss = outputs["loss"]
    if self.last is not None:
        loss = loss + 0.1 * mse_loss(outputs["logits"], self.last.detach())
    self.last = outputs["logits"]
    return loss


def with_targets(place):
    """A teacher's outputs, set by `training_step` for each micro-batch: too many for what is copied."""

    def make(cls):
        class Distilled(cls):
            def training_step(self, model, inputs, *args, **kwargs):
                targets = inputs["x"].repeat(1, 4000) ** 2
                self.targets = {"attribute": targets, "dict": {"t": targets}, "array": targets.numpy()}[place]
                return super().training_step(model, inputs, *args, **kwargs)

            def compute_loss(self, model, inputs, *args, **kwargs):
                targets = torch.as_tensor(self.targets["t"] if place == "dict" else self.targets)
                outputs = model(**inputs)
                return outputs["loss"] + (outputs["logits"].mean(1) - targets.mean(1)).pow(2).mean()

        return Distilled, {"accumulation": 2}

    return make


CASES |= {f"targets_in_{place}": with_targets(place) for place in ("attribute", "dict", "array")}


@torch.no_grad()
def follow(teacher, model):
    for slow, weight in zip(teacher.parameters(), model.parameters(), strict=True):
        slow.lerp_(weight, 0.1)


@torch.no_grad()
def target_of(teacher, inputs):
    return teacher(**inputs)["logits"] + 0.1


def frozen_copy(trainer):
    return copy.deepcopy(trainer.model).requires_grad_(False)


class Kept:
    """A plain object of the user's."""

    def __init__(self, teacher):
        self.teacher = teacher


@loss_case(attributes(kept=lambda trainer: Kept(frozen_copy(trainer))))
def teacher_in_an_object(self, model, inputs):
    outputs, teacher = model(**inputs), self.kept.teacher
    loss = outputs["loss"] + mse_loss(outputs["logits"], target_of(teacher, inputs))
    follow(teacher, model)
    return loss


# contract? A module in a list of a module.
@model_case()
class TeacherInAListOfTheModel(Net):
    def __init__(self):
        super().__init__()
        self.hidden = [copy.deepcopy(self.layers).requires_grad_(False)]  # not in the state dict

    def forward(self, x, labels):
        outputs = super().forward(x, labels)
        with torch.no_grad():
            target = self.hidden[0](x) + 0.1
        outputs["loss"] = outputs["loss"] + mse_loss(outputs["logits"], target)
        follow(self.hidden[0], self.layers)
        return outputs


@loss_case(
    attributes(
        critic=lambda trainer: nn.Linear(3, 1),
        second_optimizer=lambda trainer: torch.optim.Adam(trainer.critic.parameters(), lr=0.1),
        second_scheduler=lambda trainer: torch.optim.lr_scheduler.StepLR(trainer.second_optimizer, 2, 0.5),
    ),
    accumulation=2,
)
def critic_with_optimizer_and_scheduler(self, model, inputs):
    outputs = model(**inputs)
    self.second_optimizer.zero_grad()
    self.critic(outputs["logits"].detach()).mean().backward()
    self.second_optimizer.step()
    self.second_scheduler.step()
    return outputs["loss"] + 0.1 * self.critic(outputs["logits"]).mean()


@loss_case(
    attributes(
        multiplier=lambda trainer: nn.Parameter(torch.tensor(0.5)),
        second_optimizer=lambda trainer: torch.optim.SGD([trainer.multiplier], lr=0.5, maximize=True),
    ),
    accumulation=2,
)
def multiplier_that_the_loss_updates(self, model, inputs):
    """From the third step on, when the probe is long over."""
    outputs = model(**inputs)
    excess = outputs["logits"].pow(2).mean() - 0.1
    loss = outputs["loss"] + self.multiplier.detach().clone() * excess
    if self.state.global_step >= 2:
        (self.multiplier * excess.detach()).backward()
        self.second_optimizer.step()
        self.second_optimizer.zero_grad()
    return loss


@loss_case(accumulation=2)
def sum_of_losses_with_their_graph(self, model, inputs):
    loss = model(**inputs)["loss"]
    if not self.accelerator.sync_gradients:
        self.total = 0.0
    self.total += loss  # in place, from the second micro-batch on
    return loss * (1 + self.total.detach())


@loss_case(attributes(bank=lambda trainer: nn.Parameter(torch.zeros(20_000))))
def large_parameter_that_the_loss_writes(self, model, inputs):
    outputs = model(**inputs)
    with torch.no_grad():
        self.bank[:3] = 0.9 * self.bank[:3] + outputs["logits"].mean(0)
    return outputs["loss"] + (outputs["logits"].mean(0) - self.bank[:3].detach()).pow(2).sum()


@loss_case(accumulation=2)
def loss_that_asks_whether_gradients_are_synchronised(self, model, inputs):
    return model(**inputs)["loss"] * (1.0 if self.accelerator.sync_gradients else 0.5)


@loss_case(attributes(banks=lambda trainer: {"image": torch.ones(20_000), "text": torch.zeros(3)}))
def order_of_a_dict(self, model, inputs):
    outputs = model(**inputs)
    pairs = zip((1.0, 0.5), self.banks.values(), strict=True)
    return outputs["loss"] + sum(w * (outputs["logits"].mean(0) - bank[:3]).pow(2).sum() for w, bank in pairs)


@loss_case(attributes(centre=lambda trainer: nn.Parameter(torch.zeros(3), requires_grad=False)))
def frozen_parameter_of_the_trainer(self, model, inputs):
    outputs = model(**inputs)
    loss = outputs["loss"] + (outputs["logits"] - self.centre).pow(2).mean()
    with torch.no_grad():
        self.centre.mul_(0.9).add_(0.1 * outputs["logits"].mean(0))
    return loss


class Meter:
    value = 0.0


class WithNames(Net):
    """Its forward takes more arguments: `Trainer` counts the items of a batch for it, and can compile it."""

    def forward(self, x, labels=None, **kwargs):
        return super().forward(x, labels)


@loss_case(accumulation=2)
def meter_made_in_the_loss(self, model, inputs):
    if not hasattr(self, "meter"):
        self.meter = Meter()
    self.meter.value += 1
    return model(**inputs)["loss"] * (1 + 0.1 * self.meter.value)


def of_a_library(name, base, **body):
    """A class that says that it is from a library, as those of PEFT do that draw samples."""
    return type(name, (base,), {"__module__": "peft.tuners.sampled", **body})


def next_factor(self):
    self.index += 1
    self.buffer.append(self.index)
    return 1 + 0.1 * self.index + 0.01 * len(self.buffer)


def sampler():
    made = of_a_library("Sampler", object, next_factor=next_factor)()
    made.buffer, made.index = [], 0
    return made


@model_case(accumulation=2)
class LibrarysObjectOnAModule(Net):
    def __init__(self):
        super().__init__()
        self.sampler = sampler()

    def forward(self, x, labels):
        return super().forward(x * self.sampler.next_factor(), labels)


@case
def librarys_object_on_a_librarys_module(cls):
    """Both in one dictionary of a module, as PEFT keeps them by the name of an adapter."""

    def forward(self, x):
        return x * self.samplers["default"].next_factor() * next_factor(self)

    made = of_a_library("Layer", nn.Module, forward=forward)()
    made.samplers, made.index, made.buffer = {"default": sampler()}, 0, []
    return cls, {"model": Net(lambda: made), "accumulation": 2}


class RunningLoss:
    def __init__(self):
        self.mean, self.count = 0.0, 0

    def compute(self, outputs, labels, num_items_in_batch=None):
        loss = cross_entropy(outputs["logits"], labels)
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * loss.item()
        return loss * (1 + (self.mean if self.count > 3 else 0))


@case
def bound_method_as_the_loss(cls):
    return cls, {"compute_loss_func": RunningLoss().compute, "model": UnlabelledNet()}


class LossModule(nn.Module):
    """A loss with a buffer, a counter and dictionaries of its own, as sentence-transformers' losses are."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.components, self.calls = {}, 0

    def forward(self, outputs, labels, num_items_in_batch=None):
        loss = cross_entropy(outputs["logits"], labels)
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        self.components[f"call_{self.calls}"] = self.mean.item()
        return loss * (1 + self.mean + 0.01 * len(self.components))


@case
def module_as_the_loss(cls):
    return cls, {"compute_loss_func": LossModule(), "model": UnlabelledNet(), "accumulation": 2}


@layer_case()
class MetersInADictOfALayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.meters, self.calls = {"a": Meter()}, 0

    def forward(self, x):
        self.meters["a"].value = 0.9 * self.meters["a"].value + 0.1 * x.abs().mean().item()
        self.calls += 1
        return x * (1 + (self.calls > 3) * self.meters["a"].value)


@case
def layer_of_a_compiled_model(cls):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = torch.zeros(7)

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean

    model = torch.compile(WithNames(Centred), backend="eager")
    return cls, {"model": model, "remove_unused_columns": False}


@case
def evaluation_mode_left_by_the_loss(cls):
    def loss(self, model, inputs):
        value = model(**inputs)["loss"]
        model.eval()
        with torch.no_grad():
            self.accuracy = (model(**inputs)["logits"].argmax(-1) == inputs["labels"]).float().mean().item()
        return value

    return with_loss(cls, loss), {"model": Net(lambda: nn.Dropout(0.5))}


def following_teacher(cls):
    def loss(self, model, inputs):
        outputs = model(**inputs)
        follow(self.teacher, model)
        return outputs["loss"] + mse_loss(outputs["logits"], target_of(self.teacher, inputs))

    return with_loss(cls, loss), {"setup": attributes(teacher=frozen_copy)}


@case
def teacher_of_weights_that_stay_at_first(cls):
    """The first step of a warm-up has a learning rate of 0."""
    trainer_cls, options = following_teacher(cls)
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": 3, "learning_rate": 0.5}
    return trainer_cls, {**options, **schedule, "optim": "sgd"}


class WithTeacher(Net):
    """A copy that follows the weights, and that the loss is drawn to (BYOL, DINO, data2vec)."""

    def __init__(self, is_frozen=True):
        super().__init__()
        self.teacher = Net().layers.requires_grad_(not is_frozen)
        self.updates = 0

    @torch.no_grad()
    def follow(self) -> None:
        for theirs, ours in zip(self.teacher.parameters(), self.layers.parameters(), strict=True):
            theirs.data.lerp_(ours.data, 0.5 / (1 + self.updates))
        self.updates += 1

    def forward(self, x, labels):
        self.follow()
        outputs = super().forward(x, labels)
        with torch.no_grad():
            target = self.teacher(x) + 0.1
        return {**outputs, "loss": outputs["loss"] + mse_loss(outputs["logits"], target)}


@loss_case()
def teacher_that_the_first_loss_makes(self, model, inputs):
    if not hasattr(self, "teacher"):
        self.teacher, self.updates = frozen_copy(self), 0
    follow(self.teacher, model)
    self.updates += 1
    target = target_of(self.teacher, inputs)
    outputs = model(**inputs)
    return outputs["loss"] + mse_loss(outputs["logits"], target)


@layer_case()
class AttributesNamedAsALibrarys(nn.Module):
    def __init__(self):
        super().__init__()
        self.ds_losses = self.log = self.control = 0

    def forward(self, x):
        self.ds_losses, self.log, self.control = self.ds_losses + 1, self.log + 2, self.control + 3
        return x * (1 + 0.01 * self.ds_losses + 0.02 * self.log + 0.03 * self.control)


class ReachedTeacher(WithTeacher):
    """The loss reaches its teacher, which only `follow` changes."""

    def forward(self, x, labels):
        self.follow()
        outputs = Net.forward(self, x, labels)
        return {**outputs, "loss": outputs["loss"] + mse_loss(outputs["logits"], self.teacher(x) + 0.1)}


@case
def teacher_that_the_optimizer_has_not(cls):
    model = ReachedTeacher(is_frozen=False)
    return cls, {"model": model, "optimizers": (torch.optim.SGD(model.layers.parameters(), lr=0.1), None)}


# contract? The loss writes into trainable weights.
@case
def weights_that_the_loss_attacks(cls):
    def base(parent):
        class Attacked(parent):
            def compute_loss(self, model, inputs, *args, **kwargs):
                weight = model.layers[0].weight
                (gradient,) = torch.autograd.grad(model(**inputs)["loss"], [weight])
                self.kept = weight.detach().clone()
                weight.data.add_(0.1 * gradient / gradient.norm())
                return model(**inputs)["loss"]

            def training_step(self, model, *args, **kwargs):
                loss = super().training_step(model, *args, **kwargs)
                model.layers[0].weight.data.copy_(self.kept)
                return loss

        return Attacked

    return inner(cls, base), {}


# contract? A container that holds itself.
@case
def tree_with_links_to_parents(cls):
    def setup(trainer):
        trainer.tree = {"children": []}
        trainer.tree["children"].append({"parent": trainer.tree})

    return cls, {"setup": setup}


@pytest.mark.parametrize("name", CASES)
def test_unmoved_run_is_plain(tmp_path, name):
    def make(cls):
        trainer_cls, options = CASES[name](cls)
        torch.manual_seed(0)
        return trainer_of(tmp_path, trainer_cls, **options)

    assert_unmoved_is_plain(make)


class StepsMultiplier(TrainerCallback):
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.optimizer.step()
        self.optimizer.zero_grad()


KEPT = {  # in which a trainer keeps the multiplier, and how it is found there
    "attribute": (lambda: nn.Parameter(torch.full((1, 1), 0.5)), lambda kept: kept),
    "list": (lambda: [nn.Parameter(torch.full((1, 1), 0.5))], lambda kept: kept[0]),
    "module": (lambda: nn.Linear(1, 1, bias=False), lambda kept: kept.weight),
}


@pytest.mark.parametrize("where", KEPT)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_multiplier_has_the_gradient_of_one_pass(tmp_path, where, accumulation):
    """Its own optimizer steps on it: neither the model nor the trainer's optimizer has it."""
    make_kept, parameter_of = KEPT[where]

    def loss(self, model, inputs):
        outputs = model(**inputs)
        excess = outputs["logits"].pow(2).mean() - 0.1
        value = outputs["loss"] + parameter_of(self.kept)[0, 0] * excess
        return value / self.args.gradient_accumulation_steps

    def setup(trainer):
        torch.manual_seed(1)
        trainer.kept = make_kept()
        optimizer = torch.optim.SGD([parameter_of(trainer.kept)], lr=0.5, maximize=True)
        trainer.add_callback(StepsMultiplier(optimizer))

    def trained(cls):
        trainer = trainer_of(tmp_path, with_loss(cls, loss), setup=setup, accumulation=accumulation)
        start = parameter_of(trainer.kept).item()
        trainer.train()
        assert parameter_of(trainer.kept).item() != start
        return parameter_of(trainer.kept).item(), trainer.model.state_dict()

    expected, result = map(trained, BOTH)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_teacher_with_a_perturbation_for_each_micro_batch(tmp_path):
    """The first windows of a run are all of its first step, in which the teacher is a copy of the weights."""
    found = []
    for cls in BOTH:
        trainer_cls, options = following_teacher(cls)
        torch.manual_seed(0)
        options |= {"accumulation": 2, "learning_rate": 0.5, "gnp_scope": "micro_batch"}
        trainer = trainer_of(tmp_path, trainer_cls, **options)
        trainer.train()
        found.append(trainer.model.state_dict())
    # Gradients are added in another order; a teacher that follows perturbed weights in one window gives 1e-4.
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_teacher_follows_clean_weights(tmp_path, is_frozen, alpha):
    """Also in the first step, which it begins as a copy of them, and where it is trainable but never reached."""
    trainer = make_trainer(tmp_path, "net", model=WithTeacher(is_frozen), gnp_alpha=alpha)
    trainer.train()

    model, passes, states = WithTeacher(is_frozen), itertools.cycle([1, 2]), []

    def loss(model, window):
        """What the second pass finds is what the first found, and what it leaves is what the first left."""
        states.append((snapshot(model.teacher), model.updates))
        is_second = next(passes) == 2
        if is_second:
            put_back(states[0])
        value = window_loss(model, window)
        if is_second:
            put_back(states[1])
            states.clear()
        return value

    def put_back(state):
        model.teacher.load_state_dict(state[0])
        model.updates = state[1]

    assert_matches_reference(trainer, reference_run("net", 1, alpha=alpha, model=model, loss=loss))


class CountingMeter:
    """An object of the user's."""

    def __init__(self):
        self.count, self.values = 0, []


def test_loss_counts_once(tmp_path):
    """In what trainers keep: numbers, lists, dicts of lists, deques, sets, small tensors and arrays."""

    def loss(self, model, inputs):
        value = model(**inputs)["loss"]
        self.calls = getattr(self, "calls", 0) + 1
        self._metrics["train"]["loss"].append(value.item())
        self.recent.append(value.item())
        self.seen.add(len(self.seen))
        self.by_label.update(inputs["labels"].tolist())
        self.total += value.detach()
        self.array += value.item()
        self.state.num_input_tokens_seen += inputs["x"].numel()
        self.meter.count += 1
        self.meter.values.append(value.item())
        self.ds_count += 1  # a name as DeepSpeed's
        # What is counted changes the loss, so that counting twice would show in the weights.
        return value * (1 + 0.1 * len(self._metrics["train"]["loss"]) + 0.1 * self.meter.count + 0.1 * self.ds_count)

    def setup(trainer):
        trainer._metrics = {"train": {"loss": []}, "eval": {}}
        trainer.recent, trainer.seen, trainer.by_label = deque(maxlen=3), set(), Counter()
        trainer.total, trainer.array = torch.zeros(()), np.zeros(3)
        trainer.meter, trainer.ds_count = CountingMeter(), 0

    def counted(trainer):
        names = ("calls", "_metrics", "seen", "by_label", "total", "array", "ds_count")
        meter = (trainer.meter.count, trainer.meter.values)
        values = [getattr(trainer, name) for name in names]
        return [*values, *meter, list(trainer.recent), trainer.state.num_input_tokens_seen]

    plain, gnp = assert_unmoved_is_plain(lambda cls: make_unmoved(tmp_path, with_loss(cls, loss), setup=setup))
    assert plain.calls == 3 * 2
    assert_identical(counted(gnp), counted(plain))


class Centred(nn.Module):
    """A running mean that is no normalisation layer's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(7))

    def forward(self, x):
        self.mean.lerp_(x.detach().mean(0), 0.5)
        return x - self.mean


@pytest.mark.parametrize("schedule", [{"gnp_start": 0.5}, {"gnp_warmup_type": "zero", "gnp_warmup_steps": 3}])
@pytest.mark.parametrize("make", [WithTeacher, lambda: Net(Centred)], ids=["teacher", "buffer"])
def test_state_when_the_penalty_begins(tmp_path, make, schedule):
    """After so many plain steps that nothing would be learnt if they counted."""
    plain, gnp = (make_unmoved(tmp_path, cls, model=make(), max_steps=6, **schedule) for cls in BOTH)
    plain.train()
    gnp.train()
    assert [log["gnp_on"] for log in gnp.state.log_history[:6]] == [0, 0, 0, 1, 1, 1]
    assert_identical(gnp.model.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("make", [WithTeacher, lambda: Net(Centred)], ids=["teacher", "buffer"])
def test_state_after_a_micro_batch_that_failed(tmp_path, make):
    """What the first micro-batch of a window changed before it failed, the others find in both passes."""

    def loss(self, model, inputs):
        value = model(**inputs)["loss"]
        if not self.accelerator.sync_gradients:
            raise torch.OutOfMemoryError
        return value

    def make_skipping(cls):
        own = inner(cls, lambda parent: skipping(with_loss(parent, loss)))
        return trainer_of(tmp_path, own, model=make(), accumulation=2, max_steps=4)

    _, gnp = assert_unmoved_is_plain(make_skipping)
    assert logs_of(gnp, "gnp_sharpness")["gnp_sharpness"] == [0.0] * 4


@pytest.mark.parametrize("first_step", [0, 1])  # the probe sees step 0
@pytest.mark.parametrize(("accumulation", "scope"), [(1, "step"), (2, "step"), (2, "micro_batch")])
def test_number_of_items_changed_in_place(tmp_path, accumulation, scope, first_step):
    def base(parent):
        class Smoothing(parent):
            def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
                if self.state.global_step >= first_step:
                    num_items_in_batch.add_(4)
                logits = model(**inputs)["logits"]
                return cross_entropy(logits, inputs["labels"], reduction="sum") / num_items_in_batch

        return Smoothing

    options = {"accumulation": accumulation, "gnp_scope": scope}
    assert_unmoved_is_plain(lambda cls: trainer_of(tmp_path, inner(cls, base), model=WithNames(), **options))


class KeepsWeights(Net):
    """Its attributes are views of its weights, as those of `torch.nn.utils.spectral_norm` are before a forward."""

    def __init__(self):
        super().__init__()
        self.first = self.layers[0].weight.data
        self.all = [parameter.data for parameter in self.parameters()]
        self.register_buffer("last", self.layers[-1].weight.data, persistent=False)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_views_of_weights_and_gradients_are_not_put_back(tmp_path, alpha, accumulation):
    class KeepsGradients(GNPTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.kept = [parameter.grad for parameter in self.model.parameters()]
            return loss

    settings = {"gnp_alpha": alpha, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, "net", KeepsGradients, model=KeepsWeights(), **settings)
    trainer.train()
    assert_matches_reference(trainer, reference_run("net", accumulation, alpha=alpha, model=KeepsWeights()))


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_attributes_end_as_the_first_pass_left_them(tmp_path, alpha):
    """Part of a graph, as people forget to detach it; in a dictionary; and too large to be copied."""

    class Looks(GNPTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.parts["loss"] = self.last = loss
            self.large = loss.detach().expand(2**15).clone()
            return loss

    class Seen(TrainerCallback):
        def __init__(self):
            self.values = []

        def on_step_end(self, *args, **kwargs):
            self.values.append([trainer.last.item(), trainer.parts["loss"].item(), trainer.large[0].item()])

    seen = Seen()
    setup = attributes(parts=lambda trainer: {})
    trainer = make_trainer(tmp_path, "net", Looks, gnp_alpha=alpha, max_steps=3, callbacks=[seen], setup=setup)
    trainer.train()
    assert seen.values == [[loss] * 3 for loss in logs_of(trainer, "loss")["loss"]]


class Bank(nn.Module):
    """A layer that compares with the features of past batches, which it keeps in a large attribute."""

    size, is_replaced = 5000, False

    def __init__(self):
        super().__init__()
        self.bank = torch.randn(self.size, 7, generator=torch.Generator().manual_seed(0))
        self.place = 0

    def forward(self, x):
        past = self.bank.clone()
        nearest = (x @ past.T).softmax(dim=-1) @ past
        if self.is_replaced:
            self.bank = torch.cat([x.detach(), self.bank[: -len(x)]])
        else:
            self.bank[self.place : self.place + len(x)] = x.detach()
            self.place += len(x)
        return (x + nearest).tanh()


class ReplacedBank(Bank):
    is_replaced = True


# contract? An attribute of 35,000 elements that is written in place, and the size of what is copied.
@pytest.mark.parametrize("layer", [Bank, ReplacedBank])
@pytest.mark.parametrize("budget", [2**26, 0])
def test_queue_of_the_model(tmp_path, monkeypatch, caplog, layer, budget):
    monkeypatch.setattr("hf_gnp.second_pass.running_tensors.BUDGET", budget)
    plain, gnp = (make_unmoved(tmp_path, cls, model=Net(layer)) for cls in BOTH)
    assert_identical(*(run(trainer)["weights"] for trainer in (gnp, plain)))
    assert torch.equal(gnp.model.layers[1].bank, plain.model.layers[1].bank)
    # Nothing tells before the first window that the bank will be written: without a copy that step is a plain one.
    is_unknown = budget == 0 and layer is Bank
    assert logs_of(gnp, "gnp_on")["gnp_on"] == [float(not is_unknown), 1.0, 1.0]
    assert ("Step 0 was not penalised: a large buffer" in caplog.text) == is_unknown


# contract? An attribute of 32,768 elements that is written in place (False).
@pytest.mark.parametrize("is_replaced", [False, True])
def test_queue_of_the_trainer(tmp_path, is_replaced):
    def loss(self, model, inputs):
        if not hasattr(self, "bank"):
            self.bank = torch.zeros(2**15)
        outputs = model(**inputs)
        mean = outputs["logits"].mean()
        value = outputs["loss"] + (mean - self.bank.sum()) ** 2
        bank = self.bank.clone() if is_replaced else self.bank
        bank[self.state.global_step] = mean.detach()
        self.bank = bank
        return value

    assert_unmoved_is_plain(lambda cls: make_unmoved(tmp_path, with_loss(cls, loss)))


def loss_that_keeps_outputs(self, model, inputs):
    """A ModelOutput refuses the methods of a dict. transformers makes hooks for hidden states in the first forward."""
    self.outputs = model(**inputs, output_hidden_states=True)
    return self.outputs.loss + 0.1 * sum(states.pow(2).mean() for states in self.outputs.hidden_states)


# contract? Hooks that transformers registers in a forward, and the state of a layer of bitsandbytes.
@pytest.mark.parametrize(
    "kind, base",
    [("bert", lambda cls: with_loss(cls, loss_that_keeps_outputs)), ("llama-8bit", lambda cls: cls)],
    ids=["bert", "llama-8bit"],
)
def test_model_that_changes_in_its_first_forward(tmp_path, kind, base):
    """It registers hooks; a layer of 8 bit takes over what its weight brought along."""

    def train(cls):
        trainer = make_unmoved(tmp_path, inner(cls, base), kind, max_steps=4, gradient_accumulation_steps=1)
        result = run(trainer)
        hooks = [len(module._forward_hooks) for module in trainer.model.modules()]
        return result["weights"], hooks

    torch.testing.assert_close(*map(train, BOTH), rtol=0, atol=0)


# --- The probe ---

HIDDEN = types.SimpleNamespace(calls=0)  # nothing that the trainer or the model holds


class Hiding(GNPTrainer):
    def compute_loss(self, *args, **kwargs):
        HIDDEN.calls += 1
        return super().compute_loss(*args, **kwargs) * (1 + 0.01 * HIDDEN.calls)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_hidden_state_stops_the_run(tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "gnp_interval": 3}
    trainer = make_trainer(tmp_path, "net", Hiding, **settings)
    weights = []
    trainer.model.register_forward_pre_hook(lambda model, _: weights.append(snapshot(model)))
    with pytest.raises(RuntimeError, match=r"the same weights.*something else.*Hiding\.compute_loss.*gnp_alpha=0"):
        trainer.train()
    assert trainer.state.global_step == 2  # the first penalised step
    assert_identical(snapshot(trainer.model), weights[-1])
    assert all(p.grad is None for p in trainer.model.parameters())
