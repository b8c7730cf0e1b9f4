"""What a run needs besides its method."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from torch import nn


@dataclass
class Data:
    """The data of a seed. Labels of `train` may be wrong; those of `validation` and `test` are right."""

    train: Any
    validation: Any
    test: Any


@dataclass
class Task:
    """
    What a run needs besides its method.

    Args:
        make_model: Makes the model to start from; the caller has seeded torch.
        data: Maps a seed to its data.
        collate: Makes a batch of examples, or passes on what is a batch already.
        arguments: Training arguments of every method; `per_device_train_batch_size` is the whole step's batch.
        optimizer: Class and arguments, if it is not `Trainer`'s AdamW.
        other_tests: More data with right labels, by the name under which their accuracy is kept.
        second: Of a second task, to see how much of the first one its training leaves.
    """

    make_model: Callable[[], nn.Module]
    data: Callable[[int], Data]
    collate: Callable[[Any], Any]
    arguments: dict[str, Any]
    optimizer: tuple[type, dict[str, Any]] | None = None
    other_tests: dict[str, Any] = field(default_factory=dict)
    second: Data | None = None


def load_splits(folder: str, name: str, **files: str) -> DatasetDict:
    """The parquet files of `folder`/`name`, by split."""
    paths = {split: str(Path(folder) / name / f"{file}.parquet") for split, file in files.items()}
    return load_dataset("parquet", data_files=paths)


def first(split: Dataset, count: int) -> Dataset:
    return split.select(range(min(count, len(split))))
