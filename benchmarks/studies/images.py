"""Images: CIFAR-10 or scikit-learn's digits, for a ViT, a ResNet or a pretrained model."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from .labels import with_wrong_labels
from .task import Data, Task, first, load_splits


# Of CIFAR-10's training pixels.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PADDING = 4


class Images(torch.utils.data.Dataset):
    """
    Images as bytes in memory. A batch is cropped, mirrored, resized and normalised in one go.

    Random numbers come from torch's generator of the device, which `Trainer` seeds.
    """

    def __init__(self, pixels: torch.Tensor, labels: np.ndarray, augment: bool = False, size: int | None = None):
        self.pixels, self.labels = pixels, torch.from_numpy(np.asarray(labels, dtype=np.int64))
        self.augment, self.size = augment, size
        colours = pixels.shape[1]
        mean, std = (MEAN, STD) if colours == 3 else ((0.5,), (0.5,))
        self.mean, self.std = (torch.tensor(v).view(1, colours, 1, 1) * 255 for v in (mean, std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        rows = torch.tensor(indices)
        pixels = (self.pixels[rows].float() - self.mean) / self.std
        pixels = crop_and_mirror(pixels) if self.augment else pixels
        if self.size is not None:
            pixels = nn.functional.interpolate(pixels, size=self.size, mode="bicubic", antialias=True)
        return {"pixel_values": pixels, "labels": self.labels[rows]}


def collate(batch: Any) -> dict[str, torch.Tensor]:
    """A loader's batch is whole already; else it is a list of batches of one."""
    return batch if isinstance(batch, dict) else {key: torch.cat([item[key] for item in batch]) for key in batch[0]}


def crop_and_mirror(pixels: torch.Tensor) -> torch.Tensor:
    """Moves each image by at most `PADDING` pixels, with what is outside at the mean, and mirrors half of them."""
    count, _, height, width = pixels.shape
    padded = nn.functional.pad(pixels, [PADDING] * 4)
    top, left = torch.randint(2 * PADDING + 1, (2, count, 1))
    columns = torch.arange(width)
    mirrored = torch.rand(count, 1) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(mirrored, columns.flip(0), columns)
    images = torch.arange(count)[:, None, None]
    # Indices on both sides of the slice put the channels last.
    return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def load_digits() -> tuple[torch.Tensor, np.ndarray]:
    """scikit-learn's 1,797 digits of 8x8 pixels."""
    from sklearn.datasets import load_digits as load_arrays

    pixels, labels = load_arrays(return_X_y=True)
    return torch.from_numpy((pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8), labels


def load_pixels(split: Dataset) -> tuple[torch.Tensor, np.ndarray]:
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in split["image"]])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), np.array(split["label"])


def splitter(settings: dict[str, Any], folder: str) -> Callable[[int], Data]:
    """Maps a seed to its training images; CIFAR-10's validation and test images are the same for all seeds."""
    size, wrong = settings.get("image_size"), (settings["wrong"], 10)
    train_size, validation_size, test_size = (settings[f"{name}_size"] for name in ("train", "validation", "test"))
    if settings["source"] == "digits":
        pixels, labels = load_digits()

        def digits(seed: int) -> Data:
            order = np.random.default_rng(seed).permutation(len(labels))[: train_size + validation_size + test_size]
            train, validation, test = np.split(order, [train_size, train_size + validation_size])
            train_labels = with_wrong_labels(labels[train], *wrong, seed)
            parts = ((train, train_labels), (validation, labels[validation]), (test, labels[test]))
            return Data(*(Images(pixels[rows], values) for rows, values in parts))

        return digits

    splits = load_splits(folder, "cifar10", train="train", test="test")
    everything = splits["train"]
    kept = everything.select(range(len(everything) - validation_size, len(everything)))
    validation, test = (Images(*load_pixels(part), size=size) for part in (kept, first(splits["test"], test_size)))

    def cifar10(seed: int) -> Data:
        rows = np.random.default_rng(seed).permutation(len(everything) - validation_size)[:train_size]
        pixels, labels = load_pixels(everything.select(rows))
        labels = with_wrong_labels(labels, *wrong, seed, settings["wrong_kind"])
        return Data(Images(pixels, labels, augment=True, size=size), validation, test)

    return cifar10


def vit(source: str, width: int, layers: int) -> nn.Module:
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1} if source == "digits" else {}
    config = ViTConfig(
        **({"image_size": 32, "patch_size": 8} | shape),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        # With the default, which suits a width of 768, so narrow layers hardly pass a signal on.
        initializer_range=width**-0.5,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def resnet(width: int) -> nn.Module:
    sizes = [width, 2 * width, 4 * width]
    config = ResNetConfig(
        embedding_size=width, hidden_sizes=sizes, depths=[1, 1, 1], layer_type="basic", num_labels=10
    )
    # A quarter less time for its convolutions on a CPU.
    return ResNetForImageClassification(config).to(memory_format=torch.channels_last)


def image_task(settings: dict[str, Any], folder: str, model_path: str | None) -> Task:
    kind = settings["model"]
    makers = {
        "vit": lambda: vit(settings["source"], settings["width"], settings["layers"]),
        "resnet": lambda: resnet(settings["width"]),
        "pretrained": lambda: AutoModelForImageClassification.from_pretrained(
            model_path,
            num_labels=10,
            ignore_mismatched_sizes=True,
            attn_implementation=settings.get("attention"),
        ),
    }
    arguments = {"lr_scheduler_type": "cosine", "remove_unused_columns": False}
    optimizer = None
    if kind == "resnet":
        kwargs = {"lr": settings["learning_rate"], "momentum": 0.9, "weight_decay": 5e-4}
        optimizer = (torch.optim.SGD, kwargs)
    else:
        arguments |= {"weight_decay": 0.05, "warmup_steps": 0.1}
    return Task(makers[kind], splitter(settings, folder), collate, arguments, optimizer)
