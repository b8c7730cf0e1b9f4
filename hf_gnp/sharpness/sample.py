"""The sample of a measurement, its micro-batches, and the weight of each micro-batch in the mean."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, Subset
from transformers import set_seed

from hf_gnp.second_pass.state import GENERATORS, restorers


class WeightedBatch(NamedTuple):
    """Hold a collated micro-batch of this rank."""

    inputs: Any
    items: int  # the number of labels, whose mean is its loss
    share: float  # its weight in the mean over all micro-batches
    number: int  # its index among the micro-batches of all ranks


def draw_sample(trainer: Any, dataset: Any, size: int, seed: int) -> tuple[list[WeightedBatch], int]:
    """Return this rank's micro-batches of a sample of at most `size` over all ranks, and the sample's size."""
    dataset = find_dataset(trainer, dataset)
    batches, size = draw(trainer, dataset, size, trainer.args.per_device_eval_batch_size, seed)
    return weighted(trainer, batches), size


def find_dataset(trainer: Any, dataset: Any) -> Any:
    """Return a dataset, the evaluation dataset of that name, or the only one. Raise a ValueError if there is none."""
    available = trainer.eval_dataset
    named = available if isinstance(available, dict) else {None: available}
    dataset = named.get(dataset) if dataset is None or isinstance(dataset, str) else dataset
    if dataset is None:
        names = f" (one of {sorted(available)})" if isinstance(available, dict) else ""
        raise ValueError(f"measure_sharpness needs data: give it a dataset{names}, or the trainer an eval_dataset.")
    return dataset


def draw(
    trainer: Any, dataset: Any, size: int, per_batch: int, seed: int, shuffle: bool = False
) -> tuple[list[WeightedBatch], int]:
    """
    Return this rank's micro-batches of at most `size` samples, each with its label count as share, and their number.

    The seed chooses the samples, shuffled or in the dataset's order, and the random transforms. An iterable dataset
    gives its first samples. All ranks get the same number of micro-batches, as each costs a collective. Surplus ones
    have a share of 0.
    """
    with _generators_left(dataset, trainer.data_collator):
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            chosen: Any = list(itertools.islice(dataset, size))
        else:
            order = np.random.default_rng(seed).permutation(len(dataset))[:size]
            indices = (order if shuffle else np.sort(order)).tolist()
            chosen = dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)
        # It has the trainer's collator and columns. The data loader of `evaluate` may be kept for later evaluations.
        loader = trainer.get_test_dataloader(chosen)
        ranks, count, batches = trainer.accelerator.num_processes, -(-len(chosen) // per_batch), []
        for number in range(trainer.accelerator.process_index, -(-count // ranks) * ranks, ranks):
            first = number * per_batch if number < count else 0
            set_seed(seed + number)
            rows = range(len(chosen))[first : first + per_batch]
            inputs = loader.collate_fn([loader.dataset[row] for row in rows])
            items = _count_items(trainer, inputs)
            batches.append(WeightedBatch(inputs, items, float(items) if number < count else 0.0, number))
        return batches, len(chosen)


@contextlib.contextmanager
def _generators_left(*owners: Any) -> Iterator[None]:
    """Restore the random generators in attributes of the data and the collator. Remove those that are made inside."""
    before = [(vars(o), dict(vars(o))) for o in owners if hasattr(o, "__dict__") and not isinstance(o, type)]
    found = [value for _, values in before for value in values.values() if isinstance(value, GENERATORS)]
    restore = [restorer for generator in found for restorer in restorers(generator)]
    try:
        yield
    finally:
        for attributes, values in before:
            names = {name for name, value in attributes.items() if isinstance(value, GENERATORS)}
            attributes.update({name: values[name] for name in names & values.keys()})
            for name in names - values.keys():
                del attributes[name]
        for restorer in restore:
            restorer()


def weighted(trainer: Any, batches: list[WeightedBatch]) -> list[WeightedBatch]:
    """Scale the shares so that the losses of these micro-batches add up over all ranks to a mean over labels."""
    local = torch.tensor(int(sum(batch.share for batch in batches)), device=trainer.accelerator.device)
    total = trainer.accelerator.reduce(local, reduction="sum").item()
    if total == 0:
        raise ValueError("No sample has a label that counts (other than -100): there is no loss to measure.")
    # A mean over no labels is NaN, and 0 times NaN is NaN. Such a micro-batch gets the inputs of another one.
    filled = next((batch for batch in batches if batch.items > 0), batches[0])
    return [
        (batch if batch.items > 0 else filled)._replace(share=batch.share / total, number=batch.number)
        for batch in batches
    ]


def _count_items(trainer: Any, inputs: Any) -> int:
    """Count the labels in the mean loss of a micro-batch, as `Trainer` does. Without labels count the samples."""
    if not isinstance(inputs, Mapping):
        raise NotImplementedError(
            f"Sharpness cannot be measured with {type(trainer).__name__}: its micro-batches are not mappings of "
            f"tensors but {type(inputs).__name__}, of which its training_step makes the inputs of the loss."
        )
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, torch.Tensor):
        return next(len(value) for value in inputs.values() if isinstance(value, torch.Tensor))
    if "shift_labels" not in inputs and getattr(trainer, "_loss_shifts_labels", False):
        labels = labels[..., 1:]
    return int(labels.ne(-100).sum())
