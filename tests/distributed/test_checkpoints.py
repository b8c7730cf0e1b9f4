"""Resuming on each engine, on fewer ranks and after a kill, its checkpoints' tools, and the bytes of a step."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ENGINES, gnp, result_of, run_cases
from launch import free_port, launch
from meters import CountCollectives
from runs import LOG_TOLERANCE, WEIGHTS_TOLERANCE
from tiny import flat_weights, make_model, relative_distance


pytestmark = pytest.mark.distributed

KILLED_ONCE = Path(__file__).parent / "killed_once.py"

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


LLAMA = {"kind": "llama-untied", "args": gnp(gradient_accumulation_steps=2)}
GENERATING = {
    f"zero3-{'generating' if generates else 'silent'}": {"engine": "zero3", "generates": generates, **LLAMA}
    for generates in (True, False)
}
SAVED = {
    f"{engine}-saved-model": {
        "engine": engine,
        "kind": "llama-untied",
        "zero": {"stage3_gather_16bit_weights_on_model_save": True} if engine == "zero3" else {},
        "args": gnp(save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True),
    }
    for engine in ("ddp", "fsdp2", "zero2", "zero3")
}
# Saved by two ranks, gone on with by one, which does two ranks' share.
ELASTIC = ("zero1", "zero2")
ON_ONE_RANK = {
    f"{engine}-on-one-rank": {
        "engine": engine,
        "kind": "vit",
        "resume": f"{engine}-whole/checkpoint-2",
        "deepspeed": {"checkpoint": {"load_universal": True}},
        "args": gnp(**ADAMW | {"gradient_accumulation_steps": 4}),
    }
    for engine in ELASTIC
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def results(folder) -> dict[str, Any]:
    return run_cases(RESUME | RESUME_KEEPING | COUNTED | GENERATING | SAVED, folder)


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


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_the_model_alone_has_the_weights(results, folder, name):
    """As anybody loads it."""
    result = result_of(results, name)
    model = make_model("llama-untied", loaded_from=folder / name / "checkpoint-2", dtype=torch.float32)
    assert torch.equal(flat_weights(model), result["weights"])


def test_generating_between_steps_changes_nothing(results):
    """Under ZeRO-3 it gathers weights out of the order that the steps have."""
    generating, silent = (result_of(results, f"zero3-{run}") for run in ("generating", "silent"))
    assert all(tokens[:3] == [3, 4, 5] and len(tokens) == 6 for tokens in generating["generated"])
    assert torch.equal(generating["weights"], silent["weights"])
    assert generating["logs"] == silent["logs"]


@pytest.fixture(scope="session")
def results_on_one_rank(results, folder) -> dict[str, Any]:
    for engine in ELASTIC:
        checkpoint = folder / f"{engine}-whole" / "checkpoint-2" / "global_step2"
        module = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        launch([*module, "--input_folder", str(checkpoint), "--output_folder", f"{checkpoint}_universal"], timeout=600)
    return run_cases(ON_ONE_RANK, folder, ranks=1)


@pytest.mark.parametrize("engine", ELASTIC)
def test_a_universal_checkpoint_of_two_ranks_resumes_on_one(results, results_on_one_rank, engine):
    """Gradients are summed in another order: the tolerance of an engine, over the distance of the whole run."""
    whole, resumed = result_of(results, f"{engine}-whole"), result_of(results_on_one_rank, f"{engine}-on-one-rank")
    start = flat_weights(make_model("vit"))
    assert relative_distance(resumed["weights"], whole["weights"], start) < WEIGHTS_TOLERANCE
    assert resumed["logs"]["loss"] == pytest.approx(whole["logs"]["loss"], rel=LOG_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2"])
def test_a_rank_that_is_killed_in_the_second_pass_resumes_to_the_same_weights(tmp_path, results, engine):
    (tmp_path / "case.json").write_text(json.dumps(RESUME[f"{engine}-whole"]))
    command = ["torchrun", "--nproc_per_node=2", "--max_restarts=1", f"--master_port={free_port()}", str(KILLED_ONCE)]
    launch([*command, str(tmp_path / "case.json"), str(tmp_path)], timeout=1200)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert (tmp_path / "killed").exists() and result["attempt"] == "1"
    assert torch.equal(result["weights"], result_of(results, f"{engine}-whole")["weights"])


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
