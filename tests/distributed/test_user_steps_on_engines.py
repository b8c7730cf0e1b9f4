"""What users' trainers do in a step, beside its loss, on several ranks."""

from typing import Any

import pytest
import torch
from cases import gnp, result_of, run_cases
from runs import WEIGHTS_TOLERANCE
from tiny import flat_weights, make_model, relative_distance


pytestmark = pytest.mark.distributed

TWO = {"gradient_accumulation_steps": 2}
# A move of nothing: the penalised run is the stock one, with the user's own gradient in it.
NO_MOVE = {name: gnp(alpha, gnp_r=1e-12) for name, alpha in (("alpha0.5", 0.5), ("alpha1", 1.0))}
SCOPES = {scope: gnp(1.0, gnp_r=1e-12, gnp_scope=scope) for scope in ("micro_batch", "rank")}


def auxiliary(engine: str, where: str, args: dict[str, Any], stock: bool = False) -> dict[str, Any]:
    kind = "llama-untied" if engine == "fsdp2" else "vit"
    args = {"max_steps": 3, "max_grad_norm": 0.0, **args}
    return {"engine": engine, "kind": kind, "auxiliary": where, "stock": stock, "args": args}


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
# In the third step: at its second micro-batch, and in its second pass.
SKIPPED = {
    f"skipped-{engine}-{where}": {
        "engine": engine,
        "kind": "llama-untied",
        "skips": True,
        "faults": {where: "raise"},
        "args": gnp(optim="sgd", num_train_epochs=2, max_steps=5, **TWO),
    }
    for engine in ("ddp", "fsdp2")
    for where in ("2.2", "2.4")
}
STATIC_GRAPH = {
    f"static-graph-{scope}": {
        "engine": "ddp",
        "kind": "vit",
        "args": gnp(gnp_scope=scope, ddp_static_graph=True, max_steps=2),
    }
    for scope in ("micro_batch", "rank", "rank_micro_batch")
}
CASES = OWN_BACKWARD | REFUSED_BACKWARD | SKIPPED | STATIC_GRAPH


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    return run_cases(CASES, tmp_path_factory.mktemp("user_steps"))


def distance(results: dict[str, Any], name: str, other: str) -> float:
    start = flat_weights(make_model(CASES[name]["kind"]))
    return relative_distance(result_of(results, name)["weights"], result_of(results, other)["weights"], start)


@pytest.mark.parametrize("name", [name for name in OWN_BACKWARD if not name.endswith("stock")])
def test_a_backward_of_its_own_is_added_as_in_plain_training(results, name):
    engine, where, _ = name.split("-")
    result = result_of(results, name)
    assert distance(results, name, f"{engine}-{where}-stock") < WEIGHTS_TOLERANCE
    assert result["ranks_agree"]


@pytest.mark.parametrize("name", REFUSED_BACKWARD)
def test_a_backward_of_its_own_that_cannot_be_told_apart_is_refused(results, name):
    error = results[name]["error"].strip().splitlines()[-1]
    assert "calls backward outside of Trainer.training_step" in error and error.startswith("NotImplementedError")


@pytest.mark.parametrize("where", ["2.2", "2.4"])
def test_a_step_that_failed_leaves_no_gradient(results, where):
    name, of_ddp = (f"skipped-{engine}-{where}" for engine in ("fsdp2", "ddp"))
    assert distance(results, name, of_ddp) < WEIGHTS_TOLERANCE
    norms, of_ddp_norms = (result_of(results, n)["logs"]["gnp_grad_norm"] for n in (name, of_ddp))
    assert norms[2] is None  # the step that was not made
    assert norms[3:] == pytest.approx(of_ddp_norms[3:], rel=1e-4)


def test_a_static_graph_is_refused_where_ranks_do_not_reduce(results):
    result = result_of(results, "static-graph-micro_batch")
    assert not torch.equal(result["weights"], flat_weights(make_model("vit")))
    for scope in ("rank", "rank_micro_batch"):
        assert f"ValueError: gnp_scope={scope} with ddp_static_graph=True" in results[f"static-graph-{scope}"]["error"]
