"""
Measures the sharpness of checkpoints, and draws the loss around them.

    python -m hf_gnp.sharpness CHECKPOINT [CHECKPOINT ...] --data DATA

A checkpoint is a folder or a model of the hub: a classifier of images or texts, or a causal language model. DATA is a
dataset of the hub, a folder, or a parquet, csv, json or text file. All checkpoints see the same sample. It prints a
table with a row for each, and writes sharpness.json, surface.png and, for two or more of one model, line.png.
`accelerate launch -m hf_gnp.sharpness …` divides the sample among processes, and the model under FSDP2 and ZeRO.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .surface import plot_loss_surface
from .tasks import load_data, load_model


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = make_parser().parse_args(argv)
    output = Path(args.output_dir)
    rows = []
    for checkpoint in args.checkpoints:
        trainer = make_trainer(args, checkpoint)
        result = trainer.measure_sharpness(
            k=args.k,
            radii=args.radii,
            samples=args.samples,
            probes=args.probes,
            tolerance=args.tolerance,
            max_products=args.max_products,
            seed=args.seed,
            log=False,
        )
        rows.append({"checkpoint": checkpoint} | result)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        (output / "sharpness.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(table(rows))
    if args.pictures:
        # The last trainer has the last checkpoint; under DeepSpeed it cannot read the others.
        several = args.checkpoints if len(args.checkpoints) > 1 and not trainer.is_deepspeed_enabled else ()
        options = {"samples": args.samples, "seed": args.seed, "points": args.points}
        plot_loss_surface(trainer, output / "surface.png", several, dimensions=args.dimensions, **options)
        if len(several) == 2:
            plot_loss_surface(trainer, output / "line.png", several, directions="line", **options)
    return rows


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_gnp.sharpness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", help="Folders or models of the hub; for pictures of one model.")
    parser.add_argument("--data", required=True, help="A dataset of the hub, a folder, or a file.")
    parser.add_argument("--split", default="test", help="Of the dataset. Default: test.")
    parser.add_argument("--image_column", help="The column of the images, where its name does not tell.")
    parser.add_argument("--text_column", help="The column of the texts, where its name does not tell.")
    parser.add_argument("--label_column", help="The column of the labels, where its name does not tell.")
    parser.add_argument("--max_length", type=int, default=128, help="Tokens of a text at most. Default: 128.")
    parser.add_argument("--batch_size", type=int, default=16, help="Samples in a forward pass. Default: 16.")
    parser.add_argument("--samples", type=int, default=256, help="Over all processes. Default: 256.")
    parser.add_argument("--k", type=int, default=1, help="How many of the largest eigenvalues. Default: 1.")
    parser.add_argument("--radii", type=float, nargs="+", default=[0.05], help="Distances r. Default: 0.05.")
    parser.add_argument("--probes", type=int, default=10, help="Random vectors for the trace. Default: 10.")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="Of the eigenvalues. Default: 1e-3.")
    parser.add_argument("--max_products", type=int, default=60, help="For the eigenvalues. Default: 60.")
    parser.add_argument("--seed", type=int, default=0, help="Of the sample and of random directions. Default: 0.")
    parser.add_argument("--bf16", action="store_true", help="Compute in bf16: faster on a GPU, and less precise.")
    parser.add_argument("--use_cpu", action="store_true", help="Even if there is a GPU.")
    parser.add_argument("--pictures", action=argparse.BooleanOptionalAction, default=True, help="Draw. Default: yes.")
    parser.add_argument("--dimensions", type=int, default=1, choices=(1, 2), help="Curves or maps. Default: 1.")
    parser.add_argument("--points", type=int, default=21, help="Of a picture, in each dimension. Default: 21.")
    parser.add_argument("--output_dir", default="sharpness", help="Default: sharpness.")
    return parser


def make_trainer(args: argparse.Namespace, checkpoint: str) -> Any:
    from hf_gnp import GNPTrainer, GNPTrainingArguments

    is_launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    training_args = GNPTrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=args.batch_size,
        max_steps=1,
        learning_rate=0.0,
        optim="sgd",
        gnp_alpha=0.0,
        save_strategy="no",
        report_to=[],
        bf16=args.bf16,
        use_cpu=args.use_cpu,
        ddp_backend="gloo" if args.use_cpu and is_launched else None,
        remove_unused_columns=False,
    )
    model = load_model(checkpoint)  # after the arguments, which say whether it is sharded as it is loaded
    data, collator = load_data(args, model, checkpoint)
    trainer = GNPTrainer(
        model=model, args=training_args, train_dataset=data, eval_dataset=data, data_collator=collator
    )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        _shard(trainer)
    return trainer


def _shard(trainer: Any) -> None:
    """These engines shard a model when it begins to train: one step of SGD with learning rate 0 moves no weight."""
    buffers = [(buffer, buffer.clone()) for buffer in trainer.model.buffers()]
    trainer.train()
    for buffer, value in buffers:
        buffer.copy_(value)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each checkpoint, as Markdown."""
    header = ["checkpoint", "loss", "‖∇L‖"]
    header += [f"λ{i + 1} (‖Hv-λv‖)" for i in range(len(rows[0].get("top_eigenvalues", [])))]
    header += ["trace ± s.e."] if "trace" in rows[0] else []
    rises = {"ascent": "∇L", "ascent_top_eigenvector": "v₁", "ascent_random": "random"}
    found = [name for name in rises if name in rows[0]]
    header += [f"rise at r={r:g}: {', '.join(rises[name] for name in found)}" for r in rows[0]["radii"]]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [row["checkpoint"], f"{row['loss']:.4f}", f"{row['grad_norm']:.4g}"]
        pairs = zip(row.get("top_eigenvalues", []), row.get("residuals", []), strict=True)
        cells += [f"{value:.4g} ({residual:.1g})" for value, residual in pairs]
        cells += [f"{row['trace']:.4g} ± {row['trace_standard_error']:.2g}"] if "trace" in row else []
        cells += [", ".join(f"{row[name][i]:.3g}" for name in found) for i in range(len(row["radii"]))]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
