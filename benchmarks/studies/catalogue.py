"""The studies: which cases, which methods, which r to choose from."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .images import image_task
from .methods import METHODS, PLAIN, TWICE
from .sentences import sentence_task
from .task import Task


@dataclass(frozen=True)
class Study:
    """
    Args:
        cases: The settings of each case, all that makes its results what they are besides method and seed.
        methods: Names of `METHODS`.
        radii: r is chosen of these, for each case and method, by the accuracy on the validation data.
        radii_of: Other radii, by the name of the method.
        tuning_seeds: Those that r is chosen on; none of them is reported.
        seeds: How many are reported, from 0.
    """

    cases: dict[str, dict[str, Any]]
    methods: tuple[str, ...]
    radii: tuple[float, ...]
    tuning_seeds: tuple[int, ...] = (100,)
    seeds: int = 5
    radii_of: dict[str, tuple[float, ...]] = field(default_factory=dict)


CIFAR10 = {
    "task": "images",
    "source": "cifar10",
    "train_size": 1500,
    "validation_size": 500,
    "test_size": 2000,
    "wrong": 0,
    "wrong_kind": "uniform",
    "batch_size": 32,
    "epochs": 16,
}
LARGE = {"train_size": 5000, "validation_size": 1000, "test_size": 10000, "batch_size": 128}
VIT = CIFAR10 | {"model": "vit", "width": 96, "layers": 3, "learning_rate": 1e-3}
LARGE_VIT = VIT | LARGE | {"train_size": 4000, "width": 192, "layers": 4, "epochs": 30, "bf16": True}
# ReLU: products of its Hessian by differences see the kinks (docs/sharpness.md).
RESNET = CIFAR10 | {"model": "resnet", "width": 32, "learning_rate": 0.05, "flatness": False}
LARGE_RESNET = RESNET | LARGE | {"learning_rate": 0.1, "epochs": 40}
PRETRAINED = CIFAR10 | {
    "model": "pretrained",
    "image_size": 98,
    "learning_rate": 5e-5,
    "epochs": 3,
    "bf16": True,
    "flatness": False,
}
DIGITS = VIT | {
    "source": "digits",
    "train_size": 500,
    "validation_size": 297,
    "test_size": 1000,
    "width": 64,
    "layers": 2,
    "learning_rate": 2e-3,
    "epochs": 20,
}
SST2 = {
    "task": "sentences",
    "train_size": 1000,
    "validation_size": 500,
    "test_size": 872,
    "max_length": 64,
    "wrong": 0,
    "batch_size": 32,
    "epochs": 3,
    "learning_rate": 2e-4,
    "bf16": True,
    "flatness": False,
}
AG_NEWS = {
    "classes": 4,
    "steps": 120,
    "every": 10,
    "batch_size": 16,
    "learning_rate": 5e-5,
    "target_loss": 0.8,
}
SMALL_M = ("m = 32", "m = 8", "m = 4", "m = 8, every 2nd step")
OF_128 = ("m = 128", "m = 32 of 128", "momentum")

CANDIDATES = ("l2", "layer", "layer, late", "layer, ramp")
# For a machine with few cores without bf16 units: fp32, and no measures besides the accuracy.
SMALL = {"flatness": False, "quantisation": False, "bf16": False}
SMALL_DIGITS = DIGITS | SMALL
SMALL_SST2 = SST2 | SMALL | {"train_size": 600, "validation_size": 300, "test_size": 500}
SMALL_LORA = SMALL_SST2 | {"lora": 8, "learning_rate": 2e-3}
SMALL_RESNET = RESNET | SMALL | {"train_size": 1000, "width": 16}
SMALL_PRETRAINED = (
    PRETRAINED
    | SMALL
    | {
        "train_size": 300,
        "validation_size": 200,
        "test_size": 400,
        "image_size": 28,
        "learning_rate": 1e-4,
        "epochs": 15,
        "wrong_kind": "human",
        "attention": "eager",
    }
)


def of_candidates(
    settings: dict[str, Any],
    wrong: Sequence[int] = (0, 40),
    radii: tuple[float, ...] = (0.05, 0.1, 0.2),
    more: dict[str, dict[str, Any]] | None = None,
    **kwargs: Any,
) -> Study:
    """The candidates for a default, on one task with these shares of wrong labels."""
    cases = {f"{percent}% wrong": settings | {"wrong": percent} for percent in wrong}
    return Study(cases | (more or {}), (PLAIN, TWICE, *CANDIDATES), radii, seeds=3, **kwargs)


STUDIES = {
    # Which default harms nowhere, and helps where the penalty pays?
    "defaults": of_candidates(SMALL_DIGITS, (0, 20, 40, 60), (0.05, 0.1, 0.2, 0.4)),
    "defaults_sst2": of_candidates(SMALL_SST2, (0, 20, 40), radii_of={"l2": (0.005, 0.02, 0.05, 0.1)}),
    "defaults_lora": of_candidates(SMALL_LORA),
    "defaults_cnn": of_candidates(SMALL_RESNET),
    # Does the best r stay where it is as the model grows?
    "widths": Study(
        {f"width {n}": SMALL_DIGITS | {"wrong": 40, "width": n, "epochs": 12} for n in (64, 128, 256, 512)},
        (PLAIN, "l2", "layer"),
        (0.1, 0.2, 0.4, 0.8),
        seeds=0,
    ),
    # A pretrained model until plain training's validation accuracy no longer rises.
    "convergence": of_candidates(
        SMALL_PRETRAINED,
        (0, 17, 40),
        more={
            f"{wrong}% wrong, 1,000 images": SMALL_PRETRAINED | {"wrong": wrong, "train_size": 1000}
            for wrong in (0, 17, 40)
        },
        radii_of={"l2": (0.002, 0.01, 0.05)},
    ),
    "vit": Study({"ViT from scratch": LARGE_VIT}, (PLAIN, TWICE, *OF_128), (0.02, 0.05, 0.1, 0.2, 0.4)),
    "cnn": Study(
        {f"{wrong}% wrong": LARGE_RESNET | {"wrong": wrong} for wrong in (0, 20, 40, 60)},
        (PLAIN, TWICE, *OF_128),
        (0.05, 0.1, 0.2, 0.4),
    ),
    "resnet": Study({"right labels": RESNET}, (PLAIN, TWICE, "m = 32"), (0.05, 0.1, 0.2)),
    "wrong_labels": Study(
        {f"{wrong}% wrong": DIGITS | {"wrong": wrong} for wrong in (20, 40, 60)},
        (PLAIN, TWICE, *SMALL_M),
        (0.1, 0.2, 0.4),
    ),
    "settings": Study(
        {"40% wrong": DIGITS | {"wrong": 40}},
        (PLAIN, TWICE, "m = 8", "m = 8, α = 0.8", "m = 8, no warm-up"),
        (0.1, 0.2, 0.4),
    ),
    "cheaper_steps": Study(
        {f"{wrong}% wrong": DIGITS | {"wrong": wrong} for wrong in (20, 40, 60)},
        (PLAIN, TWICE, "m = 8", "momentum"),
        (0.1, 0.2, 0.4, 0.8, 1.6),
    ),
    "human_labels": Study(
        {f"{wrong}% wrong": LARGE_RESNET | {"wrong": wrong, "wrong_kind": "human"} for wrong in (9, 17, 40)},
        (PLAIN, TWICE, *OF_128),
        (0.05, 0.1, 0.2, 0.4),
    ),
    "pretrained_vit": Study(
        {
            "1000 images": PRETRAINED | {"train_size": 1000},
            # In bf16 on a CPU a quarter less time for a step than the fused one.
            "4000 images": PRETRAINED | {"train_size": 4000, "attention": "eager"},
        },
        (PLAIN, TWICE, "m = 32", "m = 32, every 2nd step", "momentum"),
        (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    ),
    "sst2": Study(
        {f"{wrong}% wrong": SST2 | {"wrong": wrong} for wrong in (0, 20, 40)},
        (PLAIN, TWICE, "m = 32", "m = 8", "momentum"),
        (0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
    ),
    "forgetting": Study(
        {"SST-2, then AG News": SST2 | {"second": AG_NEWS}}, (PLAIN, TWICE, "m = 32", "m = 8"), (0.02, 0.05, 0.1)
    ),
}
# What a run of --quick is: seconds, on next to no data.
QUICK = {
    "train_size": 128,
    "validation_size": 32,
    "test_size": 32,
    "epochs": 1,
    "width": 8,
    "layers": 1,
    "second": AG_NEWS | {"steps": 2, "every": 1, "target_loss": 10.0},
}


def quick(study: Study) -> Study:
    """The study's first case and three methods on next to no data: shows that it runs, and proves nothing."""
    name, settings = next(iter(study.cases.items()))
    small = settings | {key: value for key, value in QUICK.items() if key in settings}
    return replace(study, cases={name: small}, methods=(*study.methods[:2], study.methods[-1]), seeds=2)


def task_of(settings: dict[str, Any], data: str, model_path: str | None) -> Task:
    return {"images": image_task, "sentences": sentence_task}[settings["task"]](settings, data, model_path)


def needs_model(study: Study) -> bool:
    return any(case["task"] == "sentences" or case["model"] == "pretrained" for case in study.cases.values())


__all__ = ["METHODS", "STUDIES", "Study", "needs_model", "quick", "task_of"]
