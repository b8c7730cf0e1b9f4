"""What is left of the first task when plain fine-tuning on a second one has come to a given loss."""

import itertools
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback, set_seed

from hf_gnp import GNPTrainer, GNPTrainingArguments

from .task import Data


class FirstTask(TrainerCallback):
    """After each evaluation of the second task: its loss, and the accuracy on the first one under the old head."""

    def __init__(self, trainer: GNPTrainer, head: nn.Module, test: Any):
        self.batches, self.head = list(trainer.get_eval_dataloader(test)), head
        self.points: list[tuple[float, float]] = []

    def on_evaluate(self, args, state, control, metrics, model, **kwargs):
        self.points.append((metrics["eval_loss"], self.accuracy(model)))

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        model.eval()
        new_head, model.classifier = model.classifier, self.head
        right = total = 0
        for batch in self.batches:
            labels = batch["labels"]
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            right, total = right + int((logits.argmax(-1) == labels).sum()), total + len(labels)
        model.classifier = new_head
        return right / total


def at_loss(points: Sequence[tuple[float, float]], target: float) -> float:
    """The accuracy where the loss first crosses `target`, linear between evaluations; nan if it never does."""
    for (loss, accuracy), (next_loss, next_accuracy) in itertools.pairwise(points):
        if loss > target >= next_loss:
            return accuracy + (next_accuracy - accuracy) * (loss - target) / (loss - next_loss)
    return points[0][1] if points and points[0][0] <= target else float("nan")


def forgetting(trainer: GNPTrainer, test: Any, second: Data, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """
    Goes on with the trainer's model, which is changed.

    Args:
        test: Of the first task.
        settings: `steps`, with an evaluation each `every`; `batch_size`, `learning_rate`, `classes`, `target_loss`.
    """
    set_seed(seed)
    model = trainer.model
    head, model.classifier = model.classifier, nn.Linear(model.config.hidden_size, settings["classes"])
    model.num_labels = model.config.num_labels = settings["classes"]
    with tempfile.TemporaryDirectory() as folder:
        args = GNPTrainingArguments(
            output_dir=folder,
            max_steps=settings["steps"],
            eval_strategy="steps",
            eval_steps=settings["every"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            per_device_train_batch_size=settings["batch_size"],
            per_device_eval_batch_size=128,
            logging_strategy="no",
            save_strategy="no",
            bf16=trainer.args.bf16,
            seed=seed,
            use_cpu=trainer.args.use_cpu,
            dataloader_pin_memory=trainer.args.dataloader_pin_memory,
            report_to="none",
            disable_tqdm=True,
            gnp_alpha=0.0,
        )
        data = {"train_dataset": second.train, "eval_dataset": second.validation}
        new_trainer = GNPTrainer(model, args, data_collator=trainer.data_collator, **data)
        first_task = FirstTask(trainer, head, test)
        new_trainer.add_callback(first_task)
        new_trainer.remove_callback(transformers.PrinterCallback)
        new_trainer.evaluate()
        new_trainer.train()
    points = first_task.points
    lost = points[0][1] - at_loss(points, settings["target_loss"])
    return {"forgotten": lost, "second_task": [[round(value, 4) for value in point] for point in points]}
