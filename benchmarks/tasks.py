"""The tasks of generalization.py: real data, a model, and the training arguments that all methods share."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    ViTConfig,
    ViTForImageClassification,
)


# Of CIFAR-10's training pixels.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PADDING = 4
VIT_TI = Path(__file__).resolve().parents[1] / "configs" / "models" / "vit_ti_patch4_32"


@dataclass
class Task:
    """
    What a run needs besides its method.

    Args:
        make_model: Makes the model to start from; the caller has seeded torch.
        train: Maps a seed to its training data.
        test: The data to evaluate on.
        collate: Makes a batch of examples, or passes on what is a batch already.
        arguments: Training arguments of every method.
    """

    make_model: Callable[[], nn.Module]
    train: Callable[[int], Any]
    test: Any
    collate: Callable[[Any], Any]
    arguments: dict[str, Any]


def load_splits(data: str, name: str, test: str) -> DatasetDict:
    """`data`'s folder `name` with the files train.parquet and <test>.parquet; else `data` is a dataset of the hub."""
    folder = Path(data) / name
    if not Path(data).is_dir():
        return load_dataset(data)
    return load_dataset("parquet", data_files={split: str(folder / f"{split}.parquet") for split in ("train", test)})


class ImagesOnDevice(torch.utils.data.Dataset):
    """
    All images as bytes in the device's memory. A batch is cropped, mirrored and normalised there, in one go.

    Random numbers come from torch's generator of the device, which `Trainer` seeds, saves and restores.
    """

    def __init__(self, split: Dataset, device: torch.device, augment: bool):
        columns = split.features
        images = split["image" if "image" in columns else "img"]
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        self.images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)
        self.labels = torch.tensor(split["label"], device=device)
        self.augment = augment
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        rows = torch.tensor(indices, device=self.images.device)
        pixels = (self.images[rows].float() - self.mean) / self.std
        return {"pixel_values": crop_and_mirror(pixels) if self.augment else pixels, "labels": self.labels[rows]}


def crop_and_mirror(pixels: torch.Tensor) -> torch.Tensor:
    """Moves each image by at most `PADDING` pixels, with what is outside at the mean, and mirrors half of them."""
    count, _, height, width = pixels.shape
    device = pixels.device
    padded = nn.functional.pad(pixels, [PADDING] * 4)
    top, left = torch.randint(2 * PADDING + 1, (2, count, 1), device=device)
    columns = torch.arange(width, device=device)
    mirrored = torch.rand(count, 1, device=device) < 0.5
    rows = top + torch.arange(height, device=device)
    columns = left + torch.where(mirrored, columns.flip(0), columns)
    images = torch.arange(count, device=device)[:, None, None]
    # Indices on both sides of the slice put the channels last.
    return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def cifar10(args: argparse.Namespace, device: torch.device) -> Task:
    """ViT-Ti with 4x4 patches (5.4M parameters), from scratch on CIFAR-10."""
    splits = load_splits(args.data, "cifar10", "test")
    sizes = {}
    if args.quick:
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
        splits = DatasetDict({name: first(split, 128) for name, split in splits.items()})
    config = ViTConfig.from_pretrained(VIT_TI, num_labels=10, **sizes)
    train = ImagesOnDevice(splits["train"], device, augment=True)
    arguments = {
        "learning_rate": args.learning_rate or 1e-3,
        "weight_decay": 0.05,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "per_device_train_batch_size": args.batch_size or (32 if args.quick else 256),
        "remove_unused_columns": False,
    }
    return Task(
        make_model=lambda: ViTForImageClassification(config),
        train=lambda seed: train,
        test=ImagesOnDevice(splits["test"], device, augment=False),
        collate=lambda batch: batch,
        arguments=arguments,
    )


def sst2(args: argparse.Namespace, train_size: str, label_noise: int) -> Task:
    """The pretrained encoder at `args.model_path`, fine-tuned on sentences of SST-2, some labels wrong."""
    splits = load_splits(args.data, "sst2", "validation")
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        return tokenizer(batch["sentence"], truncation=True, max_length=args.max_length)

    test = first(splits["validation"], 32 if args.quick else None)

    def train(seed: int) -> Dataset:
        """The same sentences and wrong labels for each method, others for each seed."""
        split = splits["train"].shuffle(seed=seed)
        split = first(split, None if train_size == "all" else int(train_size))
        flipped = np.random.default_rng(seed).permutation(len(split))[: len(split) * label_noise // 100]
        labels = np.array(split["label"])
        labels[flipped] = 1 - labels[flipped]
        return split.map(tokenize, batched=True).remove_columns("label").add_column("label", labels.tolist())

    arguments = {
        "learning_rate": args.learning_rate or 2e-4,
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "per_device_train_batch_size": args.batch_size or (16 if args.quick else 32),
        "train_sampling_strategy": "group_by_length",
    }
    return Task(
        make_model=lambda: AutoModelForSequenceClassification.from_pretrained(args.model_path, num_labels=2),
        train=train,
        test=by_length(test.map(tokenize, batched=True)),
        collate=DataCollatorWithPadding(tokenizer),
        arguments=arguments,
    )


def first(split: Dataset, count: int | None) -> Dataset:
    return split if count is None else split.select(range(min(count, len(split))))


def by_length(split: Dataset) -> Dataset:
    """Sorted, so that batches hold little padding."""
    return split.select(np.argsort([len(tokens) for tokens in split["input_ids"]]))
