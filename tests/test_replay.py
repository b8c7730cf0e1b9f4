"""The second pass sees what the first one saw: random numbers, buffers, inputs, windows; and leaves no trace."""

import functools
import random

import numpy as np
import pytest
import torch
from runs import (
    MICRO_BATCH,
    assert_identical,
    assert_matches_reference,
    logs_of,
    make_trainer,
    reference_run,
    run,
    window_loss,
    windows,
)
from tiny import KINDS, Net, collate, make_data, make_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations
from transformers import Trainer

from hf_gnp import GNPTrainer


# A move too short to change any fp32 weight: both passes run at the same weights.
NO_MOVE = 1e-30
STEPS = 2


def dropout_masks(trainer: Trainer) -> list[torch.Tensor]:
    """The masks of all dropout modules in training, in the order of the forwards."""
    masks = []
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, _, output: masks.append(output == 0))
    trainer.train()
    return masks


def by_pass(records: list, accumulation: int) -> tuple[list, list]:
    """The records of the first and of the second passes of `STEPS` steps, without the probe's after the first pass."""
    micro_batch = len(records) // (2 * STEPS * accumulation + 1)
    size = accumulation * micro_batch
    records = [*records[:size], *records[size + micro_batch :]]
    first = [record for start in range(0, len(records), 2 * size) for record in records[start : start + size]]
    second = [record for start in range(size, len(records), 2 * size) for record in records[start : start + size]]
    return first, second


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_dropout_masks_are_those_of_plain_training_in_both_passes(tmp_path, kind, accumulation):
    settings = {"max_steps": STEPS, "gradient_accumulation_steps": accumulation}
    make = functools.partial(make_trainer, tmp_path, kind, **settings)
    plain = dropout_masks(make(Trainer, model=make_model(kind, dropout=0.5)))
    first, second = by_pass(dropout_masks(make(model=make_model(kind, dropout=0.5))), accumulation)
    assert len(plain) >= STEPS * accumulation
    assert len({mask.double().mean() for mask in plain}) > 1  # they are random
    assert_identical(first, plain)
    assert_identical(second, plain)


class NoisyLoss:
    """Its loss draws from Python's and NumPy's generators, as an augmentation in the loss would."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss * (1 + random.random() + np.random.rand() + torch.rand(()))


class NoisyTrainer(NoisyLoss, GNPTrainer):
    pass


class NoisyPlainTrainer(NoisyLoss, Trainer):
    pass


@pytest.mark.parametrize("cls", [GNPTrainer, NoisyTrainer])
@pytest.mark.parametrize("kind", KINDS)
def test_both_passes_draw_the_same_numbers(tmp_path, kind, cls):
    """At a vanishing r the second pass repeats the first bit for bit; in attention, too, whose masks nobody sees."""
    model = make_model(kind, dropout=0.5)
    settings = {"gradient_accumulation_steps": 2, "max_steps": STEPS, "gnp_r": NO_MOVE}
    trainer = make_trainer(tmp_path, kind, cls, model=model, **settings)
    trainer.train()
    assert logs_of(trainer, "gnp_sharpness")["gnp_sharpness"] == [0.0] * STEPS


def test_generators_end_where_plain_training_leaves_them(tmp_path):
    ends = []
    for cls in (NoisyTrainer, NoisyPlainTrainer):
        model = make_model("bert", dropout=0.5)
        settings = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "random"}
        ends.append(run(make_trainer(tmp_path, "bert", cls, model=model, **settings))["generators"])
    assert_identical(*ends)


class MovingMean(nn.Module):
    """Replaces its buffer by another tensor in each forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(7))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.calls += 1
        return x - self.mean


class History(nn.Module):
    """One buffer grows, as a table of positions for the longest sequence yet does; the other is None at first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("means", torch.zeros(1, 7))
        self.register_buffer("last", None)

    def forward(self, x):
        if self.training:
            self.last = x.detach().mean(0, keepdim=True)
            self.means = torch.cat([self.means, self.last])
        return x - self.means.mean(0)


class NamedStatistics(nn.Module):
    """Batch norm by the functional, which writes to its buffers without a new version of them."""

    def __init__(self, mean: str, variance: str):
        super().__init__()
        self.names = mean, variance
        self.register_buffer(mean, torch.zeros(7))
        self.register_buffer(variance, torch.ones(7))

    def forward(self, x):
        return nn.functional.batch_norm(x, *map(self.get_buffer, self.names), training=self.training)


class Instances(nn.Sequential):
    def forward(self, x):
        return super().forward(x.view(len(x), 1, -1)).flatten(1)


WITH_BUFFERS = {
    "batch_norm": lambda: nn.BatchNorm1d(7),
    "batch_norm_without_momentum": lambda: nn.BatchNorm1d(7, momentum=None),
    "instance_norm": lambda: Instances(nn.InstanceNorm1d(1, track_running_stats=True)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(7, 7)),
    "old_spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(7, 7)),
    "replaced": MovingMean,
    "growing": History,
    "functional": functools.partial(NamedStatistics, "running_mean", "running_var"),
    "functional_of_other_names": functools.partial(NamedStatistics, "average", "spread"),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("layer", WITH_BUFFERS)
def test_buffers_are_those_of_plain_training(tmp_path, layer, accumulation):
    ends = []
    for cls in (GNPTrainer, Trainer):
        model = Net(WITH_BUFFERS[layer])
        start = {name: value.clone() for name, value in model.named_buffers()}
        settings = {"learning_rate": 0.0, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(tmp_path, "net", cls, model=model, max_steps=3, **settings)
        trainer.train()
        ends.append(dict(model.named_buffers()))
    result, expected = ends
    assert any(not torch.equal(expected[name], value) for name, value in start.items())
    assert_identical(result, expected)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("layer", WITH_BUFFERS)
def test_second_pass_sees_the_buffers_of_the_first(tmp_path, layer, accumulation):
    """Else the two gradients are of two losses, and differ by more than the move, however small r is."""
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": STEPS, "gnp_r": NO_MOVE}
    trainer = make_trainer(tmp_path, "net", model=Net(WITH_BUFFERS[layer]), **settings)
    trainer.train()
    assert logs_of(trainer, "gnp_sharpness")["gnp_sharpness"] == [0.0] * STEPS


class MaskingTrainer(GNPTrainer):
    """Masks and mixes its inputs in place, as masked language modelling and mixup do; `clones` makes copies first."""

    clones = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x = inputs["x"].clone() if self.clones else inputs["x"]
        share = random.random()
        x.masked_fill_(torch.rand_like(x) < 0.3, 0.0)
        x.mul_(share).add_((1 - share) * x.flip(0))
        return super().compute_loss(model, {**inputs, "x": x}, num_items_in_batch=num_items_in_batch)


class CloningTrainer(MaskingTrainer):
    clones = True


def test_loss_may_change_its_inputs_in_place(tmp_path):
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2}
    in_place, cloned = (
        run(make_trainer(tmp_path, "net", cls, model=Net(nn.Tanh), **settings))
        for cls in (MaskingTrainer, CloningTrainer)
    )
    assert_identical(in_place, cloned)


class InPlaceNet(Net):
    def forward(self, x, labels):
        return super().forward(x.mul_(2), labels)


class CloningNet(Net):
    def forward(self, x, labels):
        return super().forward(x * 2, labels)


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_model_may_change_its_inputs_in_place(tmp_path, alpha):
    settings = {"gnp_alpha": alpha, "gradient_accumulation_steps": 2}
    in_place, cloned = (
        run(make_trainer(tmp_path, "net", model=cls(nn.Tanh), **settings)) for cls in (InPlaceNet, CloningNet)
    )
    assert_identical(in_place, cloned)


class PoppingTrainer(GNPTrainer):
    """Takes a key out of the very dict that the data loader gave, puts another in, and changes a nested one."""

    def _prepare_inputs(self, inputs):
        x, nested = inputs.pop("wrapped"), inputs.pop("nested")
        return super()._prepare_inputs({"x": x * nested.pop("factor"), "labels": inputs["labels"]})


def test_inputs_may_lose_and_gain_keys(tmp_path):
    def collate_wrapped(samples):
        batch = collate(samples)
        return {"wrapped": batch["x"], "labels": batch["labels"], "nested": {"factor": torch.tensor(2.0)}}

    popping = make_trainer(tmp_path, "net", PoppingTrainer, model=Net(nn.Tanh), remove_unused_columns=False)
    popping.data_collator = collate_wrapped
    result = run(popping)
    doubled = [{"x": 2 * sample["x"], "labels": sample["labels"]} for sample in make_data("net")]
    assert_identical(result, run(make_trainer(tmp_path, "net", model=Net(nn.Tanh), data=doubled)))


# The last micro-batch is smaller, and the last window has fewer micro-batches: 11 full ones and one of 2 samples.
RAGGED_SIZE = 11 * MICRO_BATCH + 2


@pytest.mark.parametrize("accumulation", [5, 8])
@pytest.mark.parametrize("kind", [*KINDS, "net"])
def test_incomplete_last_window(tmp_path, kind, accumulation):
    data = make_data(kind, RAGGED_SIZE)
    make = {"net": functools.partial(Net, nn.Tanh)}.get(kind, functools.partial(make_model, kind))
    trainer = make_trainer(tmp_path, kind, model=make(), data=data, gradient_accumulation_steps=accumulation)
    trainer.train()
    steps = windows(kind, accumulation, data)
    assert len(steps[-1]) < accumulation
    assert_matches_reference(trainer, reference_run(kind, accumulation, model=make(), steps=steps))


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


@pytest.mark.parametrize("kind", KINDS)
def test_iterable_dataset(tmp_path, kind):
    data = make_data(kind)
    trainer = make_trainer(tmp_path, kind, data=Stream(data), max_steps=4, gradient_accumulation_steps=2)
    trainer.train()
    assert_matches_reference(trainer, reference_run(kind, 2, steps=windows(kind, 2, data)[:4]))


def test_micro_batches_left_over_at_the_end_of_a_stream(tmp_path):
    """`Trainer` does not step on them: their gradient stays, and is part of the next epoch's first step."""
    data = make_data("net", 10 * MICRO_BATCH)
    settings = {"max_steps": 4, "gradient_accumulation_steps": 4}
    trainer = make_trainer(tmp_path, "net", model=Net(nn.Tanh), data=Stream(data), **settings)
    trainer.train()
    first, second, leftover = windows("net", 4, data)
    steps = [[first], [second], [leftover, first], [second]]

    def loss(model, parts):
        return sum(window_loss(model, part) for part in parts)

    assert_matches_reference(trainer, reference_run("net", 4, model=Net(nn.Tanh), steps=steps, loss=loss))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_label_smoothing(tmp_path, accumulation):
    settings = {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, "vit", **settings)
    trainer.train()

    def loss(model, window):
        losses = [cross_entropy(model(b["pixel_values"]).logits, b["labels"], label_smoothing=0.2) for b in window]
        return sum(losses) / len(losses)

    assert_matches_reference(trainer, reference_run("vit", accumulation, loss=loss))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_loss_function_with_number_of_items(tmp_path, accumulation):
    """A user's loss, the mean over all the labels of the window that are not ignored: -100 here, as many as come."""
    data = make_data("net")
    for sample in data[::3]:
        sample["labels"] = torch.tensor(-100)

    def sum_over_items(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    class UnlabelledNet(Net):
        def forward(self, x, labels=None):
            return {"logits": self.layers(x)}

    settings = {"compute_loss_func": sum_over_items, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, "net", model=UnlabelledNet(nn.Tanh), data=data, **settings)
    trainer.train()

    def loss(model, window):
        items = sum((batch["labels"] != -100).sum() for batch in window)
        return sum(sum_over_items(model(batch["x"]), batch["labels"], items) for batch in window)

    steps = windows("net", accumulation, data)
    expected = reference_run("net", accumulation, model=UnlabelledNet(nn.Tanh), steps=steps, loss=loss)
    assert_matches_reference(trainer, expected)
