"""
Whether training with the penalty ends in a flatter minimum than plain training: the same network, data, order and
seeds, twice.

    python benchmarks/flatness.py

A network of three layers on scikit-learn's digits, from the same weights, with the same batches. After training, the
sharpness of the training loss is measured over all training data, without the penalty. It prints means over seeds
and p of Student's paired test. Runs that docs/figures/flatness.json has already are not repeated.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.datasets import load_digits
from studies.statistics import mean_and_error, p_value
from studies.store import Store
from torch import nn
from transformers import set_seed

from hf_gnp import GNPTrainer, GNPTrainingArguments, plot_loss_surface


METHODS = {
    "plain": {"gnp_alpha": 0.0},
    "penalty": {"gnp_r": 0.05, "gnp_alpha": 0.8},
    "penalty, r = 0.1": {"gnp_r": 0.1, "gnp_alpha": 0.8},
}
MEASURES = {
    "top_eigenvalue": "largest eigenvalue",
    "trace": "trace",
    "ascent": "rise at r = 0.05",
    "grad_norm": "‖∇L‖",
    "train_loss": "training loss",
    "test_loss": "test loss",
}
# Of all methods alike; no method was tuned.
SETTINGS = {
    "num_train_epochs": 40,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 1000,
    "learning_rate": 0.05,
    "momentum": 0.9,
    "lr_scheduler_type": "cosine",
    "train_size": 1000,
    "width": 64,
}


class Network(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def load_data(train_size: int, seed: int) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Training and test data: another split with each seed, the same for all methods."""
    digits = load_digits()
    x, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = np.random.default_rng(seed).permutation(len(x))
    rows = [{"x": x[i], "labels": labels[i]} for i in order]
    return rows[:train_size], rows[train_size:]


def trained(method: str, seed: int, settings: dict[str, Any], folder: str) -> GNPTrainer:
    """A trainer that has trained once."""
    train_data, test_data = load_data(settings["train_size"], seed)
    set_seed(seed)
    model = Network(settings["width"])
    names = ("num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate")
    args = GNPTrainingArguments(
        output_dir=folder,
        seed=seed,
        lr_scheduler_type=settings["lr_scheduler_type"],
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{name: settings[name] for name in names},
        **METHODS[method],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate, momentum=settings["momentum"])
    trainer = GNPTrainer(model, args, train_dataset=train_data, eval_dataset=test_data, optimizers=(optimizer, None))
    trainer.train()
    return trainer


def run(method: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train once, and measure."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trained(method, seed, settings, folder)
        # Exactly: differences would see the kinks of ReLU that their step crosses.
        options = {"method": "exact", "samples": settings["train_size"], "max_products": 200, "log": False}
        sharpness = trainer.measure_sharpness(trainer.train_dataset, **options)
        test_loss = trainer.evaluate()["eval_loss"]
    return {
        "method": method,
        "seed": seed,
        "settings": settings,
        "gnp": METHODS[method],
        "top_eigenvalue": sharpness["top_eigenvalues"][0],
        "trace": sharpness["trace"],
        "ascent": sharpness["ascent"][0],
        "grad_norm": sharpness["grad_norm"],
        "train_loss": sharpness["loss"],
        "test_loss": test_loss,
    }


def draw(path: Path, seed: int, settings: dict[str, Any]) -> None:
    """The training loss around the ends of plain training and of the penalty, along their eigenvectors."""
    with tempfile.TemporaryDirectory() as folder:
        ends = [str(Path(folder) / method) for method in ("plain", "penalty")]
        for end in ends:
            trainer = trained(Path(end).name, seed, settings, folder)
            trainer.save_model(end)
        options = {"dataset": trainer.train_dataset, "samples": settings["train_size"], "points": 25, "distance": 2.0}
        plot_loss_surface(trainer, path, ends, directions="eigenvectors", dimensions=2, **options)


def table(runs: dict[str, dict[int, dict[str, Any]]], seeds: list[int]) -> str:
    """Means with their standard errors; for each penalised method the mean paired difference to plain, with p."""
    lines = [f"| | {' | '.join(runs)} |", "|---" * (1 + len(runs)) + "|"]
    for measure, label in MEASURES.items():
        plain = np.array([runs["plain"][seed][measure] for seed in seeds])
        cells = [label]
        for method, by_seed in runs.items():
            values = np.array([by_seed[seed][measure] for seed in seeds])
            mean, error = mean_and_error(values.tolist())
            cell = f"{mean:.3g} ± {error:.2g}"
            if method != "plain":
                p = float(stats.ttest_rel(values, plain).pvalue)
                lower = int((values < plain).sum())
                cell += f"; Δ {(values - plain).mean():+.2g} (p {p_value(p)}; lower in {lower} of {len(seeds)})"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="How many, from 0. Default: 5.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/figures/flatness.json")
    parser.add_argument("--picture", type=Path, help="Draw the loss around the ends of seed 0, and nothing else.")
    args = parser.parse_args()
    if args.picture is not None:
        draw(args.picture, 0, SETTINGS)
        return
    store, seeds = Store(args.output), list(range(args.seeds))
    for seed in seeds:
        for method in METHODS:
            if seed not in store.of(SETTINGS, METHODS)[method]:
                store.add(run(method, seed, SETTINGS))
                print(f"{method}, seed {seed}: {store.runs[-1]['top_eigenvalue']:.4g}", flush=True)
    print(table(store.of(SETTINGS, METHODS), seeds))


if __name__ == "__main__":
    main()
