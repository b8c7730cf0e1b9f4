"""`find_r` on one process, against a loop in float64 that is written out here."""

import copy
import math

import numpy as np
import pytest
import reference
import torch
from runs import assert_identical, make_trainer, run
from test_sharpness import in_double, interrupt_everywhere
from test_sharpness_tools import assert_is_picture
from tiny import LABELS, Net, collate, make_data
from torch import nn
from transformers import Trainer, TrainerCallback, set_seed

from hf_gnp.sharpness import find_r
from hf_gnp.sharpness.find_r import suggest


RADII = [0.01, 0.1, 0.5]
MICRO_BATCH, SEED = 4, 3
NAMES = ("cosine", "rise", "kept")


def learnable(size=48):
    """Samples whose labels follow from them: with random ones, batches have no descent in common."""
    return [{**sample, "labels": sample["x"][:LABELS].argmax()} for sample in make_data("net", size=size)]


def trainer_of(folder, model, data=None, **args):
    return make_trainer(folder, "net", model=model, data=data or learnable(), **args)


def reference_steps(data, accumulation, count):
    """The numbered micro-batches of each step: the samples in the order of the permutation."""
    rows = np.random.default_rng(SEED).permutation(len(data))
    micro_batches = [[data[row] for row in rows[i : i + MICRO_BATCH]] for i in range(0, len(rows), MICRO_BATCH)]
    numbered = list(enumerate(micro_batches))
    steps = [numbered[i : i + accumulation] for i in range(0, len(numbered) - accumulation + 1, accumulation)]
    return steps[:count]


DIRECTIONS = {
    "l2": reference.along_the_gradient,
    "layer": reference.in_proportion_to_each_tensor,
    "element": reference.scale_invariant,
}


def loss_of(model, step):
    loss = 0.0
    for number, samples in step:
        set_seed(SEED + number)
        loss = loss + model(**collate(in_double(samples)))["loss"] / len(step)
    return loss


class Reference:
    """The loss of training and its gradient, in float64."""

    def __init__(self, model, targets=()):
        self.model = copy.deepcopy(model).double().train()
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.targets = targets or self.named

    def gradients(self, step, moves=None):
        moves = moves or [torch.zeros_like(p) for p in self.named.values()]
        loss, gradients = reference.gradient_at(self.model, moves, loss_of, step)
        return loss.item(), gradients

    def moves(self, gradients, metric, r):
        chosen = [g if name in self.targets else 0 * g for name, g in zip(self.named, gradients, strict=True)]
        return [r * e for e in DIRECTIONS[metric]([p.detach() for p in self.named.values()], chosen)]

    def find_r(self, steps, batches, metric):
        firsts = [self.gradients(step) for step in steps]
        columns = {name: [] for name in NAMES}
        for r in RADII:
            cosines, rises, before, after = [], [], [], []
            for number, step in enumerate(steps[:batches]):
                loss, first = firsts[number]
                others = torch.stack([flat(g) for i, (_, g) in enumerate(firsts) if i != number]).mean(dim=0)
                moved_loss, second = self.gradients(step, self.moves(first, metric, r))
                cosines.append(torch.cosine_similarity(flat(first), flat(second), dim=0).item())
                rises.append(moved_loss - loss)
                before.append((flat(first) @ others).item())
                after.append((flat(second) @ others).item())
            ratio = sum(after) / sum(before)
            residuals = [(a - ratio * b) / np.mean(before) for a, b in zip(after, before, strict=True)]
            columns["cosine"].append((np.mean(cosines), standard_error(cosines)))
            columns["rise"].append((np.mean(rises), standard_error(rises)))
            columns["kept"].append((ratio, standard_error(residuals)))
        result = {name: [mean for mean, _ in column] for name, column in columns.items()}
        result |= {f"{name}_standard_error": [error for _, error in column] for name, column in columns.items()}
        result["loss"] = np.mean([loss for loss, _ in firsts[:batches]])
        result["grad_norm"] = np.mean([flat(g).norm().item() for _, g in firsts[:batches]])
        return result


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def standard_error(values):
    return np.std(values, ddof=1) / math.sqrt(len(values))


def assert_matches(result, expected, tolerance):
    for name, value in expected.items():
        # Of differences, as rises are, the tolerance is a share of the loss.
        assert result[name] == pytest.approx(value, rel=tolerance, abs=tolerance * expected["loss"]), name
    assert result["rise_share"] == pytest.approx(np.array(expected["rise"]) / expected["loss"], abs=tolerance)


class PartlyUnused(Net):
    """With a parameter that gets no gradient, one of norm 0, and a frozen one."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.unused, self.frozen = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5), requires_grad=False)
        nn.init.zeros_(self.layers[0].bias)


@pytest.mark.parametrize("metric", ["l2", "layer", "element"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_against_a_loop_in_float64(tmp_path, metric, accumulation):
    """In fp32, in training mode with BatchNorm."""
    model = Net(lambda: nn.BatchNorm1d(7), nn.Tanh)
    trainer = trainer_of(tmp_path, model, gradient_accumulation_steps=accumulation)
    result = trainer.find_r(radii=RADII, batches=2, seed=SEED, metric=metric, log=False)
    expected = Reference(model).find_r(reference_steps(trainer.train_dataset, accumulation, 16), 2, metric)
    assert_matches(result, expected, 1e-4)  # fp32 sums; seen: 2e-6
    assert result["radii"] == RADII and result["metric"] == metric and result["batches"] == 2


@pytest.mark.parametrize("metric", ["l2", "layer", "element"])
def test_dropout_has_the_same_mask_in_all_passes(tmp_path, metric):
    data = in_double(learnable())
    model = Net(lambda: nn.Dropout(0.5), nn.Tanh).double()
    trainer = trainer_of(tmp_path, model, data=data)
    trainer.gnp_args.gnp_metric = metric
    result = trainer.find_r(radii=RADII, batches=3, seed=SEED, log=False)
    assert_matches(result, Reference(model).find_r(reference_steps(data, 1, 24), 3, metric), 1e-9)  # both in float64


def test_only_target_modules_are_perturbed(tmp_path):
    model = Net(lambda: nn.LayerNorm(7), nn.Tanh)
    trainer = trainer_of(tmp_path, model, gnp_target_modules="norm")
    result = trainer.find_r(radii=RADII, batches=2, seed=SEED, metric="layer", log=False)
    by_hand = Reference(model, targets=("layers.1.weight", "layers.1.bias"))
    assert_matches(result, by_hand.find_r(reference_steps(trainer.train_dataset, 1, 16), 2, "layer"), 1e-4)


def test_tensors_without_a_gradient_or_of_norm_0_stay(tmp_path):
    model = PartlyUnused(nn.Tanh)
    result = trainer_of(tmp_path, model).find_r(radii=RADII, batches=2, seed=SEED, metric="layer", log=False)
    used = copy.deepcopy(model)
    used.unused.requires_grad_(False)
    steps = reference_steps(learnable(), 1, 16)
    assert_matches(result, Reference(used).find_r(steps, 2, "layer"), 1e-4)


def test_nothing_changes_wherever_it_is_interrupted(tmp_path):
    model = Net(lambda: nn.BatchNorm1d(7), nn.Dropout)
    model.layers[1].eval()
    trainer = trainer_of(tmp_path, model)
    calls = interrupt_everywhere(model, lambda: trainer.find_r(radii=RADII, batches=2, log=False))
    assert len(calls) == 12 + 2 * (1 + len(RADII)) and all(calls)


def test_training_does_not_notice(tmp_path):
    class Finding(TrainerCallback):
        found = ()

        def on_step_end(self, *args, **kwargs):
            self.found += (self.trainer.find_r(radii=RADII, batches=1, log=False),)

    results = []
    for callback in (Finding(), TrainerCallback()):
        set_seed(5)
        model = Net(lambda: nn.BatchNorm1d(7), nn.Dropout)
        trainer = trainer_of(tmp_path, model, callbacks=[callback], max_steps=3, gradient_accumulation_steps=2)
        callback.trainer = trainer
        results.append(run(trainer))
        assert len(getattr(callback, "found", "---")) == 3
    assert_identical(*results)


def test_table_and_picture(tmp_path, capsys):
    trainer = trainer_of(tmp_path, Net())
    result = trainer.find_r(path=tmp_path / "pictures" / "r.png", batches=2)
    printed = capsys.readouterr().out
    assert f"suggestion: gnp_r={result['suggestion']:.2g}" in printed
    assert f"{result['cosine'][3]:.3f} ± " in printed and len(printed.splitlines()) == 3 + len(result["radii"])
    assert result["radii"] == pytest.approx(np.logspace(-3, 0, 10))
    assert result["metric"] == "l2"
    assert_is_picture(tmp_path / "pictures" / "r.png", 500)
    stock = make_trainer(tmp_path, "net", cls=Trainer, model=Net(), data=learnable())
    assert find_r(stock, batches=2, log=False) == result
    trainer.find_r(batches=2, log=False)
    assert not capsys.readouterr().out
    assert trainer.find_r(radii=np.array([10.0, 30.0]), batches=2)["suggestion"] == 10
    assert "may be too large: give smaller radii" in capsys.readouterr().out


def test_kept_is_unknown_without_descent_on_other_batches(tmp_path):
    model = Net(lambda: nn.BatchNorm1d(7), nn.Tanh)
    trainer = trainer_of(tmp_path, model, data=make_data("net"), gradient_accumulation_steps=2)
    result = trainer.find_r(batches=2, seed=SEED)
    assert all(map(math.isnan, result["kept"]))
    assert result["limited_by"] in ("cosine", "rise", "grid")


def summary(**columns):
    flat_columns = {"cosine": [1.0, 1.0, 1.0], "kept": [1.0, 1.0, 1.0], "rise_share": [0.0, 0.0, 0.0]}
    flat_columns["kept_standard_error"] = [0.0, 0.0, 0.0]
    return {"radii": [0.01, 0.1, 1.0], **flat_columns, **columns}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, (1.0, "grid")),
        ({"cosine": [1.0, 0.9, 0.7]}, (10**-0.5, "cosine")),  # half way from .9 to .7, in log r
        ({"cosine": [0.7, 0.9, 0.9]}, (0.01, "cosine")),
        ({"cosine": [1.0, 0.9, 0.7], "kept": [1.2, 0.6, 1.0]}, (0.1**1.5, "kept")),
        ({"kept": [1.2, 0.6, 1.0], "kept_standard_error": [0.1, 0.4, 0.5]}, (1.0, "grid")),
        ({"cosine": [1.0, 0.9, 0.7], "kept": [math.nan] * 3}, (10**-0.5, "cosine")),
        ({"cosine": [1.0, 0.9, math.nan]}, (0.1, "cosine")),
        ({"rise_share": [0.5, 1.5, 3.0]}, (0.1**1.5, "rise")),
    ],
)
def test_suggestion(columns, expected):
    r, limit = suggest(summary(**columns))
    assert r == pytest.approx(expected[0])
    assert limit == expected[1]


class StopsWithin(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_after_a_run_that_was_interrupted_within_a_window(tmp_path):
    trainer = make_trainer(tmp_path, "net", data=learnable(), gradient_accumulation_steps=2, callbacks=[StopsWithin()])
    expected = trainer.find_r(radii=RADII, batches=2, log=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.find_r(radii=RADII, batches=2, log=False) == expected


def test_refusals_say_what_to_do(tmp_path):
    trainer = trainer_of(tmp_path, Net())
    with pytest.raises(ValueError, match="metric must be"):
        trainer.find_r(metric="l1")
    with pytest.raises(ValueError, match="radii must be positive"):
        trainer.find_r(radii=[0.1, 0.0])
    with pytest.raises(ValueError, match="batches must be"):
        trainer.find_r(batches=0)
    with pytest.raises(ValueError, match="two steps: 8 samples, but it has 7"):
        trainer.find_r(make_data("net", size=7))
    with pytest.raises(ValueError, match=r"dataset=\.\.\.\['nli'\]"):
        trainer.find_r({"nli": make_data("net"), "sts": make_data("net")})
    for parameter in list(trainer.model.parameters())[-2:]:
        parameter.data.zero_()
    trainer.model.layers[-1].requires_grad_(False)
    with pytest.raises(ValueError, match="no direction"):
        trainer.find_r()
    trainer = trainer_of(tmp_path, Net())
    nn.init.zeros_(trainer.model.layers[0].bias)
    trainer.gnp_args.gnp_target_modules = ["layers.0.bias"]
    for metric in ("layer", "element"):
        with pytest.raises(ValueError, match="no direction"):
            trainer.find_r(metric=metric)
