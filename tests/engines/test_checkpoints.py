"""Resuming on each engine, on fewer ranks and after a kill, and the tools for its checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ENGINES, TWO, case_of, gnp, result_of, run_cases
from deepspeed.checkpoint import ds_to_universal
from fork import fork_script
from launch import free_port, launch
from runs import LOG_TOLERANCE, WEIGHTS_TOLERANCE
from tiny import flat_weights, make_model, relative_distance


pytestmark = pytest.mark.distributed

KILLED_ONCE = Path(__file__).parent / "killed_once.py"

# transformers saves no optimizer state for models that it shards at load time, so these cannot be resumed.
RESUMABLE = tuple(engine for engine in ENGINES if engine != "fsdp2")
ADAMW = {"optim": "adamw_torch", "lr_scheduler_type": "linear", **TWO}
SAVING = gnp(**ADAMW, save_strategy="steps", save_steps=1)
MOMENTUM = SAVING | {"gnp_direction": "momentum", "gnp_alpha": 1.0}
METRICS = {"layer": 0.05, "element": 0.5}
RUNS = {engine: (engine, SAVING) for engine in RESUMABLE}
RUNS |= {f"momentum-{engine}": (engine, MOMENTUM) for engine in ("ddp", "zero2", "zero3-offload")}
RUNS |= {f"{metric}-zero3": ("zero3", SAVING | {"gnp_metric": metric, "gnp_r": r}) for metric, r in METRICS.items()}
RESUME = {
    f"{name}-{run}": case_of(engine, args, **more)
    for name, (engine, args) in RUNS.items()
    for run, more in {
        "whole": {"zero_to_fp32": name in ("zero1", "zero2", "zero3")},
        "resumed": {"resume": f"{name}-whole/checkpoint-2"},
    }.items()
}
GENERATING = {
    f"zero3-{'generating' if generates else 'silent'}": case_of(
        "zero3", gnp(**TWO), "llama-untied", generates=generates
    )
    for generates in (True, False)
}
SAVED = {
    f"{engine}-saved-model": case_of(
        engine,
        gnp(save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True),
        "llama-untied",
        zero={"stage3_gather_16bit_weights_on_model_save": True} if engine == "zero3" else {},
    )
    for engine in ("ddp", "fsdp2", "zero2", "zero3")
}
CASES = RESUME | GENERATING | SAVED
# Saved by two ranks, gone on with by one, which does two ranks' share.
ELASTIC = ("zero1", "zero2")
ON_ONE_RANK = {
    f"{engine}-on-one-rank": case_of(
        engine,
        gnp(**ADAMW | {"gradient_accumulation_steps": 4}),
        resume=f"{engine}-whole/checkpoint-2",
        deepspeed={"checkpoint": {"load_universal": True}},
    )
    for engine in ELASTIC
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_is_the_whole_run(results, name):
    whole, resumed = (result_of(results, f"{name}-{run}") for run in ("whole", "resumed"))
    assert torch.equal(whole["weights"], resumed["weights"])
    assert whole["logs"] == resumed["logs"]


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_zero_to_fp32_gives_the_weights(results, engine):
    whole = result_of(results, f"{engine}-whole")
    assert torch.equal(whole["from_checkpoint"], whole["masters"])


@pytest.mark.parametrize("name", SAVED)
def test_saved_model_has_the_weights(results, folder, name):
    """As anybody loads it."""
    result = result_of(results, name)
    model = make_model("llama-untied", loaded_from=folder / name / "checkpoint-2", dtype=torch.float32)
    assert torch.equal(flat_weights(model), result["weights"])


def test_generating_between_steps(results):
    """Under ZeRO-3 it gathers weights out of the order that the steps have."""
    generating, silent = (result_of(results, f"zero3-{run}") for run in ("generating", "silent"))
    assert all(tokens[:3] == [3, 4, 5] and len(tokens) == 6 for tokens in generating["generated"])
    assert torch.equal(generating["weights"], silent["weights"])
    assert generating["logs"] == silent["logs"]


@pytest.fixture(scope="module")
def results_on_one_rank(results, folder) -> dict[str, Any]:
    for engine in ELASTIC:
        checkpoint = folder / f"{engine}-whole" / "checkpoint-2" / "global_step2"
        folders = ["--input_folder", checkpoint, "--output_folder", f"{checkpoint}_universal"]
        fork_script(ds_to_universal.__file__, "--inject_missing_state", *folders, timeout=1200)
    return run_cases(ON_ONE_RANK, folder, ranks=1)


@pytest.mark.parametrize("engine", ELASTIC)
def test_universal_checkpoint_resumes_on_one_rank(results, results_on_one_rank, engine):
    """Gradients are summed in another order: the tolerance of an engine, over the distance of the whole run."""
    whole, resumed = result_of(results, f"{engine}-whole"), result_of(results_on_one_rank, f"{engine}-on-one-rank")
    start = flat_weights(make_model("vit"))
    assert relative_distance(resumed["weights"], whole["weights"], start) < WEIGHTS_TOLERANCE
    assert resumed["logs"]["loss"] == pytest.approx(whole["logs"]["loss"], rel=LOG_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2"])
def test_killed_rank_resumes(tmp_path, results, engine):
    (tmp_path / "case.json").write_text(json.dumps(RESUME[f"{engine}-whole"]))
    command = ["torchrun", "--nproc_per_node=2", "--max_restarts=1", f"--master_port={free_port()}", str(KILLED_ONCE)]
    launch([*command, str(tmp_path / "case.json"), str(tmp_path)], timeout=1200)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert (tmp_path / "killed").exists() and result["attempt"] == "1"
    assert torch.equal(result["weights"], result_of(results, f"{engine}-whole")["weights"])
