"""
Show the gain of the penalty with wrong labels. It takes about four minutes on two CPU cores and needs no network.

    python examples/demo.py

A small vision transformer learns scikit-learn's digits. 40% of the training labels are wrong. There are three methods:
plain training, plain training for twice the epochs, and the penalty. The last two cost the same. Within a seed all
three start from the same weights and see the same images, wrong labels and batches.

Validation images with correct labels choose the best epoch, and test images measure it. The script prints a table and
draws demo.png in its output directory, outputs/demo.
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
# Every 4 of the 32 images of a step share one perturbation (m = 4). With wrong labels a small m is better.
PENALTY = {
    "gnp_r": 0.2,
    "gnp_alpha": 1.0,
    "gnp_scope": "micro_batch",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
}
# Arguments, and epochs as a multiple of plain training. The long runs start first.
METHODS = {"penalised": (PENALTY, 1), "plain, twice the epochs": (PLAIN, 2), "plain": (PLAIN, 1)}


def in_worker(function: str, *args: Any, **kwargs: Any) -> Any:
    """Call a function of demo_training.py, without the messages that libraries log on import."""
    logging.disable(logging.WARNING)
    import demo_training

    return getattr(demo_training, function)(*args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="The number of runs of each method.")
    parser.add_argument("--epochs", type=int, default=20, help="The number of epochs of plain training.")
    parser.add_argument("--processes", type=int, default=2, help="The number of parallel runs, with one thread each.")
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
        print("Drawing the loss around the final weights of two runs of seed 0 that cost the same ...")
        ends = ["plain, twice the epochs", "penalised"]
        draw(runs, pool.submit(in_worker, "surfaces", 0, ends, args.output_dir).result(), picture)
    print(f"\n{table(runs)}\n\nPicture: {picture}")


if __name__ == "__main__":
    main()
