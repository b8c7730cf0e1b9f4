"""State that people keep in all kinds of places: a penalised run that moves nothing is plain training."""

import collections
import copy
import types

import numpy as np
import pytest
import torch
from runs import assert_identical, make_trainer, run
from tiny import Net, collate
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import Trainer, TrainerCallback

from hf_gnp import GNPMixin, GNPTrainer


UNMOVED = {"gnp_alpha": 1.0, "gnp_r": 1e-30, "gnp_warmup_type": "none"}
CASES = {}


def case(make):
    """`make(cls)` returns a class of trainer and what `trainer_of` takes."""
    CASES[make.__name__] = make
    return make


def trainer_of(tmp_path, cls, accumulation=1, model=None, setup=None, gnp=None, **options):
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 6, "learning_rate": 0.05, **options}
    if issubclass(cls, GNPMixin):
        settings |= UNMOVED | (gnp or {})
    trainer = make_trainer(tmp_path, "net", cls, model=Net(nn.Tanh) if model is None else model, **settings)
    if setup is not None:
        setup(trainer)
    return trainer


@case
def hidden_state_with_its_graph(cls):
    class Recurrent(Net):
        def __init__(self):
            super().__init__()
            self.cell, self.head, self.hidden = nn.GRUCell(5, 7), nn.Linear(7, 3), None

        def forward(self, x, labels):
            before = torch.zeros(len(x), 7) if self.hidden is None else self.hidden.detach()
            self.hidden = self.cell(x, before)
            return {"loss": cross_entropy(self.head(self.hidden), labels)}

    return cls, {"model": Recurrent()}


@case
def logits_of_the_last_step(cls):
    class Consistent(cls):
        last = None

        def compute_loss(self, model, inputs, *args, **kwargs):
            outputs = model(**inputs)
            loss = outputs["loss"]
            if self.last is not None:
                loss = loss + 0.1 * mse_loss(outputs["logits"], self.last.detach())
            self.last = outputs["logits"]
            return loss

    return Consistent, {}


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


def follow(teacher, model):
    with torch.no_grad():
        for slow, weight in zip(teacher.parameters(), model.parameters(), strict=True):
            slow.lerp_(weight, 0.1)


@case
def teacher_in_an_object(cls):
    class Taught(cls):
        def compute_loss(self, model, inputs, *args, **kwargs):
            outputs, teacher = model(**inputs), self.kept.teacher
            with torch.no_grad():
                target = teacher(**inputs)["logits"]
            loss = outputs["loss"] + mse_loss(outputs["logits"], target + 0.1)
            follow(teacher, model)
            return loss

    class Kept:
        pass

    def setup(trainer):
        trainer.kept = Kept()
        trainer.kept.teacher = copy.deepcopy(trainer.model).requires_grad_(False)

    return Taught, {"setup": setup}


@case
def teacher_in_a_list_of_the_model(cls):
    class Taught(Net):
        def __init__(self):
            super().__init__(nn.Tanh)
            self.hidden = [copy.deepcopy(self.layers).requires_grad_(False)]  # not in the state dict

        def forward(self, x, labels):
            outputs = super().forward(x, labels)
            with torch.no_grad():
                target = self.hidden[0](x) + 0.1
            outputs["loss"] = outputs["loss"] + mse_loss(outputs["logits"], target)
            follow(self.hidden[0], self.layers)
            return outputs

    return cls, {"model": Taught()}


def with_discriminator(cls, learning_rate):
    class Adversarial(cls):
        second_scheduler = None

        def compute_loss(self, model, inputs, *args, **kwargs):
            outputs = model(**inputs)
            self.second_optimizer.zero_grad()
            self.critic(outputs["logits"].detach()).mean().backward()
            self.second_optimizer.step()
            if self.second_scheduler is not None:
                self.second_scheduler.step()
            return outputs["loss"] + 0.1 * self.critic(outputs["logits"]).mean()

    def setup(trainer):
        torch.manual_seed(1)
        trainer.critic = nn.Linear(3, 1)
        trainer.second_optimizer = torch.optim.Adam(trainer.critic.parameters(), lr=learning_rate)

    return Adversarial, setup


@case
def optimizer_of_a_discriminator(cls):
    trainer_cls, setup = with_discriminator(cls, learning_rate=1e-2)
    return trainer_cls, {"setup": setup}


@case
def scheduler_of_a_discriminator(cls):
    trainer_cls, setup = with_discriminator(cls, learning_rate=1e-1)

    def with_scheduler(trainer):
        setup(trainer)
        trainer.second_scheduler = torch.optim.lr_scheduler.StepLR(trainer.second_optimizer, 2, 0.5)

    return trainer_cls, {"setup": with_scheduler, "accumulation": 2}


class StepsMultiplier(TrainerCallback):
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.optimizer.step()
        self.optimizer.zero_grad()


@case
def multiplier_that_the_loss_moves(cls):
    """From the third step on, when the probe is long over."""

    class Constrained(cls):
        def compute_loss(self, model, inputs, *args, **kwargs):
            outputs = model(**inputs)
            excess = outputs["logits"].pow(2).mean() - 0.1
            loss = outputs["loss"] + self.multiplier.detach().clone() * excess
            if self.state.global_step >= 2:
                (self.multiplier * excess.detach()).backward()
                self.second_optimizer.step()
                self.second_optimizer.zero_grad()
            return loss

    def setup(trainer):
        trainer.multiplier = nn.Parameter(torch.tensor(0.5))
        trainer.second_optimizer = torch.optim.SGD([trainer.multiplier], lr=0.5, maximize=True)

    return Constrained, {"setup": setup, "accumulation": 2}


@pytest.mark.parametrize("where", ["attribute", "list", "module"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("gnp", [{}, {"gnp_ascent_fraction": 0.5}], ids=["whole", "part"])
def test_a_multiplier_that_the_backward_reaches_has_the_gradient_of_one_pass(tmp_path, where, accumulation, gnp):
    """No step of the trainer's moves it: its own optimizer does."""

    def trained(cls):
        class Constrained(cls):
            def compute_loss(self, model, inputs, *args, **kwargs):
                outputs = model(**inputs)
                loss = outputs["loss"] + parameter_of(self) * (outputs["logits"].pow(2).mean() - 0.1)
                return loss / self.args.gradient_accumulation_steps

        def parameter_of(trainer):
            kept = trainer.kept
            return kept if where == "attribute" else kept[0] if where == "list" else kept.weight[0, 0]

        def setup(trainer):
            torch.manual_seed(1)
            parameter = nn.Parameter(torch.tensor(0.5))
            trainer.kept = {"attribute": parameter, "list": [parameter], "module": nn.Linear(1, 1, bias=False)}[where]
            own = trainer.kept.weight if where == "module" else parameter
            trainer.add_callback(StepsMultiplier(torch.optim.SGD([own], lr=0.5, maximize=True)))

        options = {"setup": setup, "accumulation": accumulation, "gnp": gnp}
        trainer = trainer_of(tmp_path, Constrained, **options)
        trainer.train()
        return parameter_of(trainer).item(), trainer.model.state_dict()

    expected, result = trained(Trainer), trained(GNPTrainer)
    assert expected[0] != 0.5
    # A part of the rows is a step's gradient in another order of addition.
    close = {"rtol": 0, "atol": 0} if not gnp else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(result, expected, **close)


@case
def order_of_a_dict(cls):
    class Banked(cls):
        def compute_loss(self, model, inputs, *args, **kwargs):
            outputs = model(**inputs)
            pairs = zip((1.0, 0.5), self.banks.values(), strict=True)
            return outputs["loss"] + sum(w * (outputs["logits"].mean(0) - bank[:3]).pow(2).sum() for w, bank in pairs)

    def setup(trainer):
        trainer.banks = {"image": torch.ones(20_000), "text": torch.zeros(3)}

    return Banked, {"setup": setup}


class RunningLoss:
    def __init__(self):
        self.mean, self.count = 0.0, 0

    def compute(self, outputs, labels, num_items_in_batch=None):
        labels = torch.zeros(len(outputs["logits"]), dtype=torch.long) if labels is None else labels
        loss = cross_entropy(outputs["logits"], labels)
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * loss.item()
        return loss * (1 + (self.mean if self.count > 3 else 0))


@case
def bound_method_as_the_loss(cls):
    class Unlabelled(Net):
        def forward(self, x):
            return {"logits": self.layers(x)}

    return cls, {"compute_loss_func": RunningLoss().compute, "model": Unlabelled(nn.Tanh)}


@case
def noise_on_gradients(cls):
    model, generator = Net(nn.Tanh), torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient + 0.1 * torch.randn(gradient.shape, generator=generator))
    return cls, {"model": model}


@case
def noise_in_a_forward_hook(cls):
    model, generator = Net(nn.Tanh), torch.Generator().manual_seed(3)
    noise = lambda module, inputs, output: output + 0.1 * torch.randn(output.shape, generator=generator)  # noqa: E731
    model.layers[0].register_forward_hook(noise)
    return cls, {"model": model}


@case
def generator_of_a_class(cls):
    class Random(cls):
        generator = np.random.default_rng(0)

        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(**inputs)["loss"] * (1 + 0.1 * self.generator.random())

    return Random, {}


@case
def frozen_parameter_of_the_trainer(cls):
    class Centred(cls):
        def compute_loss(self, model, inputs, *args, **kwargs):
            outputs = model(**inputs)
            loss = outputs["loss"] + (outputs["logits"] - self.centre).pow(2).mean()
            with torch.no_grad():
                self.centre.mul_(0.9).add_(0.1 * outputs["logits"].mean(0))
            return loss

    def setup(trainer):
        trainer.centre = nn.Parameter(torch.zeros(3), requires_grad=False)

    return Centred, {"setup": setup}


@case
def hook_that_the_first_loss_registers(cls):
    class Hooked(cls):
        features = None

        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.features is None:
                self.features = []
                model.layers[0].register_forward_hook(lambda module, inputs, output: self.features.append(output))
            self.features.clear()
            loss = model(**inputs)["loss"]
            return loss + 0.1 * sum(feature.pow(2).mean() for feature in self.features)

    return Hooked, {"accumulation": 2}


class Graph:
    """A batch that knows itself, and where it comes from."""

    def __init__(self, **attributes):
        vars(self).update(attributes, itself=self, source=Handle())


class Handle:
    def __init__(self):
        self.file = "features.h5"

    def __copy__(self):
        raise TypeError("an open file has no copy")


def with_inputs(pack, unpack):
    """`pack(x)` is what holds a batch's features, which the forward writes into; `unpack` returns them."""

    def make(cls):
        class Writing(Net):
            def forward(self, packed, labels):
                unpack(packed).mul_(2).add_(1)
                return super().forward(unpack(packed).clone(), labels)

        def collated(samples):
            batch = collate(samples)
            return {"packed": pack(batch["x"]), "labels": batch["labels"]}

        def setup(trainer):
            trainer.data_collator = collated

        return cls, {"model": Writing(nn.Tanh), "setup": setup, "accumulation": 2, "remove_unused_columns": False}

    return make


CASES |= {
    "inputs_in_an_object": with_inputs(lambda x: Graph(x=x), lambda graph: graph.x),
    "inputs_in_an_object_in_an_object": with_inputs(lambda x: Graph(g=Graph(x=x)), lambda graph: graph.itself.g.x),
    "inputs_in_a_dict_in_an_object": with_inputs(lambda x: Graph(store={"x": x}), lambda graph: graph.store["x"]),
    "inputs_in_a_namespace": with_inputs(lambda x: types.SimpleNamespace(x=x), lambda space: space.x),
    "inputs_in_a_deque": with_inputs(lambda x: collections.deque([x], maxlen=1), lambda queue: queue[0]),
    "inputs_in_a_set": with_inputs(lambda x: {x}, lambda values: next(iter(values))),
}


@case
def generator_in_the_inputs(cls):
    class Noisy(Net):
        def forward(self, x, labels, generator):
            return super().forward(x + 0.1 * torch.randn(x.shape, generator=generator), labels)

    def setup(trainer):
        generator = torch.Generator().manual_seed(3)
        trainer.data_collator = lambda samples: {**collate(samples), "generator": generator}

    return cls, {"model": Noisy(nn.Tanh), "setup": setup}


class Meter:
    value = 0.0


@case
def meters_in_a_dict_of_a_layer(cls):
    class Metered(nn.Module):
        def __init__(self):
            super().__init__()
            self.meters, self.calls = {"a": Meter()}, 0

        def forward(self, x):
            self.meters["a"].value = 0.9 * self.meters["a"].value + 0.1 * x.abs().mean().item()
            self.calls += 1
            return x * (1 + (self.calls > 3) * self.meters["a"].value)

    return cls, {"model": Net(Metered)}


@case
def meter_made_in_the_loss(cls):
    class Lazy(cls):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if not hasattr(self, "meter"):
                self.meter = Meter()
            self.meter.value += 1
            return model(**inputs)["loss"] * (1 + 0.1 * self.meter.value)

    return Lazy, {}


@case
def layer_of_a_compiled_model(cls):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = torch.zeros(7)

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean

    class WithNames(Net):
        def forward(self, x, labels, **kwargs):
            return super().forward(x, labels)

    model = torch.compile(WithNames(Centred), backend="eager")
    return cls, {"model": model, "remove_unused_columns": False}


@case
def attribute_with_deepspeeds_prefix(cls):
    class Counting(cls):
        ds_count = 0

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.ds_count += 1
            return model(**inputs)["loss"] * (1 + 0.1 * max(0, self.ds_count - 3))

    return Counting, {}


@case
def buffer_that_starts_late(cls):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(7))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            centred = x - self.mean
            if self.calls > 4:
                self.mean.lerp_(x.detach().mean(0), 0.5)
            return centred

    return cls, {"model": Net(Late)}


@case
def parameter_in_the_inputs(cls):
    class Prompted(Net):
        def __init__(self):
            super().__init__(nn.Tanh)
            self.prompt = nn.Parameter(torch.zeros(5))

        def forward(self, x, labels, prompt):
            return super().forward(x + prompt, labels)

    class Prompting(cls):
        def _prepare_inputs(self, inputs):
            return {**super()._prepare_inputs(inputs), "prompt": self.model.prompt}

    return Prompting, {"model": Prompted()}


@case
def object_in_the_inputs_that_the_forward_edits(cls):
    class Graph:
        def __init__(self, x):
            self.x = x

    class Edits(Net):
        def forward(self, graph, labels):
            graph.x = graph.x * 1.5
            return super().forward(graph.x, labels)

    def setup(trainer):
        stack = trainer.data_collator

        def collate(samples):
            batch = stack(samples)
            return {"graph": Graph(batch["x"]), "labels": batch["labels"]}

        trainer.data_collator = collate

    return cls, {"model": Edits(nn.Tanh), "setup": setup, "remove_unused_columns": False}


@case
def evaluation_mode_left_by_the_loss(cls):
    class Measuring(cls):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = model(**inputs)["loss"]
            model.eval()
            with torch.no_grad():
                self.accuracy = (model(**inputs)["logits"].argmax(-1) == inputs["labels"]).float().mean().item()
            return loss

    return Measuring, {"model": Net(lambda: nn.Dropout(0.5))}


def following_teacher(cls):
    class Taught(cls):
        def compute_loss(self, model, inputs, *args, **kwargs):
            outputs = model(**inputs)
            follow(self.teacher, model)
            with torch.no_grad():
                target = self.teacher(**inputs)["logits"] + 0.1
            return outputs["loss"] + mse_loss(outputs["logits"], target)

    def setup(trainer):
        trainer.teacher = copy.deepcopy(trainer.model).requires_grad_(False)

    return Taught, {"setup": setup}


@case
def teacher_of_weights_that_do_not_move_at_first(cls):
    """The first step of a warm-up has a learning rate of 0."""
    trainer_cls, options = following_teacher(cls)
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": 3, "learning_rate": 0.5}
    return trainer_cls, {**options, **schedule, "optim": "sgd"}


def test_a_teacher_with_a_window_for_each_micro_batch(tmp_path):
    """The first windows of a run are all of its first step, in which the teacher is a copy of the weights."""
    found = []
    for cls in (Trainer, GNPTrainer):
        trainer_cls, options = following_teacher(cls)
        torch.manual_seed(0)
        options |= {"accumulation": 2, "learning_rate": 0.5, "gnp": {"gnp_scope": "micro_batch"}}
        trainer = trainer_of(tmp_path, trainer_cls, **options)
        trainer.train()
        found.append(trainer.model.state_dict())
    # Gradients are added in another order; a teacher that follows the moved weights in one window gives 1e-4.
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@case
def weights_that_the_loss_moves_and_the_step_puts_back(cls):
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


@pytest.mark.parametrize("scope, expected", [("step", [0, 1, 0, 1]), ("micro_batch", [0, 0, 1, 1])])
def test_the_second_pass_sees_accelerates_flag_of_the_first(tmp_path, scope, expected):
    seen = []

    class Asks(GNPTrainer):
        def compute_loss(self, *args, **kwargs):
            seen.append(int(self.accelerator.sync_gradients))
            return super().compute_loss(*args, **kwargs)

    trainer_of(tmp_path, Asks, accumulation=2, gnp={"gnp_scope": scope}, max_steps=2).train()
    assert seen[-4:] == expected


@case
def tree_with_links_to_parents(cls):
    def setup(trainer):
        trainer.tree = {"children": []}
        trainer.tree["children"].append({"parent": trainer.tree})

    return cls, {"setup": setup}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_moves_nothing_is_plain_training(tmp_path, name):
    results = []
    for cls in (Trainer, GNPTrainer):
        trainer_cls, options = CASES[name](cls)
        torch.manual_seed(0)
        results.append(run(trainer_of(tmp_path, trainer_cls, **options)))
    expected, result = results
    result["logs"] = [{k: v for k, v in log.items() if not k.startswith("gnp")} for log in result["logs"]]
    assert_identical(result, expected)


def test_weights_of_classes_with_a_part_of_the_rows(tmp_path):
    """At a move of nothing the step is plain training's: the first rows only say which way."""

    def train(cls):
        class Weighted(cls):
            def compute_loss(self, model, inputs, *args, **kwargs):
                return cross_entropy(model(**inputs)["logits"], inputs["labels"], weight=self.weight)

        trainer = trainer_of(tmp_path, Weighted, gnp={"gnp_ascent_fraction": 0.5})
        trainer.weight = torch.tensor([1.0, 2.0, 0.5])
        trainer.train()
        return trainer.model.state_dict()

    torch.testing.assert_close(train(GNPTrainer), train(Trainer), rtol=0, atol=0)


def test_inputs_with_a_graph_are_refused(tmp_path):
    class Embedding(GNPTrainer):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            return {**inputs, "x": inputs["x"] * self.model.layers[0].bias.mean()}

    with pytest.raises(NotImplementedError, match="inputs of compute_loss have a graph"):
        trainer_of(tmp_path, Embedding).train()


def inner(cls, base):
    """`GNPMixin` before a trainer of the user's own, as the docs say."""
    own = base(Trainer)
    return type("Own", (GNPMixin, own), {}) if issubclass(cls, GNPMixin) else own


@pytest.mark.parametrize("when", ["before", "in the forward"])
def test_a_batch_that_an_inner_trainer_skips(tmp_path, when):
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
                    try:
                        return super().training_step(*args, **kwargs)
                    except torch.OutOfMemoryError:
                        return torch.zeros(())

            return Own

        trainer = trainer_of(tmp_path, inner(cls, base), accumulation=2, model=Failing(nn.Tanh))
        trainer.train()
        return trainer.model.state_dict()

    torch.testing.assert_close(results_of(GNPTrainer), results_of(Trainer), rtol=0, atol=0)


def test_an_inner_trainer_that_steps_twice_is_refused(tmp_path):
    def base(parent):
        class Twice(parent):
            def training_step(self, *args, **kwargs):
                super().training_step(*args, **kwargs)
                return super().training_step(*args, **kwargs)

        return Twice

    with pytest.raises(NotImplementedError, match="calls training_step twice"):
        trainer_of(tmp_path, inner(GNPTrainer, base)).train()


class KeepsOutputs(Trainer):
    """A ModelOutput refuses the methods of a dict. transformers makes hooks for hidden states in the first forward."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.outputs = model(**inputs, output_hidden_states=True)
        return self.outputs.loss + 0.1 * sum(states.pow(2).mean() for states in self.outputs.hidden_states)


class PenalisedKeepsOutputs(GNPMixin, KeepsOutputs): ...


@pytest.mark.parametrize(
    "kind, classes", [("bert", (PenalisedKeepsOutputs, KeepsOutputs)), ("llama-8bit", (GNPTrainer, Trainer))]
)
def test_a_model_that_changes_in_its_first_forward(tmp_path, kind, classes):
    """It registers hooks; a layer of 8 bit takes over what its weight brought along."""

    def train(cls):
        unmoved = UNMOVED if issubclass(cls, GNPMixin) else {}
        trainer = make_trainer(tmp_path, kind, cls, max_steps=4, **unmoved)
        result = run(trainer)
        hooks = [len(module._forward_hooks) for module in trainer.model.modules()]
        return result["weights"], hooks

    torch.testing.assert_close(train(classes[0]), train(classes[1]), rtol=0, atol=0)
