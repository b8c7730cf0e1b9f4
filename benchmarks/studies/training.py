"""One run: train, keep the best epoch by the validation data, and touch the test data once, at the end."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import EvalPrediction, TrainerCallback, set_seed

from hf_gnp import GNPTrainer, GNPTrainingArguments

from .calibration import calibration
from .forgetting import forgetting
from .methods import Method
from .quantisation import quantisation
from .task import Task


Run = dict[str, Any]


class KeepBest(TrainerCallback):
    """Keeps the weights of the epoch with the highest accuracy on the validation data, the earliest of several."""

    def __init__(self):
        self.curve, self.weights = [], {}

    def on_evaluate(self, args, state, control, metrics, model, **kwargs):
        accuracy = metrics["eval_accuracy"]
        if not self.curve or accuracy > max(self.curve):
            self.weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.curve.append(accuracy)


def accuracy_of(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def make_trainer(
    task: Task, method: Method, settings: dict[str, Any], seed: int, folder: Path
) -> tuple[GNPTrainer, Any]:
    """A trainer, and the test data. The methods of a seed share initial weights, data and its order."""
    set_seed(seed)
    batch = settings["batch_size"]
    micro_batch = method.micro_batch or batch
    args = GNPTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings["epochs"] * method.epochs,
        learning_rate=settings["learning_rate"],
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch // micro_batch,
        per_device_eval_batch_size=128,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        seed=seed,
        bf16=settings.get("bf16", False),
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        **task.arguments,
        **method.gnp,
    )
    data = task.data(seed)
    model = task.make_model()
    model.accepts_loss_kwargs = False  # its loss is the mean of a micro-batch, whatever the step has besides
    trainer = GNPTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=task.collate,
        compute_metrics=accuracy_of,
        optimizer_cls_and_kwargs=task.optimizer,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, data.test


def train(task: Task, method: Method, settings: dict[str, Any], seed: int, is_reported: bool = True) -> Run:
    """One run; of one that only serves to choose r, the validation data's accuracy and no more."""
    start, best = time.process_time(), KeepBest()
    with tempfile.TemporaryDirectory() as folder:
        trainer, test_data = make_trainer(task, method, settings, seed, Path(folder))
        trainer.add_callback(best)
        trainer.train()
        run: Run = {
            "validation_best": max(best.curve),
            "validation_final": best.curve[-1],
            "best_epoch": int(np.argmax(best.curve)) + 1,
            "train_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
            **logged(trainer.state.log_history),
        }
        if is_reported:
            run |= flatness(trainer) if settings.get("flatness", True) else {}
            last_weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
            rounds = settings.get("quantisation", True)
            run |= test(trainer, test_data, task.other_tests, best.weights, rounds)
            if task.second is not None:
                trainer.model.load_state_dict(last_weights)
                run |= forgetting(trainer, test_data, task.second, settings["second"], seed)
    run["cpu_seconds"] = round(time.process_time() - start)
    run["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    run = {name: round(value, 5) if isinstance(value, float) else value for name, value in run.items()}
    return run | {"curve": [round(accuracy, 3) for accuracy in best.curve]}


def logged(history: list[dict[str, float]]) -> Run:
    """What the penalty logged at the end of each penalised epoch, beside the loss."""
    names = {"cosines": "gnp_cosine", "sharpness": "gnp_sharpness", "grad_norms": "gnp_grad_norm", "losses": "loss"}
    epochs = [entry for entry in history if "gnp_cosine" in entry]
    return {key: [float(f"{entry[name]:.3g}") for entry in epochs] for key, name in names.items()} if epochs else {}


def test(
    trainer: GNPTrainer,
    data: Any,
    others: dict[str, Any],
    best_weights: dict[str, torch.Tensor],
    rounds: bool = True,
) -> Run:
    """Of the last epoch accuracy, calibration and what rounding loses; of the best one accuracy; it stays loaded."""

    def accuracy(dataset: Any = data) -> float:
        return trainer.predict(dataset).metrics["test_accuracy"]

    on_test, on_validation = trainer.predict(data), trainer.predict(trainer.eval_dataset)
    run = {"final": on_test.metrics["test_accuracy"]}
    run |= {name: accuracy(dataset) for name, dataset in others.items()}
    outputs = (on_test.predictions, on_test.label_ids, on_validation.predictions, on_validation.label_ids)
    run |= calibration(*outputs)
    run |= quantisation(trainer.model, run["final"], accuracy) if rounds else {}
    trainer.model.load_state_dict(best_weights)
    return run | {"best": accuracy()}


def flatness(trainer: GNPTrainer) -> Run:
    """Of the loss of 256 training examples, labelled as in training."""
    options = {"samples": 256, "radii": 0.05, "tolerance": 0.02, "max_products": 20, "log": False}
    # Without a trace in bf16, whose products are some percent off: the errors of all directions would add up.
    result = trainer.measure_sharpness(trainer.train_dataset, probes=0 if trainer.args.bf16 else 10, **options)
    estimate = ("trace", "trace_standard_error")
    return {
        "top_eigenvalue": result["top_eigenvalues"][0],
        "residual": result["residuals"][0],
        "ascent": result["ascent"][0],
        "train_grad_norm": result["grad_norm"],
        **{name: result[name] for name in estimate if name in result},
    }
