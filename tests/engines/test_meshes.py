"""
Device meshes: 4 ranks, gloo, one launch, in which accelerate's checks for a GPU are lifted (mesh_worker.py).

Each mesh against the reference loop, to which the ranks that see one batch together are one.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from cases import assert_matches, gnp, result_of, run_cases
from mesh_worker import make_decoder
from runs import by_scope, reference_run, windows
from tiny import flat_weights, make_data, relative_distance


pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "mesh_worker.py"
SEQUENCE_WORKER = WORKER.with_name("sequence_worker.py")
RANKS, STEPS = 4, 3
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
    if batches < RANKS:  # which goes through the data in more than three steps
        args = {"max_steps": STEPS, **args}
    return {"kind": kind, "batches": batches, **settings, **options, "args": settings.get("args", {}) | args}


# Qwen3's q_norm and k_norm have a hook that sums what is in `.grad` over the ranks of TP, after each backward: with
# accumulation, transformers 5.23 sums the earlier micro-batches again, without the penalty too.
EQUIVALENT = {
    f"{mesh}-accumulation{accumulation}-alpha{alpha}-{metric}": case(
        mesh, gnp(alpha, gradient_accumulation_steps=accumulation, gnp_metric=metric)
    )
    for mesh, (kind, _, _) in MESHES.items()
    for accumulation, alpha, metric in ((1 if kind == "qwen3" else 2, 0.8, "l2"), (1, 1.0, "layer"))
}
BY_MICRO_BATCH = {
    f"{mesh}-micro_batch": case(mesh, gnp(gradient_accumulation_steps=2, gnp_scope="micro_batch"))
    for mesh in ("tp", "tp-qwen3", "tp-fsdp", "hsdp", "fsdp2-accelerate")
}
# Without a backward FSDP2's root stays gathered, and has other parameter objects than in training.
EVALUATED = {
    f"{mesh}-evaluated-{targets}": case(
        mesh,
        gnp(gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1, eval_on_start=True)
        | {"gnp_target_modules": targets},
    )
    for targets, meshes in (
        (None, ("tp-fsdp", "fsdp2-accelerate")),
        ("norm", ("hsdp",)),
        ("lm_head", ("fsdp2-accelerate",)),  # the root's
    )
    for mesh in meshes
}
FORWARD_FIRST = {
    f"{mesh}-forward-first": case(mesh, gnp(gradient_accumulation_steps=2), forward_first=True)
    for mesh in ("hsdp", "fsdp2-accelerate")
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
MIXED = {
    f"mixed-alpha{alpha}": case(
        "fsdp2-accelerate", {"fsdp": True, "fsdp_config": {"version": 2}, "bf16": True, **args}, stock=alpha == 0
    )
    for alpha, args in ((0, {}), (0.8, gnp(0.8)))
}
# Saved in shards by four ranks after three steps, gone on with by two, which do four ranks' share.
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
MOMENTUM = {"size": 96, "momentum": 0.9}
SAVED = {
    "sharded-saved": case(
        "fsdp2-accelerate", gnp(max_steps=3, save_strategy="steps", save_steps=3) | SHARDED, **MOMENTUM
    )
}
RESUMED = {
    "sharded-resumed": case(
        "fsdp2-accelerate",
        gnp(gradient_accumulation_steps=2) | SHARDED,
        resume="sharded-saved/checkpoint-3",
        **MOMENTUM,
    )
}
CASES = SAVED | EQUIVALENT | BY_MICRO_BATCH | EVALUATED | FORWARD_FIRST | IDENTITY | RAISING | BF16 | MIXED


@pytest.mark.parametrize("name", EQUIVALENT | BY_MICRO_BATCH | EVALUATED | FORWARD_FIRST)
def test_mesh_matches_the_reference(results, name):
    result, args, ranks = result_of(results, name), CASES[name]["args"], CASES[name]["batches"]
    formula = by_scope(args["gnp_scope"], ranks) if "gnp_scope" in args else {}
    if args.get("gnp_metric") == "layer":
        formula["direction"] = reference.in_proportion_to_each_tensor
    model, accumulation = make_decoder(CASES[name]["kind"]), args["gradient_accumulation_steps"]
    if targets := args.get("gnp_target_modules"):
        formula["direction"] = reference.along_some([targets in name for name, _ in model.named_parameters()])
    formula |= {"steps": windows("llama", accumulation * ranks)[:STEPS], "alpha": args["gnp_alpha"]}
    assert_matches(result, reference_run("llama", accumulation, ranks, model=model, **formula))


def test_sharded_checkpoint_resumes_on_fewer_ranks(results, folder):
    """With the optimizer's momentum."""
    result_of(results, "sharded-saved")
    result = result_of(run_cases(RESUMED, folder, ranks=2, worker=WORKER), "sharded-resumed")
    steps = windows("llama", RANKS, make_data("llama", MOMENTUM["size"]))
    optimizer = functools.partial(torch.optim.SGD, momentum=MOMENTUM["momentum"])
    model = make_decoder("llama")
    assert_matches(result, reference_run("llama", 2, 2, model=model, steps=steps, optimizer=optimizer))


def test_ulysses_matches_the_reference(tmp_path):
    """
    Two ranks share each sequence, of which one has more labels than the other. Under it, stock differentiates the mean
    over micro-batches of their mean over labels.
    """
    args = gnp(gradient_accumulation_steps=2)
    result = result_of(run_cases({"ulysses": {"args": args}}, tmp_path, worker=SEQUENCE_WORKER), "ulysses")

    def loss(model, part):
        return sum(model(**batch).loss for batch in part) / len(part)

    # Norms before clipping, which hides a gradient that is too large by a factor, as it is under ZeRO-1 and 2.
    assert_matches(result, reference_run("llama", 2, 1, model=make_decoder("llama"), loss=loss))


@pytest.mark.parametrize("mesh", WHOLE)
def test_alpha_zero_is_plain_training(results, mesh):
    stock, alpha0 = (result_of(results, f"{mesh}-{which}") for which in ("stock", "alpha0"))
    assert torch.equal(stock["weights"], alpha0["weights"])
    assert stock["logs"] == alpha0["logs"]


@pytest.mark.parametrize("name", RAISING)
def test_exception_leaves_the_weights(results, name):
    result = result_of(results, name)
    assert "injected" in result["raised"]
    assert torch.equal(result["weights"], result["start_of_step"])
    assert not torch.equal(result["weights"], flat_weights(make_decoder(CASES[name]["kind"])))


@pytest.mark.parametrize("name", BF16)
def test_replicas_round_alike(results, name):
    """Norm weights are held by several ranks, which see other shards beside them."""
    result = result_of(results, name)
    assert len(result["differs"]) == 2 * 3 + 1  # both passes of three steps, and the probe
    assert result["differs"] == [[]] * len(result["differs"])
    # It is rounded at all: a move of which rounding to nearest would lose a part keeps all on average.
    assert result["logs"]["gnp_fidelity"] == pytest.approx([1.0] * 3, abs=0.1)


def test_mixed_precision_is_as_close_to_fp32_as_plain_training(results):
    """accelerate keeps the shards in fp32 and gathers bf16."""
    distances = {}
    for name, settings in MIXED.items():
        alpha, model = settings["args"].get("gnp_alpha", 0.0), make_decoder("llama")
        start, expected, _ = reference_run("llama", 1, RANKS, alpha=alpha, model=model)
        distances[name] = relative_distance(result_of(results, name)["weights"], expected, start)
    assert 0 < distances["mixed-alpha0.8"] < 1.5 * distances["mixed-alpha0"]
