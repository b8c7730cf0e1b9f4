"""
Fine-tune a vision model with the gradient-norm penalty.

    python examples/vit_finetune.py
        Train a small ViT on scikit-learn's digits. It takes about two minutes on two CPU cores, without a network.
    python examples/vit_finetune.py --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name cifar10
        Train any image classifier on your own data: a hub name, a local folder, or a parquet file.
    python examples/vit_finetune.py --config configs/recipes/vit_finetune.yaml --learning_rate 3e-5
        Read arguments from a file. Flags override them.

The script also runs under `torchrun` and `accelerate launch`. `--gnp_alpha 0` is plain training.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from common import (
    DataArguments,
    ModelArguments,
    compute_accuracy,
    label_kwargs,
    limit_samples,
    load_own_data,
    parse_args,
    run,
    setup_logging,
)
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from PIL import ImageOps
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    set_seed,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_gnp import GNPTrainer, GNPTrainingArguments


logger = logging.getLogger(__name__)

EMBEDDED_DEFAULTS = {
    "num_train_epochs": 24,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.05,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
}


@dataclass
class ImageDataArguments(DataArguments):
    """Name the images to fine-tune on, and their augmentation."""

    image_column_name: str | None = field(
        default=None, metadata={"help": "The column of the images. Default: image or img."}
    )
    crop_padding: float = field(
        default=0.125,
        metadata={"help": "The largest random shift of training images, as a share of width and height."},
    )
    horizontal_flip: bool | None = field(
        default=None,
        metadata={"help": "Mirror half of the training images. Default: yes, except for the embedded digits."},
    )


def load_digits() -> DatasetDict:
    """Return scikit-learn's 1,797 digits, enlarged from 8x8 to 32x32 pixels: 80% for training, 20% for the test."""
    # Only the embedded data needs scikit-learn.
    from sklearn.datasets import load_digits as load_arrays
    from sklearn.model_selection import train_test_split

    pixels, labels = load_arrays(return_X_y=True)
    small = (pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = [
        PILImage.fromarray(digit).resize((32, 32), PILImage.Resampling.BICUBIC).convert("RGB") for digit in small
    ]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    train, test = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=labels)

    def select(rows: list[int]) -> Dataset:
        return Dataset.from_dict({"image": [images[i] for i in rows], "label": labels[rows].tolist()}, features)

    return DatasetDict(train=select(train), test=select(test))


def load_images(args: ImageDataArguments, seed: int) -> DatasetDict:
    """Load the splits "train" and "test" with the columns "image" (PIL, RGB) and "label" (`ClassLabel`)."""
    if args.dataset_name is None:
        return limit_samples(load_digits(), args, seed)
    splits = load_own_data(args, seed, "image", "img").cast_column("image", Image(mode="RGB"))
    return limit_samples(splits, args, seed)


def load_model(args: ModelArguments, labels: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """
    Load the user's model, or make a small ViT for 32x32 images.

    Returns:
        The model, and its image processor for PIL images, which needs no torchvision.
    """
    if args.model_name_or_path is None:
        if args.config_name is not None:
            config = AutoConfig.from_pretrained(args.config_name, **labels)
        else:
            config = ViTConfig(
                image_size=32,
                patch_size=8,
                hidden_size=96,
                intermediate_size=192,
                num_hidden_layers=4,
                num_attention_heads=4,
                # 1 / sqrt(96). The default suits a width of 768, and passes little signal through narrow layers.
                initializer_range=0.1,
                **labels,
            )
        return AutoModelForImageClassification.from_config(config), default_processor(config)
    model = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path,
        **labels,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        revision=args.model_revision,
    )
    try:
        processor = AutoImageProcessor.from_pretrained(
            args.model_name_or_path, backend="pil", revision=args.model_revision
        )
    except OSError:
        logger.warning(f"{args.model_name_or_path} has no image processor: using ViT's, at the model's image size.")
        processor = default_processor(model.config)
    return model, processor


def default_processor(config: PreTrainedConfig) -> ViTImageProcessorPil:
    """Return ViT's image processor at the image size of `config`."""
    return ViTImageProcessorPil(size={"height": config.image_size, "width": config.image_size})


def random_crop_and_flip(image: PILImage.Image, padding: float, flip: bool) -> PILImage.Image:
    """
    Crop an image of the same size from `image` with a black border, and mirror half of the images.

    The random numbers come from torch's global generator. `Trainer` seeds it, saves it in checkpoints and restores it.
    So a run that resumes at the end of an epoch sees the same crops. Within an epoch it does not, because `Trainer`
    fetches a batch ahead before it saves.
    """
    x, y = (int(side * padding) for side in image.size)
    left = int(torch.randint(-x, x + 1, ()))
    top = int(torch.randint(-y, y + 1, ()))
    # PIL's crop is black outside of the image, so no border is needed.
    image = image.crop((left, top, left + image.width, top + image.height))
    return ImageOps.mirror(image) if flip and torch.rand(()) < 0.5 else image


def make_transform(
    processor: Any, augment: Callable[[PILImage.Image], PILImage.Image] | None = None
) -> Callable[[dict[str, list]], dict[str, list]]:
    """Return a function that turns a batch of images and labels into pixel values and labels."""

    def transform(batch: dict[str, list]) -> dict[str, list]:
        images = [augment(image) for image in batch["image"]] if augment else batch["image"]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

    return transform


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack images of one size, and their labels."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def build_trainer(
    model_args: ModelArguments, data_args: ImageDataArguments, training_args: GNPTrainingArguments
) -> GNPTrainer:
    """Build a trainer from data, model and arguments. The same arguments give the same initial weights."""
    set_seed(training_args.seed)
    # `Trainer` would drop the columns, because only the transform makes the model's arguments from them.
    training_args.remove_unused_columns = False
    with training_args.main_process_first(desc="loading the data"):
        splits = load_images(data_args, training_args.seed)
    model, processor = load_model(model_args, label_kwargs(splits))
    # The loss of many classifiers is a mean over the batch. `Trainer` assumes that a forward with **kwargs divides by
    # the items of the whole step. Then the loss would grow with the processes and the accumulation steps.
    model.accepts_loss_kwargs = False
    is_own = data_args.dataset_name is not None
    flip = is_own if data_args.horizontal_flip is None else data_args.horizontal_flip

    def augment(image: PILImage.Image) -> PILImage.Image:
        return random_crop_and_flip(image, data_args.crop_padding, flip)

    return GNPTrainer(
        model=model,
        args=training_args,
        train_dataset=splits["train"].with_transform(make_transform(processor, augment)),
        eval_dataset=splits["test"].with_transform(make_transform(processor)),
        data_collator=collate,
        compute_metrics=compute_accuracy,
        processing_class=processor,
    )


def main() -> None:
    model_args, data_args, training_args = parse_args(ImageDataArguments, EMBEDDED_DEFAULTS)
    setup_logging(training_args)
    run(
        build_trainer(model_args, data_args, training_args),
        finetuned_from=model_args.model_name_or_path,
        tasks="image-classification",
        dataset=data_args.dataset_name or "scikit-learn digits",
        tags=["image-classification", "vision"],
    )


if __name__ == "__main__":
    main()
