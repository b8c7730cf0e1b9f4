"""Cases for worker.py: how they are launched, and what the reference loop gives for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fork import fork_script
from runs import BASE, LOG_TOLERANCE, WEIGHTS_TOLERANCE, msam_run, reference_run, windows
from tiny import make_model, relative_distance


WORKER = Path(__file__).parent / "worker.py"
ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
RANKS = 2
CASES_PER_LAUNCH = 30
TWO = {"gradient_accumulation_steps": 2}
MOMENTUM = {"gnp_direction": "momentum", "gnp_r": 0.3, "optim": "sgd", "optim_args": "momentum=0.9"}
# A smaller ε turns rounding into steps of full length.
MOMENTUM_ADAM = {"gnp_direction": "momentum", "gnp_r": 0.3, "optim": "adamw_torch", "adam_epsilon": 1e-3}
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}


def run_cases(
    cases: dict[str, Any],
    folder: Path,
    ranks: int = RANKS,
    worker: Path = WORKER,
    start: Callable[..., str] = fork_script,
) -> dict[str, Any]:
    """The results of all cases, a batch in each launch: the engines of past cases leave busy threads."""
    results = {}
    ordered = list(cases)
    for first in range(0, len(ordered), CASES_PER_LAUNCH):
        names = ordered[first : first + CASES_PER_LAUNCH]
        cases_file = folder / "cases.json"
        cases_file.write_text(json.dumps({name: cases[name] for name in names}))
        start(worker, cases_file, folder, ranks=ranks, timeout=2400)
        results |= torch.load(folder / "results.pt", weights_only=True)
    return results


def result_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    assert "error" not in results[name], results[name].get("error")
    return results[name]


def gnp(alpha: float = 0.8, **args: Any) -> dict[str, Any]:
    return {"gnp_alpha": alpha, "gnp_r": 0.05, **args}


def case_of(engine: str, args: dict[str, Any], kind: str = "vit", **options: Any) -> dict[str, Any]:
    """`options` are those of `worker.make_trainer`. An engine may carry a setting: "zero1-fp32-accumulation"."""
    if engine.endswith("-fp32-accumulation"):
        engine, options = engine.removesuffix("-fp32-accumulation"), options | {"deepspeed": FP32_ACCUMULATION}
    return {"engine": engine, "kind": kind, "args": args, **options}


def untied(kind: str, engine: str) -> str:
    """FSDP2 by transformers trains one of two tied embeddings, without the penalty too, and is refused."""
    return "llama-untied" if kind == "llama" and engine == "fsdp2" else kind


def steps_of(case: dict[str, Any], ranks: int = RANKS) -> list[Any]:
    """The windows of each step of the run."""
    args = case["args"]
    steps = windows(case["kind"], args.get("gradient_accumulation_steps", 1) * ranks)
    if "max_steps" in args:
        return (args["max_steps"] * steps)[: args["max_steps"]]
    return args.get("num_train_epochs", 1) * steps


def reference_of(case: dict[str, Any], ranks: int = RANKS, **kwargs: Any):
    """Start, end and logs of the reference loop. `kwargs` are those of `reference_run`."""
    args, steps = case["args"], kwargs.pop("steps", None) or steps_of(case, ranks)
    learning_rate = args.get("learning_rate", BASE["learning_rate"])
    if args.get("gnp_direction") == "momentum":
        optimizer = torch.optim.SGD, {"momentum": 0.9}
        if args["optim"] == "adamw_torch":
            optimizer = torch.optim.AdamW, {"weight_decay": 0.0, "eps": args["adam_epsilon"]}
        make = lambda parameters, lr: optimizer[0](parameters, lr, **optimizer[1])  # noqa: E731
        return msam_run(case["kind"], steps, args["gnp_r"], make, learning_rate)
    model = make_model(case["kind"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and case.get("frozen", "-") not in name)
    if case.get("unused"):
        model.unused = torch.nn.Parameter(torch.ones(7))
    kwargs = {"optimizer": lambda parameters, lr: torch.optim.SGD(parameters, learning_rate), **kwargs}
    return reference_run(case["kind"], 0, ranks, alpha=args.get("gnp_alpha", 0.0), model=model, steps=steps, **kwargs)


def distance_from_reference(result: dict[str, Any], case: dict[str, Any], weights: str = "weights", **kwargs: Any):
    start, expected, _ = reference_of(case, **kwargs)
    distance = relative_distance(result[weights], expected, start)
    print(f"{distance:.1e} of the distance travelled")  # pytest -rP shows it
    return distance


def assert_matches_reference(result: dict[str, Any], case: dict[str, Any], ranks: int = RANKS, **variant: Any) -> None:
    assert_matches(result, reference_of(case, ranks, **variant))


def assert_matches(result: dict[str, Any], reference_result: Any) -> None:
    start, expected, reference_logs = reference_result
    distance = relative_distance(result["weights"], expected, start)
    print(f"{distance:.1e} of the distance travelled")  # pytest -rP shows it
    assert distance < WEIGHTS_TOLERANCE
    for name in ("loss", "gnp_grad_norm", "gnp_perturbed_loss"):
        values = [log[name] for log in reference_logs]
        assert result["logs"][name] == pytest.approx(values, rel=LOG_TOLERANCE), name
