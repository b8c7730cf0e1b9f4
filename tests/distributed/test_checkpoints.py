"""Resuming on each engine, the tools that read its checkpoints, and the bytes that a step communicates."""

from typing import Any

import pytest
import torch
from cases import ENGINES, gnp, result_of, run_cases
from meters import CountCollectives


pytestmark = pytest.mark.distributed

# transformers saves no optimizer state for models that it shards at load time, so these cannot be resumed.
RESUMABLE = tuple(engine for engine in ENGINES if engine != "fsdp2")
ADAMW = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "gradient_accumulation_steps": 2}
SAVING = gnp(**ADAMW, save_strategy="steps", save_steps=1)
RESUME = {
    f"{engine}-{run}": {"engine": engine, "kind": "vit", "args": SAVING, **more}
    for engine in RESUMABLE
    for run, more in {
        "whole": {"zero_to_fp32": engine in ("zero1", "zero2", "zero3")},
        "resumed": {"resume": f"{engine}-whole/checkpoint-2"},
    }.items()
}
# What the penalty itself keeps: the step that resumes is one that adds what the step before has left.
KEEPING = {
    "reuse": {"gnp_reuse": True, "gnp_interval": 2},
    "momentum": {"gnp_direction": "momentum", "gnp_alpha": 1.0},
}
RESUME_KEEPING = {
    f"{kept}-{engine}-{run}": {"engine": engine, "kind": "vit", "args": {**SAVING, **arguments}, **more}
    for kept, arguments in KEEPING.items()
    for engine in ("ddp", "zero2", "zero3-offload")
    for run, more in {"whole": {}, "resumed": {"resume": f"{kept}-{engine}-whole/checkpoint-2"}}.items()
}
STEPS = 6  # 48 samples, 2 ranks, micro-batches of 4
COUNTED_STEPS = STEPS - CountCollectives.first_step
COUNTED = {
    f"count-{engine}-{'stock' if stock else 'gnp'}": {
        "engine": engine,
        "kind": "vit",
        "stock": stock,
        "count": True,
        "zero": {"stage3_param_persistence_threshold": 0} if engine == "zero3" else {},
        "args": {"logging_steps": 1000, **({} if stock else gnp())},
    }
    for engine in ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
    for stock in (True, False)
}


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> dict[str, Any]:
    return run_cases(RESUME | RESUME_KEEPING | COUNTED, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("engine", RESUMABLE)
def test_a_resumed_run_is_the_run_that_never_stopped(results, engine):
    whole, resumed = (result_of(results, f"{engine}-{run}") for run in ("whole", "resumed"))
    assert torch.equal(whole["weights"], resumed["weights"])
    assert whole["logs"] == resumed["logs"]


@pytest.mark.parametrize("name", [name.removesuffix("-whole") for name in RESUME_KEEPING if name.endswith("-whole")])
def test_a_resumed_run_has_what_the_penalty_keeps(results, name):
    whole, resumed = (result_of(results, f"{name}-{run}") for run in ("whole", "resumed"))
    assert torch.equal(whole["weights"], resumed["weights"])


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_zero_to_fp32_gives_the_weights(results, engine):
    whole = result_of(results, f"{engine}-whole")
    assert torch.equal(whole["from_checkpoint"], whole["masters"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"])
def test_bytes_communicated(results, engine):
    """
    Twice plain training's and at most one fp32 scalar a step for the norm. Under ZeRO-1 and 2 the second gathering of
    weights is that of the moved ones; where weights are whole the norm needs no collective.
    """
    plain, penalised = (result_of(results, f"count-{engine}-{run}")["collectives"] for run in ("stock", "gnp"))
    scalars = 4 * COUNTED_STEPS
    assert penalised.pop("allgather") == plain.pop("allgather")  # num_items_in_batch, once a step
    for collective, size in penalised.items():
        assert size <= 2 * plain.get(collective, 0) + scalars, collective
    if engine == "ddp":
        assert penalised == {"allreduce": 2 * plain["allreduce"]}
    for collective, size in plain.items():
        if size > 100 * scalars:  # not the norms for clipping, which are taken once
            assert penalised[collective] >= 2 * size - 4 * scalars, collective
