"""
What one GPU can show: CUDA kernels, FusedAdam and CPUAdam, autocast and the scaler, compiled models, SDPA.

    tests/gpu/run.sh        # in parts of at most ten minutes; or python -m pytest tests/gpu -m gpu

Put what it prints into docs/engines.md.
"""

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_matches_reference, gnp, reference_of, result_of, run_cases
from launch import torchrun
from runs import CHECKPOINTING, by_scope, make_trainer
from tiny import flat_weights, make_model, relative_distance
from transformers import Trainer, TrainerCallback

from hf_gnp import GNPTrainer


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
    # Not the ViT: accelerate 1.15 shards its patch embeddings twice, and stock `Trainer` fails too.
    "fsdp2": {**case("ddp", FSDP2), "kind": "llama-untied"},
    "checkpointed": case("ddp", {CHECKPOINTING: True}),
    "accumulated": case("zero3", {"gradient_accumulation_steps": 2}),
    "zero2-overlap": case("zero2", zero={"overlap_comm": True}),
    "zero3-overlap": case("zero3", zero={"overlap_comm": True}),
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
# The last of all: accelerate switches TF32 on for the process.
COMPILED = {"torch_compile": True}
GRAPHS = COMPILED | {"torch_compile_mode": "reduce-overhead"}
CLOSE |= {
    f"{name}{'-stock' if stock else ''}": {
        **case("ddp"),
        "stock": stock,
        "args": {**ON_GPU, **options, **({} if stock else {**gnp(alpha), **scope})},
    }
    for name, alpha, options, scope in (
        ("compiled", 0.8, COMPILED, {}),
        ("compiled-graphs", 0.8, GRAPHS, {}),
        ("compiled-graphs-sam", 1.0, GRAPHS, {}),
        ("compiled-graphs-scope", 1.0, GRAPHS | {"gradient_accumulation_steps": 2}, {"gnp_scope": "micro_batch"}),
    )
    for stock in (True, False)
}


@pytest.fixture(scope="session")
def results(request, tmp_path_factory) -> dict[str, Any]:
    """Of the cases that the selected tests look at: a part of run.sh has ten minutes."""
    selected = {item.callspec.params.get("name") for item in request.session.items if item.path == Path(__file__)}
    cases = {name: case for name, case in (EXACT | CLOSE).items() if name.removesuffix("-stock") in selected}
    # DeepSpeed reads the variable when it is imported.
    start = functools.partial(torchrun, DS_ACCELERATOR="cuda")
    return run_cases(cases, tmp_path_factory.mktemp("gpu"), ranks=1, start=start)


@pytest.mark.parametrize("name", EXACT)
def test_fp32_matches_the_reference(results, name):
    """The reference runs on the CPU; both sides round in fp32, in another order."""
    assert_matches_reference(result_of(results, name), EXACT[name], ranks=1)


@pytest.mark.parametrize("name", [name for name in CLOSE if not name.endswith("-stock")])
def test_as_close_to_fp32_as_plain_training(results, name):
    """As the test of the same name for the CPU: each run against its own fp32 trajectory, a factor of 2 apart."""
    distances = []
    for stock in ("-stock", ""):
        result = result_of(results, name + stock)
        case = CLOSE[name + stock]
        optimizer = adamw if case["args"].get("optim") else torch.optim.SGD
        scope = by_scope(case["args"].get("gnp_scope", "step"))
        start, expected, _ = reference_of(case, ranks=1, optimizer=optimizer, **scope)
        distances.append(relative_distance(result["masters"], expected, start))
    plain, penalised = distances
    assert penalised < 2 * plain + 1e-4


@pytest.mark.parametrize("options", [{}, {CHECKPOINTING: True}, {"bf16": True}], ids=["fp32", "checkpointed", "bf16"])
def test_native_dropout_masks(tmp_path, options):
    """With an r that moves no weight, a run is a plain one: if the second pass draws what the first one drew."""
    end = {}
    start = flat_weights(make_model("bert"))
    for cls, penalty in ((Trainer, {}), (GNPTrainer, gnp(alpha=1.0, gnp_r=1e-30))):
        args = {"use_cpu": False, "tf32": False, **options, **penalty}
        trainer = make_trainer(tmp_path, "bert", cls, make_model("bert", dropout=0.3), **args)
        trainer.train()
        end[cls] = flat_weights(trainer.model).cpu()
    distance = relative_distance(end[GNPTrainer], end[Trainer], start)
    print(f"{distance:.1e} of the distance travelled")
    assert distance < 1e-3


@pytest.mark.parametrize("metric", ["l2", "layer"])
@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_native_waits_for_the_gpu(tmp_path, options, metric):
    """Once more a step, in which `Trainer` itself waits for its logs and its clipping."""
    waits = {}
    for cls, penalty in ((Trainer, {}), (GNPTrainer, gnp(gnp_metric=metric))):
        args = {"use_cpu": False, "optim": "adamw_torch_fused", "logging_steps": 100, **options, **penalty}
        trainer = make_trainer(tmp_path, "vit", cls, **args)
        trainer.add_callback(CountWaits())
        trainer.train()
        waits[cls] = trainer.callback_handler.callbacks[-1].by_step
    print(waits)
    more = [mine - stock for mine, stock in zip(waits[GNPTrainer], waits[Trainer], strict=True)]
    assert max(more) <= 1


class CountWaits(TrainerCallback):
    """By step, from the third one on, how often the host waited for the GPU."""

    def __init__(self):
        self.by_step = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= 2:
            self.catcher = warnings.catch_warnings(record=True)
            self.caught = self.catcher.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 2:
            torch.cuda.set_sync_debug_mode("default")
            self.catcher.__exit__(None, None, None)
            waits = [warning for warning in self.caught if "synchronizing CUDA operation" in str(warning.message)]
            self.by_step.append(len(waits))
            if state.global_step == 4:
                print(*(f"{warning.filename}:{warning.lineno}" for warning in waits), sep="\n")
