"""What cost.py says of its measurements: ratios to plain steps, a table, JSON, and a figure."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


QUARTILES = (25, 50, 75)


def weighted_quartiles(values: Sequence[float], interval: int) -> list[float]:
    """Quartiles of plain and of penalised steps, 1 of `interval` being penalised, weighted by their share."""
    penalised, plain = values[interval - 1 :: interval], [v for i, v in enumerate(values) if (i + 1) % interval]
    quartiles = np.percentile(penalised, QUARTILES) / interval
    if plain:
        quartiles += np.percentile(plain, QUARTILES) * (1 - 1 / interval)
    return quartiles.tolist()


def summarise(results: dict[str, dict[str, Any]], items: int, weight_bytes: int, matmul_rate: float | None) -> list:
    plain, rows = results["plain"], []
    for name, result in results.items():
        interval = result["interval"]

        def ratio(clock: str, result=result, interval=interval) -> list[float]:
            pairs = zip(result["steps"], plain["steps"], strict=True)
            return weighted_quartiles([getattr(a, clock) / getattr(b, clock) for a, b in pairs], interval)

        seconds = weighted_quartiles([step.wall for step in result["steps"]], interval)
        over_plain = result["peak"] - plain["peak"]
        row = {
            "name": name,
            "seconds": seconds,
            "ratio": ratio("wall"),
            "cpu_ratio": ratio("cpu"),
            "items_per_second": items / seconds[1],
            "flops_ratio": result["flops"] / plain["flops"],
            "peak_over_plain": over_plain,
            "peak_over_plain_in_weights": over_plain / weight_bytes,
            "steps": [step.wall for step in result["steps"]],
        }
        if matmul_rate is not None:
            row["share_of_matmul_rate"] = result["flops"] / seconds[1] / matmul_rate
        rows.append(row)
    return rows


def spread(quartiles: Sequence[float], scale: float = 1, digits: int = 3) -> str:
    low, middle, high = (f"{value * scale:.{digits}f}" for value in quartiles)
    return f"{middle} [{low}, {high}]"


def print_report(report: dict[str, Any], profile: bool) -> None:
    print(f"\n{report['model']}: {report['parameters'] / 1e6:.1f}M parameters, batch {report['batch_size']}", end=", ")
    print(f"{report['device']}, {report['threads']} threads, load {report['load']:.1f}, {report['steps']} steps each")
    print(f"| | ms/step | × plain | CPU time × plain | {report['unit']}/s | FLOPs | peak memory over plain |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for row in report["rows"]:
        print(
            f"| {row['name']} | {spread(row['seconds'], 1e3, 1)} | {spread(row['ratio'])} | {row['cpu_ratio'][1]:.3f} "
            f"| {row['items_per_second']:.0f} | {row['flops_ratio']:.2f} "
            f"| {row['peak_over_plain'] / 2**20:+.1f} MiB = {row['peak_over_plain_in_weights']:+.2f} × weights |"
        )
        if "share_of_matmul_rate" in row:
            print(f"  {row['name']}: {row['share_of_matmul_rate']:.0%} of the rate of a large matrix product")
    if profile:
        for op in report.get("beyond_two_passes", []):
            beyond = op["penalised"] - 2 * op["plain"]
            print(f"  {1e3 * beyond:+9.3f} ms beyond two plain steps: {op['operation'][:80]}")


def write(folder: str, name: str, report: dict[str, Any]) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    low, middle, high = np.array([row["ratio"] for row in rows]).T
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    axes.barh([row["name"] for row in rows], middle, xerr=[middle - low, high - middle], capsize=3, color="tab:blue")
    axes.plot([row["flops_ratio"] for row in rows], range(len(rows)), "k|", markersize=14, label="FLOPs")
    axes.set(xlabel="time of a step, in plain steps (median and quartiles)", title=title)
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
