"""
What rounding to bf16 leaves of the perturbation, and of the penalty term g₂ - g₁, on a pretrained encoder.

    python benchmarks/rounding.py --model_path MODEL_FOLDER --data SST2_TRAIN.parquet

The weights are bf16 numbers. They are moved by r g₁/‖g₁‖, and the moved weights are kept in fp32, or rounded to bf16
to nearest or stochastically; gradients are computed in fp32, so that nothing but the rounding of the weights differs.
Printed are the projections of what rounding gives on what fp32 gives: 1 is all of it. Those of stochastic rounding
are means and standard deviations over draws.
"""

import argparse
import json
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from hf_gnp.penalty import local_sq_norms, move_
from hf_gnp.rounding import noise_generator


def projection(changes: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """⟨changes, expected⟩/‖expected‖²"""
    dot = sum(torch.dot(a.flatten(), b.flatten()) for a, b in zip(changes, expected, strict=True))
    return (dot / local_sq_norms(expected).sum()).item()


def gradients(model: torch.nn.Module, weights: list[torch.Tensor], batch: dict) -> list[torch.Tensor]:
    """∇L at `weights`, in fp32."""
    parameters = list(model.parameters())
    with torch.no_grad():
        torch._foreach_copy_(parameters, weights)
    return list(torch.autograd.grad(model(**batch).loss, parameters))


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.float() - y.float() for x, y in zip(a, b, strict=True)]


def moved(weights: list[torch.Tensor], g1: list[torch.Tensor], r: float, seed: int | None, dtype: torch.dtype):
    result = [weight.to(dtype, copy=True) for weight in weights]
    norm = local_sq_norms(g1).sum().sqrt().item()
    noise = None if seed is None else [noise_generator(weight.device, seed, i) for i, weight in enumerate(result)]
    move_(result, g1, list(result), r / norm, generators=noise)
    return result


def measure(model: torch.nn.Module, batch: dict, radii: list[float], draws: int) -> list[dict[str, float]]:
    start = [p.detach().to(torch.bfloat16).float() for p in model.parameters()]
    g1 = gradients(model, start, batch)
    rows = []
    for r in radii:
        target = moved(start, g1, r, None, torch.float32)
        move, term = difference(target, start), difference(gradients(model, target, batch), g1)

        def left(seed: int | None, r: float = r, move: list = move, term: list = term) -> tuple[float, float]:
            rounded = moved(start, g1, r, seed, torch.bfloat16)
            g2 = gradients(model, [weight.float() for weight in rounded], batch)
            return projection(difference(rounded, start), move), projection(difference(g2, g1), term)

        nearest_move, nearest_term = left(None)
        stochastic = torch.tensor([left(seed) for seed in range(draws)])
        rows.append(
            {
                "r": r,
                "move_nearest": nearest_move,
                "move_stochastic": stochastic[:, 0].mean().item(),
                "term_nearest": nearest_term,
                "term_stochastic": stochastic[:, 1].mean().item(),
                "term_stochastic_std": stochastic[:, 1].std().item(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--data", required=True, help="A parquet file with the columns sentence and label.")
    parser.add_argument("--radii", type=float, nargs="+", default=[0.05, 0.02, 0.01, 0.005, 0.002, 0.001])
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--output", default="outputs/rounding.json")
    args = parser.parse_args()

    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_path, num_labels=2, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    samples = datasets.load_dataset("parquet", data_files=args.data, split=f"train[:{args.batch_size}]")
    batch = dict(tokenizer(list(samples["sentence"]), padding=True, truncation=True, return_tensors="pt"))
    batch["labels"] = torch.tensor(list(samples["label"]))
    rows = measure(model.eval(), batch, args.radii, args.draws)
    print("|".join(f"{name:>22}" for name in rows[0]))
    for row in rows:
        print("|".join(f"{value:>22.4g}" for value in row.values()))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
