"""The trainer against the reference loop, on one process: models, windows of every shape, losses of every kind."""

import pytest
import torch
from runs import MICRO_BATCH, assert_matches_reference, reference_run, trained, window_loss, windows
from tiny import KINDS, UnlabelledNet, make_data
from torch.nn.functional import cross_entropy


@pytest.mark.parametrize("alpha", [0.8, 1.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("kind", [*KINDS, "net"])
def test_matches_the_reference(tmp_path, kind, accumulation, alpha):
    """Tied weights stay tied, and count once."""
    settings = {"gradient_accumulation_steps": accumulation, "gnp_alpha": alpha, "gnp_r": 0.05}
    trainer = trained(tmp_path, kind, **settings)
    if kind == "llama":
        assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
    assert_matches_reference(trainer, reference_run(kind, accumulation, alpha=alpha))


# The last micro-batch is smaller, and the last window has fewer micro-batches: 11 full ones and one of 2 samples.
RAGGED_SIZE = 11 * MICRO_BATCH + 2


@pytest.mark.parametrize("accumulation", [5, 8])
@pytest.mark.parametrize("kind", [*KINDS, "net"])
def test_incomplete_last_window(tmp_path, kind, accumulation):
    data = make_data(kind, RAGGED_SIZE)
    trainer = trained(tmp_path, kind, data=data, gradient_accumulation_steps=accumulation)
    steps = windows(kind, accumulation, data)
    assert len(steps[-1]) < accumulation
    assert_matches_reference(trainer, reference_run(kind, accumulation, steps=steps))


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


@pytest.mark.parametrize("kind", KINDS)
def test_iterable_dataset(tmp_path, kind):
    data = make_data(kind)
    trainer = trained(tmp_path, kind, data=Stream(data), max_steps=4, gradient_accumulation_steps=2)
    assert_matches_reference(trainer, reference_run(kind, 2, steps=windows(kind, 2, data)[:4]))


def test_micro_batches_left_over_by_a_stream(tmp_path):
    """`Trainer` does not step on them: their gradient stays, and is part of the next epoch's first step."""
    data = make_data("net", 10 * MICRO_BATCH)
    settings = {"max_steps": 4, "gradient_accumulation_steps": 4}
    trainer = trained(tmp_path, "net", data=Stream(data), **settings)
    first, second, leftover = windows("net", 4, data)
    steps = [[first], [second], [leftover, first], [second]]

    def loss(model, parts):
        return sum(window_loss(model, part) for part in parts)

    assert_matches_reference(trainer, reference_run("net", 4, steps=steps, loss=loss))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_label_smoothing(tmp_path, accumulation):
    settings = {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": accumulation}
    trainer = trained(tmp_path, "vit", **settings)

    def loss(model, window):
        losses = [cross_entropy(model(b["pixel_values"]).logits, b["labels"], label_smoothing=0.2) for b in window]
        return sum(losses) / len(losses)

    assert_matches_reference(trainer, reference_run("vit", accumulation, loss=loss))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_loss_function_with_number_of_items(tmp_path, accumulation):
    """A user's loss: the mean over all labels of the window but those that are ignored (-100)."""
    data = make_data("net")
    for sample in data[::3]:
        sample["labels"] = torch.tensor(-100)

    def sum_over_items(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    settings = {"compute_loss_func": sum_over_items, "gradient_accumulation_steps": accumulation}
    trainer = trained(tmp_path, "net", model=UnlabelledNet(), data=data, **settings)

    def loss(model, window):
        items = sum((batch["labels"] != -100).sum() for batch in window)
        return sum(sum_over_items(model(batch["x"]), batch["labels"], items) for batch in window)

    steps = windows("net", accumulation, data)
    expected = reference_run("net", accumulation, model=UnlabelledNet(), steps=steps, loss=loss)
    assert_matches_reference(trainer, expected)
