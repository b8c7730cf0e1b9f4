"""
What the penalty buys where labels are wrong: about four minutes on two CPU cores, no network.

    python examples/demo.py

A small vision transformer learns scikit-learn's digits, of whose training labels 40% are wrong: plainly; plainly for
twice as long, which costs what the penalty does; and with the penalty. Within a seed all three start from the same
weights and see the same images, wrong labels and batches. The best epoch is chosen by validation images whose labels
are right, and counted on test images. It prints a table, and draws demo.png in its output directory, outputs/demo.
"""

import argparse
import logging
import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from demo_report import draw, table
from tqdm import tqdm


PLAIN = {"gnp_alpha": 0.0, "per_device_train_batch_size": 32}
# Each 4 of the 32 images of a step have a perturbation of their own: with wrong labels, few are better (m = 4).
PENALTY = {
    "gnp_r": 0.2,
    "gnp_alpha": 1.0,
    "gnp_scope": "micro_batch",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
}
# Of each method the arguments, and the epochs in those of plain training. The long runs come first.
METHODS = {"penalised": (PENALTY, 1), "plain, twice the epochs": (PLAIN, 2), "plain": (PLAIN, 1)}


def in_worker(function: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a function of demo_training.py without the notices that libraries log when they are imported."""
    logging.disable(logging.WARNING)
    import demo_training

    return getattr(demo_training, function)(*args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="How often each method is run.")
    parser.add_argument("--epochs", type=int, default=20, help="Of plain training.")
    parser.add_argument("--processes", type=int, default=2, help="Runs beside each other, one thread each.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    args = parser.parse_args()
    picture = args.output_dir / "demo.png"
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:

        def start(method: str, seed: int) -> Future:
            arguments, length = METHODS[method]
            epochs = length * args.epochs
            return pool.submit(in_worker, "train", method, seed, args.output_dir, num_train_epochs=epochs, **arguments)

        started = [start(method, seed) for method in METHODS for seed in range(args.seeds)]
        runs = [run.result() for run in tqdm(as_completed(started), "training", len(started), unit="run")]
        print("Drawing the loss around the ends of two runs of seed 0, which cost the same ...")
        ends = ["plain, twice the epochs", "penalised"]
        draw(runs, pool.submit(in_worker, "surfaces", 0, ends, args.output_dir).result(), picture)
    print(f"\n{table(runs)}\n\nPicture: {picture}")


if __name__ == "__main__":
    main()
