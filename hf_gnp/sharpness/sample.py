"""The sample that is measured on: which data, in which micro-batches, and what each counts."""

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, Subset
from transformers import set_seed


class WeightedBatch(NamedTuple):
    """
    A collated micro-batch of this rank. Its loss is a mean over `items`, and counts `share` in the mean over the whole
    sample. `number` is its place among the micro-batches of all ranks.
    """

    inputs: Any
    items: int
    share: float
    number: int


def draw_sample(trainer: Any, dataset: Any, size: int, seed: int) -> tuple[list[WeightedBatch], int]:
    """
    This rank's micro-batches of a sample, and the size of the whole sample. All ranks get the same number of them, for
    each is a collective: the last ones may count 0. Random transforms draw by the seed and the micro-batch.

    Args:
        dataset: What `Trainer.evaluate` takes: a dataset, the name of one of several, or None for `eval_dataset`. The
            first elements of an iterable one are the sample.
        size: The number of samples over all ranks, at most.

    Raises:
        ValueError: if there is no such dataset, or nothing in it has a label.
    """
    chosen = _choose(_resolve(trainer, dataset), size, seed)
    # Not the evaluation data loader, which is kept for later evaluations. It has the trainer's collator and columns.
    loader = trainer.get_test_dataloader(chosen)
    rank, ranks, per_batch = (
        trainer.accelerator.process_index,
        trainer.accelerator.num_processes,
        trainer.args.per_device_eval_batch_size,
    )
    batches = -(-len(chosen) // per_batch)
    own = []
    for number in range(rank, -(-batches // ranks) * ranks, ranks):
        first = number * per_batch if number < batches else 0
        rows = range(first, min(first + per_batch, len(chosen)))
        set_seed(seed + number)
        inputs = loader.collate_fn([loader.dataset[row] for row in rows])
        own.append((number, inputs, count_items(trainer, inputs)))
    counts = torch.tensor([sum(items for number, _, items in own if number < batches)], dtype=torch.long)
    total = trainer.accelerator.reduce(counts.to(trainer.accelerator.device), reduction="sum").item()
    if total == 0:
        raise ValueError("No sample has a label that counts (other than -100): there is no loss to measure.")
    # In the place of one without labels, whose mean is NaN, stands another that counts 0.
    filled = next((item for item in own if item[2] > 0), own[0])
    drawn = [
        WeightedBatch(inputs, items, items / total if number < batches else 0.0, number)
        if items > 0
        else WeightedBatch(filled[1], filled[2], 0.0, number)
        for number, inputs, items in own
    ]
    return drawn, len(chosen)


def _resolve(trainer: Any, dataset: Any) -> Any:
    available = trainer.eval_dataset
    if isinstance(dataset, str) and isinstance(available, dict) and dataset in available:
        return available[dataset]
    if dataset is None and not isinstance(available, dict):
        dataset = available
    if dataset is None or isinstance(dataset, str):
        names = f" (one of {sorted(available)})" if isinstance(available, dict) else ""
        raise ValueError(f"measure_sharpness needs data: give it a dataset{names}, or the trainer an eval_dataset.")
    return dataset


def _choose(dataset: Any, size: int, seed: int) -> Any:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return list(itertools.islice(dataset, size))
    if len(dataset) <= size:
        return dataset
    rows = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:size]).tolist()
    return dataset.select(rows) if hasattr(dataset, "select") else Subset(dataset, rows)


def count_items(trainer: Any, inputs: Any) -> int:
    """The number of labels over which a micro-batch's loss is a mean: as `Trainer` counts them, or its samples."""
    if "shift_labels" in inputs:
        labels = inputs["shift_labels"]
    elif getattr(trainer, "_loss_shifts_labels", False) and isinstance(inputs.get("labels"), torch.Tensor):
        labels = inputs["labels"][..., 1:]
    else:
        labels = inputs.get("labels")
    if isinstance(labels, torch.Tensor):
        return int(labels.ne(-100).sum())
    return next(len(value) for value in inputs.values() if isinstance(value, torch.Tensor))
