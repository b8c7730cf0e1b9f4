"""
What one GPU can show: CUDA kernels, FusedAdam and CPUAdam, autocast and the scaler, compiled models, SDPA.

    tests/gpu/run.sh        # in parts of at most ten minutes; or python -m pytest tests/gpu -m gpu

Put what it prints into docs/engines.md.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from cases import assert_matches_reference, gnp, reference_of, result_of, run_cases
from tiny import relative_distance


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

adamw = functools.partial(torch.optim.AdamW, weight_decay=0.0)
ON_GPU = {"use_cpu": False, "ddp_backend": "nccl", "tf32": False}
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0}}}
FSDP2 = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}}


def case(engine: str, args: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    return {"engine": engine, "kind": "vit", "args": {**ON_GPU, **gnp(), **(args or {})}, **kwargs}


EXACT = {
    **{engine: case(engine) for engine in ("ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")},
    "fsdp2": case("ddp", FSDP2),
    "compiled": case("ddp", {"torch_compile": True}),
    "accumulated": case("zero3", {"gradient_accumulation_steps": 2}),
}
CLOSE = {
    f"{precision}-{engine}{'-stock' if stock else ''}": {
        **case(engine, precision=precision, deepspeed=ADAMW if engine.startswith("zero") else {}),
        "stock": stock,
        "args": {**ON_GPU, "learning_rate": 1e-2, "optim": "adamw_torch", **({} if stock else gnp())},
    }
    for engine in ("ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
    for precision in ("bf16", "fp16")
    for stock in (True, False)
}


@pytest.fixture(scope="session")
def results(request, tmp_path_factory) -> dict[str, Any]:
    """Of the cases that the selected tests look at: a part of run.sh has ten minutes."""
    selected = {item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__)}
    cases = {name: case for name, case in (EXACT | CLOSE).items() if name.removesuffix("-stock") in selected}
    return run_cases(cases, tmp_path_factory.mktemp("gpu"), ranks=1, DS_ACCELERATOR="cuda")


@pytest.mark.parametrize("name", EXACT)
def test_fp32_matches_the_reference(results, name):
    """The reference runs on the CPU; both sides round in fp32, in another order."""
    assert_matches_reference(result_of(results, name), EXACT[name], ranks=1)


@pytest.mark.parametrize("name", [name for name in CLOSE if not name.endswith("-stock")])
def test_low_precision_stays_as_close_to_fp32_as_plain_training(results, name):
    """As the test of the same name for the CPU: each run against its own fp32 trajectory, a factor of 2 apart."""
    distances = []
    for stock in ("-stock", ""):
        result = result_of(results, name + stock)
        start, expected, _ = reference_of(CLOSE[name + stock], ranks=1, optimizer=adamw)
        distances.append(relative_distance(result["masters"], expected, start))
    plain, penalised = distances
    assert penalised < 2 * plain + 1e-4
