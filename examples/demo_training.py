"""Train the small vision transformer of demo.py by `GNPTrainer`, plainly or with the penalty."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import compute_accuracy
from sklearn.datasets import load_digits
from transformers import PrinterCallback, ViTConfig, ViTForImageClassification, set_seed

from hf_gnp import GNPTrainer, GNPTrainingArguments, plot_loss_surface


TRAIN, VALIDATION, WRONG = 600, 297, 0.4


def load_data(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the splits train (with wrong labels), validation and test. Each seed has other splits."""
    generator = np.random.default_rng(seed)
    pixels, labels = load_digits(return_X_y=True)
    order = generator.permutation(len(labels))
    labels, wrong = labels[order], int(WRONG * TRAIN)
    labels[:wrong] = (labels[:wrong] + generator.integers(1, 10, wrong)) % 10
    images = torch.tensor(pixels[order].reshape(-1, 1, 8, 8) / 8 - 1, dtype=torch.float32)
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    return {"train": rows[:TRAIN], "validation": rows[TRAIN : TRAIN + VALIDATION], "test": rows[TRAIN + VALIDATION :]}


def make_model() -> ViTForImageClassification:
    """Return a ViT of 70,000 parameters for images of 8x8 pixels in 16 patches."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=10,
        initializer_range=0.125,  # 1 / sqrt(64): the default suits a width of 768
    )
    model = ViTForImageClassification(config)
    model.accepts_loss_kwargs = False  # its loss is a batch mean, so `Trainer` must divide by the accumulation steps
    return model


def make_trainer(seed: int, folder: Path, **arguments: Any) -> GNPTrainer:
    # The demo runs several processes at the same time, and has its own progress bar.
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    set_seed(seed)
    data = load_data(seed)
    args = GNPTrainingArguments(
        output_dir=str(folder),
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        per_device_eval_batch_size=300,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        seed=seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        **arguments,
    )
    trainer = GNPTrainer(
        make_model(),
        args,
        train_dataset=data["train"],
        eval_dataset={"validation": data["validation"], "test": data["test"]},
        compute_metrics=compute_accuracy,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(method: str, seed: int, folder: Path, **arguments: Any) -> dict[str, Any]:
    """Train one run. Return the validation and test accuracy of each epoch, and the passes over the training data."""
    trainer = make_trainer(seed, folder, **arguments)
    trainer.train()
    trainer.save_model(str(folder / f"seed_{seed}" / method))
    history = trainer.state.log_history
    # gnp_on is the share of an epoch's steps with a second pass. Steps of the warm-up have none.
    second_passes = sum(log["gnp_on"] for log in history if "gnp_on" in log)
    return {
        "method": method,
        "seed": seed,
        "passes": trainer.args.num_train_epochs + second_passes,
        "validation": [log["eval_validation_accuracy"] for log in history if "eval_validation_accuracy" in log],
        "test": [log["eval_test_accuracy"] for log in history if "eval_test_accuracy" in log],
    }


def surfaces(seed: int, methods: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return the loss on test images around the final weights, along the two most curved directions of each run."""
    trainer = make_trainer(seed, folder)
    ends = [folder / f"seed_{seed}" / method for method in methods]
    options = {"directions": "eigenvectors", "dimensions": 2, "points": 13, "dataset": load_data(seed)["test"]}
    return plot_loss_surface(trainer, folder / "surfaces.png", ends, **options)
