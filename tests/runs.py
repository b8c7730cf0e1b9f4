"""One training run with a trainer, and the same run with the reference loop."""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
import torch
from tiny import collate, flat_weights, make_data, make_model, relative_distance
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor, Trainer, TrainerCallback, TrainingArguments

from hf_gnp import GNPArguments, GNPMixin, GNPTrainer, GNPTrainingArguments


# Both sides round in fp32 in another order: a prototype was 1.3e-5 of the way apart; losses are sums of a few numbers.
WEIGHTS_TOLERANCE, LOG_TOLERANCE = 1e-4, 1e-5
# The cosine's g₁ is read from the move, whose weights round at 6e-8 of themselves.
COSINE_TOLERANCE = 1e-4
# As the installed transformers calls it: the first name is the newer one.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in fields(TrainingArguments)}
)
TRAINER_OPTIONS = (
    "callbacks",
    "compute_loss_func",
    "compute_metrics",
    "data_collator",
    "eval_dataset",
    "optimizer_cls_and_kwargs",
    "optimizers",
)
MICRO_BATCH = 4
# A perturbation too short to change any fp32 weight: the second pass repeats the first.
UNMOVED = {"gnp_alpha": 1.0, "gnp_r": 1e-30, "gnp_warmup_type": "none"}
BOTH = (Trainer, GNPTrainer)
# On a CPU, without reports, bars and checkpoints, every step logged.
QUIET = {
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
DECODERS = ("llama", "mixtral", "qwen3_moe")  # as configs name them
BASE = {
    **QUIET,
    "per_device_train_batch_size": MICRO_BATCH,
    "train_sampling_strategy": "sequential",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "optim": "sgd",
    "max_grad_norm": 0.5,
    "num_train_epochs": 1,
}


def needs_image_processors() -> None:
    """Skip where there are none."""
    if hasattr(AutoImageProcessor, "_backends"):  # it stands for what cannot be imported
        pytest.skip("transformers 5.17 has AutoImageProcessor only with torchvision, even for PIL's")


def make_args(output_dir: Any, cls: type[TrainingArguments] = GNPTrainingArguments, **kwargs: Any):
    """With the paper's metric, which an r brings with it, but where a test says otherwise."""
    penalty = {"gnp_r": 0.05} if issubclass(cls, GNPArguments) else {}
    return cls(output_dir=str(output_dir), **{**BASE, **penalty, **kwargs})


def make_trainer(
    output_dir: Any, kind: str, cls: type[Trainer] = GNPTrainer, model=None, data=None, setup=None, **kwargs: Any
):
    """
    `kwargs` are the training arguments, and those of the trainer that `TRAINER_OPTIONS` names. A trainer without the
    penalty gets none of the gnp arguments. `setup` is called with the trainer.
    """
    options = {"data_collator": collate}
    options |= {name: kwargs.pop(name) for name in TRAINER_OPTIONS if name in kwargs}
    if issubclass(cls, GNPMixin):
        args = make_args(output_dir, **kwargs)
    else:
        plain = {name: value for name, value in kwargs.items() if not name.startswith("gnp_")}
        args = make_args(output_dir, TrainingArguments, **plain)
    model = make_model(kind) if model is None else model
    data = make_data(kind) if data is None else data
    trainer = cls(model=model, args=args, train_dataset=data, **options)
    if setup is not None:
        setup(trainer)
    return trainer


def trained(*args: Any, **kwargs: Any):
    """Return the trainer that `make_trainer` makes of the arguments, after its run."""
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return trainer


def skipping(cls: type[Trainer]) -> type[Trainer]:
    """Return the class, which skips a batch that runs out of memory, as people do."""

    class Skipping(cls):
        def training_step(self, *args, **kwargs):
            try:
                return super().training_step(*args, **kwargs)
            except torch.OutOfMemoryError:
                return torch.zeros(())

    return Skipping


def with_loss(cls: type[Trainer], loss: Callable[..., torch.Tensor]) -> type[Trainer]:
    """Return the class, whose `compute_loss` is `loss(trainer, model, inputs)`."""

    class WithLoss(cls):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return loss(self, model, inputs)

    return WithLoss


def run(trainer: Trainer, **kwargs: Any) -> dict[str, Any]:
    """Train, and return all that the run leaves behind: `assert_identical` tells whether two runs are the same."""
    trainer.train(**kwargs)
    return {
        "weights": snapshot(trainer.model),
        "optimizer": copy.deepcopy(trainer.optimizer.state_dict()),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "generators": generators(),
    }


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """With weights that a checkpoint has to replace: all of them."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def assert_loads(folder: Any, source: torch.nn.Module, model: torch.nn.Module) -> None:
    """The trainer of a model of other weights finds those of `source` in the folder, and draws no random numbers."""
    trainer = make_trainer(folder / "out", "net", model=randomized(model))
    before = generators()
    trainer._load_from_checkpoint(str(folder))
    assert_identical(snapshot(model), snapshot(source))
    assert_identical(generators(), before)


class Gradients(TrainerCallback):
    """The gradient of each step, by parameter name; None where there is none."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({name: None if p.grad is None else p.grad.clone() for name, p in named})


class WeightsAtSaves(TrainerCallback):
    """The weights when each checkpoint is written, by step."""

    def __init__(self):
        self.weights = {}

    def on_save(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = snapshot(model)


def make_unmoved(output_dir: Any, cls: type[Trainer], kind: str = "net", **kwargs: Any) -> Trainer:
    """A trainer of a few windows of two micro-batches. A penalised one perturbs its weights by nothing."""
    settings = {"gradient_accumulation_steps": 2, "max_steps": 3, **UNMOVED, **kwargs}
    return make_trainer(output_dir, kind, cls, **settings)


def assert_unmoved_is_plain(make: Callable[[type[Trainer]], Trainer]) -> tuple[Trainer, Trainer]:
    """Train what `make` returns for `Trainer` and for `GNPTrainer`: weights, logs and generators end the same."""
    trainers, results = [], []
    for cls in BOTH:
        torch.manual_seed(0)
        trainers.append(make(cls))
        results.append(run(trainers[-1]))
    assert all("gnp_sharpness" in log for log in results[1]["logs"])
    results[1]["logs"] = without_gnp(results[1]["logs"])
    assert_identical(*results[::-1])
    return trainers[0], trainers[1]


def inner(cls, base):
    """A trainer of the user's own, made by `base(Trainer)`, with `GNPMixin` before it where `cls` is penalised."""
    own = base(Trainer)
    return type("Own", (GNPMixin, own), {}) if issubclass(cls, GNPMixin) else own


def without_gnp(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in log.items() if not name.startswith("gnp")} for log in logs]


def is_perturbed(trainer: Trainer) -> bool:
    """Whether the weights are those of the second pass."""
    return getattr(trainer, "_gnp_run", None) is not None and trainer._gnp_run.engine.is_perturbed


def engine_of(trainer: Trainer) -> Any:
    return trainer._gnp_run.engine


def generators() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), np.random.get_state()]


def assert_identical(result: Any, expected: Any, where: str = "") -> None:
    """Bit for bit, through containers."""
    assert type(result) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(result, expected), where
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(result, expected), where
    elif isinstance(expected, dict):
        assert result.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_identical(result[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(result) == len(expected), where
        for index, value in enumerate(expected):
            assert_identical(result[index], value, f"{where}[{index}]")
    else:
        assert result == expected, where


def record_forwards(model: torch.nn.Module, record: Callable[[torch.nn.Module], Any]) -> list[Any]:
    """A list that gets `record(model)` at the start of each forward in training mode."""
    records: list[Any] = []
    model.register_forward_pre_hook(lambda module, _: records.append(record(module)) if module.training else None)
    return records


def without_probe(records: list[Any], micro_batches: int) -> list[Any]:
    """Records of all forwards, but that of the probe, which follows the first pass of a run's first penalised step."""
    return [*records[:micro_batches], *records[micro_batches + 1 :]]


def probe_flops(kind: str) -> int:
    """Those of one forward of a micro-batch."""
    model, inputs = make_model(kind), collate(make_data(kind)[:MICRO_BATCH])
    with FlopCounterMode(display=False) as counter:
        model.train()(**inputs)
    return counter.get_total_flops()


def logs_of(trainer: Trainer, *names: str) -> dict[str, list[float]]:
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry.get(name) for entry in logged] for name in names}


def windows(kind: str, micro_batches: int, data=None) -> list[list[dict[str, torch.Tensor]]]:
    """The data as windows of `micro_batches` micro-batches: ranks times accumulation steps of one optimizer step."""
    data = make_data(kind) if data is None else data
    batches = [collate(data[i : i + MICRO_BATCH]) for i in range(0, len(data), MICRO_BATCH)]
    return [batches[i : i + micro_batches] for i in range(0, len(batches), micro_batches)]


def window_loss(
    model: torch.nn.Module,
    part: Sequence[dict[str, torch.Tensor]],
    window: Sequence[dict[str, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """
    The loss that `Trainer` differentiates in one step: for a decoder or a ViT the mean over all labels of the window,
    for a plain network the mean over micro-batches. A BERT classifier takes `num_items_in_batch` without using it, so
    stock `Trainer` leaves the sum over micro-batches undivided; the penalty is on what `Trainer` differentiates.
    A part of a window has its share of that loss.
    """
    window = part if window is None else window
    kind = model.config.model_type if hasattr(model, "config") else "net"
    if kind in DECODERS or kind == "vit":
        labels = [batch["labels"][:, 1:] if kind in DECODERS else batch["labels"] for batch in window]
        items = sum((batch_labels != -100).sum() for batch_labels in labels)
        return sum(model(**batch, num_items_in_batch=items).loss for batch in part)
    losses = sum(model(**batch)["loss"] for batch in part)
    return losses if kind == "bert" else losses / len(window)


class Part(NamedTuple):
    """Some micro-batches of a window, which share a perturbation: their loss is their share of the window's."""

    micro_batches: Sequence[dict[str, torch.Tensor]]
    window: Sequence[dict[str, torch.Tensor]]


SCOPES: dict[str, Callable[[list, int], list[list]]] = {
    "step": lambda window, ranks: [window],
    "micro_batch": lambda window, ranks: [window[i : i + ranks] for i in range(0, len(window), ranks)],
    "rank": lambda window, ranks: [window[rank::ranks] for rank in range(ranks)],
    "rank_micro_batch": lambda window, ranks: [[micro_batch] for micro_batch in window],
}


def by_scope(scope: str, ranks: int = 1) -> dict[str, Any]:
    """For `reference_run`: the parts of a window, and their loss."""
    return {
        "groups": lambda window: [Part(part, window) for part in SCOPES[scope](window, ranks)],
        "loss": lambda model, part: window_loss(model, part.micro_batches, part.window),
    }


def reference_run(
    kind: str,
    accumulation: int,
    ranks: int = 1,
    r: float = 0.05,
    alpha: float = 0.8,
    model: torch.nn.Module | None = None,
    steps: Sequence[Any] | None = None,
    loss: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    penalty: Callable[[int], tuple[float, float]] | None = None,
    **variant: Any,
):
    """
    Start and end point of the reference loop, with its logs, at the settings of `BASE`; over other `steps` (each the
    argument of `loss`) than the windows of all the data, and with another `loss` than `window_loss`, if given.
    """
    model = make_model(kind) if model is None else model
    model.train()
    start = flat_weights(model)
    logs = reference.train(
        model,
        optimizer([p for p in model.parameters() if p.requires_grad], lr=BASE["learning_rate"]),
        windows(kind, accumulation * ranks) if steps is None else steps,
        window_loss if loss is None else loss,
        penalty or (lambda step: (r, alpha)),
        BASE["max_grad_norm"],
        **variant,
    )
    return start, flat_weights(model), logs


def assert_ends_at(model: torch.nn.Module, reference_result) -> None:
    start, expected, _ = reference_result
    assert relative_distance(flat_weights(model), expected, start) < WEIGHTS_TOLERANCE


def msam_run(
    kind: str,
    steps: Sequence[Any],
    r: float,
    optimizer: Callable[..., torch.optim.Optimizer],
    learning_rate: float = BASE["learning_rate"],
):
    """As `reference_run`, with the perturbation along the momentum and the loss alone in the logs."""
    model = make_model(kind).train()
    start = flat_weights(model)
    made = optimizer([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = reference.train_msam(model, made, steps, window_loss, r, BASE["max_grad_norm"])
    return start, flat_weights(model), [{"loss": loss} for loss in losses]


def assert_matches_reference(trainer: Trainer, reference_result) -> None:
    start, expected, reference_logs = reference_result
    assert relative_distance(flat_weights(trainer.model), expected, start) < WEIGHTS_TOLERANCE
    logs = logs_of(trainer, "loss", "gnp_grad_norm", "gnp_perturbed_loss", "gnp_sharpness", "gnp_cosine")
    assert len(logs["loss"]) == len(reference_logs)
    for step, expected_log in enumerate(reference_logs):
        for name, value in expected_log.items():
            tolerance = {"abs": COSINE_TOLERANCE} if name == "gnp_cosine" else {"rel": LOG_TOLERANCE}
            assert logs[name][step] == pytest.approx(value, **tolerance), f"{name} at step {step}"
        sharpness = expected_log["gnp_perturbed_loss"] - expected_log["loss"]
        assert logs["gnp_sharpness"][step] == pytest.approx(sharpness, abs=LOG_TOLERANCE * expected_log["loss"])
