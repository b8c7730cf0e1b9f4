"""
Device meshes: 4 ranks, gloo, one launch, in which accelerate's checks for a GPU are lifted (mesh_worker.py).

Each mesh against the reference loop, to which the ranks that see one batch together are one.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import gnp, result_of, run_cases
from mesh_worker import make_decoder
from runs import LOG_TOLERANCE, WEIGHTS_TOLERANCE, by_scope, reference_run
from tiny import flat_weights, relative_distance


pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "mesh_worker.py"
RANKS = 4
TP = {"tp_plan": "auto"}
# By name: the model, its mesh, and how many ranks see a batch of their own.
MESHES: dict[str, tuple[str, dict[str, Any], int]] = {
    "tp": ("llama", {"distributed": {"tp_size": 4, **TP}}, 1),
    "tp-tied": ("llama-tied", {"distributed": {"tp_size": 4, **TP}}, 1),
    "tp-replicas": ("llama", {"distributed": {"tp_size": 2, "dp_replicate_size": 2, **TP}}, 2),
    "tp-fsdp": ("llama", {"distributed": {"tp_size": 2, "fsdp_size": 2, **TP}}, 2),
    "hsdp": ("llama", {"distributed": {"fsdp_size": 2, "dp_replicate_size": 2}}, 4),
    "ep": ("mixtral", {"distributed": {"fsdp_size": 4, "ep_size": 4}}, 4),
    "ep-tp-fsdp": ("mixtral", {"distributed": {"tp_size": 2, "fsdp_size": 2, "ep_size": 2, **TP}}, 2),
    "tp-qwen3": ("qwen3", {"distributed": {"tp_size": 4, **TP}}, 1),
    "ep-tp-fsdp-qwen3": ("qwen3", {"distributed": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4, **TP}}, 2),
    "fsdp2-accelerate": ("llama", {"args": {"fsdp": True, "fsdp_config": {"version": 2}}}, 4),
}


def case(mesh: str, args: dict[str, Any], **options: Any) -> dict[str, Any]:
    kind, settings, batches = MESHES[mesh]
    return {"kind": kind, "batches": batches, **settings, **options, "args": settings.get("args", {}) | args}


# Qwen3's q_norm and k_norm have a hook that sums what is in `.grad` over the ranks of TP, after each backward: with
# accumulation, transformers 5.23 sums the earlier micro-batches again, without the penalty too.
EQUIVALENT = {
    f"{mesh}-accumulation{accumulation}-alpha{alpha}": case(mesh, gnp(alpha, gradient_accumulation_steps=accumulation))
    for mesh, (kind, _, _) in MESHES.items()
    for accumulation, alpha in ((1 if kind == "qwen3" else 2, 0.8), (1, 1.0))
}
BY_MICRO_BATCH = {
    f"{mesh}-micro_batch": case(mesh, gnp(gradient_accumulation_steps=2, gnp_scope="micro_batch"))
    for mesh in ("tp", "tp-qwen3", "tp-fsdp", "hsdp", "fsdp2-accelerate")
}
WHOLE = ("tp-fsdp", "hsdp", "ep-tp-fsdp", "fsdp2-accelerate")
IDENTITY = {
    f"{mesh}-{'stock' if stock else 'alpha0'}": case(
        mesh,
        {"gradient_accumulation_steps": 2, "optim": "adamw_torch", **({} if stock else {"gnp_alpha": 0})},
        stock=stock,
    )
    for mesh in WHOLE
    for stock in (True, False)
}
RAISING = {
    # Two micro-batches a step: the fourth call is the second of the second pass.
    f"{mesh}-raises": case(mesh, gnp(gradient_accumulation_steps=2), faults={"1.4": "raise"}, size=64)
    for mesh in WHOLE
} | {
    # In the middle of a forward, when all weights are gathered and stay so.
    "fsdp2-gathered-raises": case(
        "fsdp2-accelerate",
        gnp(gradient_accumulation_steps=2)
        | {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": False}},
        faults={"1.4": "raise inside"},
        size=64,
    )
}
BF16 = {
    f"{mesh}-bf16": case(mesh, gnp(1.0, optim="adamw_torch", max_steps=3), dtype="bfloat16", compare_ranks=True)
    for mesh in ("tp-fsdp", "ep-tp-fsdp-qwen3")
}
CASES = EQUIVALENT | BY_MICRO_BATCH | IDENTITY | RAISING | BF16


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    return run_cases(CASES, tmp_path_factory.mktemp("meshes"), ranks=RANKS, worker=WORKER)


@pytest.mark.parametrize("name", EQUIVALENT | BY_MICRO_BATCH)
def test_a_mesh_matches_the_reference(results, name):
    result, args, ranks = result_of(results, name), CASES[name]["args"], CASES[name]["batches"]
    scope = by_scope(args["gnp_scope"], ranks) if "gnp_scope" in args else {}
    model, accumulation = make_decoder(CASES[name]["kind"]), args["gradient_accumulation_steps"]
    start, expected, reference_logs = reference_run(
        "llama", accumulation, ranks, alpha=args["gnp_alpha"], model=model, **scope
    )
    distance = relative_distance(result["weights"], expected, start)
    print(f"{distance:.1e} of the distance travelled")
    assert distance < WEIGHTS_TOLERANCE
    for log in ("loss", "gnp_grad_norm", "gnp_perturbed_loss"):
        assert result["logs"][log] == pytest.approx([entry[log] for entry in reference_logs], rel=LOG_TOLERANCE), log


@pytest.mark.parametrize("mesh", WHOLE)
def test_alpha_zero_is_plain_training(results, mesh):
    stock, alpha0 = (result_of(results, f"{mesh}-{which}") for which in ("stock", "alpha0"))
    assert torch.equal(stock["weights"], alpha0["weights"])
    assert stock["logs"] == alpha0["logs"]


@pytest.mark.parametrize("name", RAISING)
def test_an_exception_in_the_second_pass_leaves_the_weights_of_the_step(results, name):
    result = result_of(results, name)
    assert "injected" in result["raised"]
    assert torch.equal(result["weights"], result["start_of_step"])
    assert not torch.equal(result["weights"], flat_weights(make_decoder(CASES[name]["kind"])))


@pytest.mark.parametrize("name", BF16)
def test_stochastic_rounding_moves_replicas_alike(results, name):
    """Norm weights are held by several ranks, which see other shards beside them."""
    result = result_of(results, name)
    assert len(result["differs"]) == 2 * 3 + 1  # both passes of three steps, and the probe
    assert result["differs"] == [[]] * len(result["differs"])
    # It is rounded at all: a move of which rounding to nearest would lose a part keeps all on average.
    assert result["logs"]["gnp_fidelity"] == pytest.approx([1.0] * 3, abs=0.1)
