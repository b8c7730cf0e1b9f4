"""
Search r, α and the scope of the penalty with optuna, by `Trainer.hyperparameter_search`, and draw the trials.

    python examples/search.py --trials 12
        Search on the small BERT of text_classification.py. It takes five minutes on two CPU cores, without a network.
    python examples/search.py --model_name_or_path bert-base-uncased --dataset_name stanfordnlp/sst2 --eval_steps 500
        Search on your own model and data, with the flags of text_classification.py.

The output directory has the trials in search.db and the picture search.png. A second call adds trials.
Do not report results on the data of the search.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from common import parse_args, setup_logging
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from text_classification import EMBEDDED_DEFAULTS, TextDataArguments, build_trainer


# A step has four micro-batches. With one, the scopes "micro_batch" and "step" are equal.
SEARCH_DEFAULTS = EMBEDDED_DEFAULTS | {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "save_strategy": "no",
}
SCOPES = {"step": "o", "micro_batch": "s"}


@dataclass
class SearchArguments:
    """Set the length of the search."""

    trials: int = field(default=12, metadata={"help": "The number of training runs."})


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Suggest r over two orders of magnitude (metric "l2"), α from plain training (0) to SAM (1), and a scope."""
    return {
        "gnp_r": trial.suggest_float("gnp_r", 0.005, 0.5, log=True),
        "gnp_alpha": trial.suggest_float("gnp_alpha", 0.0, 1.0, step=0.1),
        "gnp_scope": trial.suggest_categorical("gnp_scope", list(SCOPES)),
    }


def draw(trials: list[optuna.trial.FrozenTrial], path: Path) -> None:
    """Draw the accuracy of each trial over r. The colour is α, and the shape is the scope."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for scope, marker in SCOPES.items():
        of_scope = [trial for trial in trials if trial.params["gnp_scope"] == scope]
        r, alpha = ([trial.params[name] for trial in of_scope] for name in ("gnp_r", "gnp_alpha"))
        values = [trial.value for trial in of_scope]
        points = axes.scatter(r, values, c=alpha, marker=marker, s=60, vmin=0, vmax=1, edgecolors="black")
        axes.scatter([], [], marker=marker, s=60, c="white", edgecolors="black", label=scope)
    best = max(trials, key=lambda trial: trial.value)
    axes.annotate("best", (best.params["gnp_r"], best.value), (8, 8), textcoords="offset points")
    axes.set(xlabel="gnp_r", ylabel="accuracy of the evaluation", xscale="log")
    axes.set_title(f"{len(trials)} trials, one seed each")
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.legend(title="gnp_scope")
    figure.colorbar(points, label="gnp_alpha")
    figure.savefig(path, dpi=150)


def main() -> None:
    model_args, data_args, args, search_args = parse_args(TextDataArguments, SEARCH_DEFAULTS, SearchArguments)
    setup_logging(args)
    trainer = build_trainer(model_args, data_args, args)
    start = copy.deepcopy(trainer.model)
    trainer.model_init = lambda: copy.deepcopy(start)  # each trial starts from the same weights
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    study = {"study_name": "gnp", "storage": f"sqlite:///{folder / 'search.db'}", "load_if_exists": True}
    trainer.hyperparameter_search(
        hp_space=space,
        compute_objective=lambda metrics: metrics["eval_accuracy"],
        n_trials=search_args.trials,
        direction="maximize",
        backend="optuna",
        **study,
    )
    if trainer.is_world_process_zero():
        trials = optuna.load_study(study_name=study["study_name"], storage=study["storage"]).get_trials()
        trials = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
        draw(trials, folder / "search.png")
        for trial in sorted(trials, key=lambda trial: trial.value, reverse=True):
            r, alpha, scope = (trial.params[name] for name in ("gnp_r", "gnp_alpha", "gnp_scope"))
            print(f"accuracy {trial.value:.4f}  gnp_r={r:.3g}  gnp_alpha={alpha:.1f}  gnp_scope={scope}")
        print(f"\nThe trials: {folder / 'search.png'}")


if __name__ == "__main__":
    main()
