"""The second pass draws the random numbers of the first, and leaves the generators as plain training does."""

import functools
import random

import numpy as np
import pytest
import torch
from runs import assert_identical, assert_unmoved_is_plain, logs_of, make_trainer, make_unmoved, run, with_loss
from tiny import KINDS, Net, UnlabelledNet, make_model
from torch import nn
from transformers import Trainer, default_data_collator

from hf_gnp import GNPTrainer


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
def test_dropout_masks(tmp_path, kind, accumulation):
    """Those of both passes are those of plain training."""
    settings = {"max_steps": STEPS, "gradient_accumulation_steps": accumulation}
    make = functools.partial(make_trainer, tmp_path, kind, **settings)
    plain = dropout_masks(make(Trainer, model=make_model(kind, dropout=0.5)))
    first, second = by_pass(dropout_masks(make(model=make_model(kind, dropout=0.5))), accumulation)
    assert len(plain) >= STEPS * accumulation
    assert len({mask.double().mean() for mask in plain}) > 1  # they are random
    assert_identical(first, plain)
    assert_identical(second, plain)


def noisy(cls):
    """Its loss draws from Python's and NumPy's generators, as an augmentation in the loss would."""

    class Noisy(cls):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (1 + random.random() + np.random.rand() + torch.rand(()))

    return Noisy


@pytest.mark.parametrize("cls", [GNPTrainer, noisy(GNPTrainer)])
@pytest.mark.parametrize("kind", KINDS)
def test_both_passes_draw_the_same_numbers(tmp_path, kind, cls):
    """Without a perturbation the second pass repeats the first bit for bit, masks in attention included."""
    trainer = make_unmoved(tmp_path, cls, kind, model=make_model(kind, dropout=0.5))
    trainer.train()
    assert logs_of(trainer, "gnp_sharpness")["gnp_sharpness"] == [0.0] * 3


def test_generators_end_as_in_plain_training(tmp_path):
    ends = []
    for cls in (noisy(GNPTrainer), noisy(Trainer)):
        settings = {"model": make_model("bert", dropout=0.5), "train_sampling_strategy": "random"}
        ends.append(run(make_trainer(tmp_path, "bert", cls, gradient_accumulation_steps=2, **settings))["generators"])
    assert_identical(*ends)


# --- Generators of the user's ---

DRAWS = {
    "torch": (lambda: torch.Generator().manual_seed(3), lambda generator: torch.rand((), generator=generator).item()),
    "numpy": (lambda: np.random.default_rng(3), lambda generator: generator.random()),
    "numpy_state": (lambda: np.random.RandomState(3), lambda generator: generator.rand()),
    "python": (lambda: random.Random(3), lambda generator: generator.random()),
}


class Draws:
    """A plain object of the user's with a generator in an attribute."""

    def __init__(self, name: str):
        make, self.draw_from = DRAWS[name]
        self.generator = make()

    def draw(self) -> float:
        return self.draw_from(self.generator)

    def __call__(self, outputs, labels, num_items_in_batch=None):
        """As a loss function."""
        return nn.functional.cross_entropy(outputs["logits"], labels) * (1 + self.draw())


class DrawingNet(Net):
    def __init__(self, draws):
        super().__init__()
        self.draws = draws

    def forward(self, x, labels):
        return super().forward(x * (1 + self.draws.draw()), labels)


class Collator:
    def __init__(self, draws):
        self.draws = draws

    def __call__(self, samples):
        return default_data_collator(samples)


def own_generator(trainer, model, inputs):
    return model(**inputs)["loss"] * (1 + trainer.own.draw())


def generator_of_the_collator(trainer, model, inputs):
    return model(**inputs)["loss"] * (1 + trainer.data_collator.draws.draw())


OWNERS = {
    "model": lambda cls, draws: (cls, {"model": DrawingNet(draws)}),
    "loss": lambda cls, draws: (cls, {"model": UnlabelledNet(), "compute_loss_func": draws}),
    "trainer": lambda cls, draws: (with_loss(cls, own_generator), {"setup": lambda own: setattr(own, "own", draws)}),
    "collator": lambda cls, draws: (with_loss(cls, generator_of_the_collator), {"data_collator": Collator(draws)}),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("owner", OWNERS)
def test_generator_of_the_users(tmp_path, owner, name):
    def make(cls):
        trainer_cls, options = OWNERS[owner](cls, Draws(name))
        return make_unmoved(tmp_path, trainer_cls, **options)

    assert_unmoved_is_plain(make)
