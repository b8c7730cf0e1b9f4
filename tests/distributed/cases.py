"""Cases for worker.py: how they are launched, and what the reference loop says of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import free_port, launch
from runs import LOG_TOLERANCE, WEIGHTS_TOLERANCE, reference_run
from tiny import make_model, relative_distance


WORKER = Path(__file__).parent / "worker.py"
ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
RANKS = 2
CASES_PER_LAUNCH = 30


def run_cases(
    cases: dict[str, Any], folder: Path, ranks: int = RANKS, worker: Path = WORKER, **environment: str
) -> dict[str, Any]:
    """The results of all cases, a batch in each launch: the engines of past cases leave busy threads."""
    results = {}
    ordered = list(cases)
    for first in range(0, len(ordered), CASES_PER_LAUNCH):
        names = ordered[first : first + CASES_PER_LAUNCH]
        cases_file = folder / "cases.json"
        cases_file.write_text(json.dumps({name: cases[name] for name in names}))
        command = ["torchrun", f"--nproc_per_node={ranks}", f"--master_port={free_port()}", str(worker)]
        launch([*command, str(cases_file), str(folder)], timeout=2400, **environment)
        results |= torch.load(folder / "results.pt", weights_only=True)
    return results


def result_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    assert "error" not in results[name], results[name].get("error")
    return results[name]


def gnp(alpha: float = 0.8, **args: Any) -> dict[str, Any]:
    return {"gnp_alpha": alpha, "gnp_r": 0.05, **args}


def untied(kind: str, engine: str) -> str:
    """FSDP2 by transformers trains one of two tied embeddings, without the penalty too, and is refused."""
    return "llama-untied" if kind == "llama" and engine == "fsdp2" else kind


# Kinds and arguments under FSDP2 whose gradients it does not reduce, or whose wrapper is torch.compile's.
BESIDE_FSDP2: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama-lora", {}),
    "compiled": (untied("llama", "fsdp2"), {"torch_compile": True, "torch_compile_backend": "eager"}),
}


def reference_of(case: dict[str, Any], ranks: int = RANKS, **kwargs: Any):
    model = make_model(case["kind"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and case.get("frozen", "-") not in name)
    if case.get("unused"):
        model.unused = torch.nn.Parameter(torch.ones(7))
    accumulation = case["args"].get("gradient_accumulation_steps", 1)
    alpha = case["args"].get("gnp_alpha", 0.0)
    return reference_run(case["kind"], accumulation, ranks, alpha=alpha, model=model, **kwargs)


def assert_matches_reference(result: dict[str, Any], case: dict[str, Any], ranks: int = RANKS, **variant: Any) -> None:
    start, expected, reference_logs = reference_of(case, ranks, **variant)
    distance = relative_distance(result["weights"], expected, start)
    print(f"{distance:.1e} of the distance travelled")  # pytest -rP shows it
    assert distance < WEIGHTS_TOLERANCE
    for name in ("loss", "gnp_grad_norm", "gnp_perturbed_loss"):
        values = [log[name] for log in reference_logs]
        assert result["logs"][name] == pytest.approx(values, rel=LOG_TOLERANCE), name
