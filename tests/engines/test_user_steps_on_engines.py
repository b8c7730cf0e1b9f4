"""Subclasses on several ranks: a backward of their own, logs on one rank, communication hooks. 2 ranks, gloo, CPU."""

from typing import Any

import pytest
import torch
from cases import TWO, assert_matches_reference, case_of, distance_from_reference, gnp, result_of
from runs import WEIGHTS_TOLERANCE, window_loss
from tiny import adversarial, flat_weights, make_model, relative_distance


pytestmark = pytest.mark.distributed

# A perturbation of nothing: the penalised run is the stock one, with the user's own gradient in it.
NO_MOVE = {name: gnp(alpha, gnp_r=1e-12) for name, alpha in (("alpha0.5", 0.5), ("alpha1", 1.0))}
SCOPES = {scope: gnp(1.0, gnp_r=1e-12, gnp_scope=scope) for scope in ("micro_batch", "rank")}


def auxiliary(engine: str, where: str, args: dict[str, Any], stock: bool = False) -> dict[str, Any]:
    kind = "llama-untied" if engine == "fsdp2" else "vit"
    return case_of(engine, {"max_steps": 3, "max_grad_norm": 0.0, **args}, kind, auxiliary=where, stock=stock)


OWN_BACKWARD = {
    f"ddp-{where}-{name}": auxiliary("ddp", where, {**args, **TWO}, stock=name == "stock")
    for where in ("before", "after", "inside")
    for name, args in {"stock": {}, **NO_MOVE, **SCOPES}.items()
} | {
    f"fsdp2-{where}-{name}": auxiliary("fsdp2", where, args, stock=name == "stock")
    for where in ("before", "after")
    for name, args in {"stock": {}, **NO_MOVE}.items()
}
REFUSED_BACKWARD = {
    f"{engine}-{where}-{scope}": auxiliary(engine, where, gnp(gnp_scope=scope, **TWO))
    for engine in ("fsdp2", "zero0", "zero1", "zero2", "zero3")
    for where in ("before", "after", "inside")
    for scope in ("step", "micro_batch")
}
# By the beginning of the error; None where it trains.
STATIC = "ValueError: gnp_scope={} with ddp_static_graph=True"
SUPPORT: dict[str, tuple[str | None, dict[str, Any]]] = {
    f"static-graph-{scope}": (
        STATIC.format(scope) if scope.startswith("rank") else None,
        case_of("ddp", gnp(gnp_scope=scope, ddp_static_graph=True, max_steps=2)),
    )
    for scope in ("micro_batch", "rank", "rank_micro_batch")
} | {
    "rank-zero2": ("ValueError: gnp_scope=rank ", case_of("zero2", gnp(gnp_scope="rank"))),
    "rank_micro_batch-fsdp2": (
        "ValueError: gnp_scope=rank_micro_batch ",
        case_of("fsdp2", gnp(gnp_scope="rank_micro_batch")),
    ),
    "hook-power_sgd": (
        "NotImplementedError: The gradient-norm penalty does not run with PowerSGD",
        case_of("ddp", gnp(), comm_hook="power_sgd"),
    ),
}
HOOKS = {
    f"hook-fp16-{alpha}": case_of("ddp", gnp(alpha, max_steps=3), comm_hook="fp16")
    for alpha in (1e-6, 0.8)  # bf16's wants a GPU
}
# In two micro-batches a step. Under ZeRO-1 and 2 weights stay moved along the momentum between them.
MOMENTUM = gnp(1.0, gnp_direction="momentum", optim="adamw_torch", **TWO)
INTERRUPTED = {
    f"stops-within-{engine}": case_of(
        engine, {**MOMENTUM, "eval_strategy": "epoch", "num_train_epochs": 2}, stops_within=True
    )
    for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
} | {
    f"skips-last-{engine}": case_of(engine, {**MOMENTUM, "max_steps": 3}, skips_last=True)
    for engine in ("zero1", "zero2")
}
LOSSES = {"logs-in-loss": case_of("ddp", gnp(**TWO), logs_in_loss=True)} | {
    f"adversarial-{engine}": case_of(engine, gnp(), is_adversarial=True) for engine in ("ddp", "fsdp2")
}
CASES = (
    OWN_BACKWARD
    | REFUSED_BACKWARD
    | HOOKS
    | LOSSES
    | INTERRUPTED
    | {name: case for name, (_, case) in SUPPORT.items()}
)


@pytest.mark.parametrize("name", [name for name in OWN_BACKWARD if not name.endswith("stock")])
def test_own_backward_is_added_once(results, name):
    result, stock = result_of(results, name), result_of(results, f"{name.rpartition('-')[0]}-stock")
    start = flat_weights(make_model(CASES[name]["kind"]))
    assert relative_distance(result["weights"], stock["weights"], start) < WEIGHTS_TOLERANCE
    assert result["ranks_agree"]


@pytest.mark.parametrize("name", REFUSED_BACKWARD)
def test_own_backward_is_refused(results, name):
    error = results[name]["error"].strip().splitlines()[-1]
    assert "a backward outside of Trainer.training_step" in error and error.startswith("NotImplementedError")


@pytest.mark.parametrize("name", SUPPORT)
def test_support(results, name):
    error, _ = SUPPORT[name]
    if error is None:
        assert not torch.equal(result_of(results, name)["weights"], flat_weights(make_model("vit")))
    else:
        assert error in results[name]["error"]


@pytest.mark.parametrize("name", INTERRUPTED)
def test_momentum_leaves_clean_weights_after_part_of_a_window(results, name):
    result = result_of(results, name)
    if name.startswith("stops"):
        assert torch.equal(result["evaluated"], result["theta"])
    assert torch.equal(result["weights"], result["masters"])


def test_log_on_the_main_process_alone(results):
    """Ranks meet only in the log call of `Trainer` itself."""
    assert_matches_reference(result_of(results, "logs-in-loss"), LOSSES["logs-in-loss"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_adversarial_loss(results, engine):
    """The loss differentiates by its inputs."""

    def loss(model, window):
        return window_loss(model, [adversarial(lambda moved: model(**moved).loss, batch) for batch in window])

    name = f"adversarial-{engine}"
    assert_matches_reference(result_of(results, name), LOSSES[name], loss=loss)


@pytest.mark.parametrize("name", HOOKS)
def test_compressing_hook(results, name):
    """At a small α, (1-α)/α g₁ has no place in fp16, and α g₂ beside it none in either: g₁ is kept aside."""
    # Each rank rounds its gradients of two passes once, to 11 bits. The lower bound: there was a hook.
    assert 1e-5 < distance_from_reference(result_of(results, name), HOOKS[name]) < 4 * 2.0**-11
