"""The variants that touch engines, on every engine that takes them, against the reference loop."""

from typing import Any

import pytest
import reference
import torch
from cases import ENGINES, RANKS, assert_matches_reference, gnp, reference_of, result_of, run_cases
from runs import BASE, WEIGHTS_TOLERANCE, window_loss, windows
from tiny import flat_weights, make_model, relative_distance


pytestmark = pytest.mark.distributed

ACCUMULATION = {"gradient_accumulation_steps": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "adaptive": {"gnp_adaptive": True},
    "targets": {"gnp_target_modules": "norm"},
    "normalized": {"gnp_normalize_gradient": True},
}
VARIED = {
    f"{variant}-{engine}": {"engine": engine, "kind": "vit", "args": gnp(**ACCUMULATION, **arguments)}
    for engine in ENGINES
    for variant, arguments in VARIANTS.items()
}
BF16_MASTERED = ("zero1", "zero2", "zero3", "zero2-offload", "zero1-fp32-accumulation")
ROUNDED = {
    f"rounded-{engine}-{rounding}": {
        "engine": engine.removesuffix("-fp32-accumulation"),
        "kind": "vit",
        "precision": "bf16",
        "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}} if engine.endswith("accumulation") else {},
        "args": gnp(learning_rate=0.0, gnp_r=1e-3, gnp_stochastic_rounding=rounding, max_steps=3),
    }
    for engine in BF16_MASTERED
    for rounding in ("auto", "true")
}
PURE_BF16 = {
    f"bf16-weights-{engine}-{rounding}": {
        "engine": engine,
        "kind": "vit",
        "dtype": "bfloat16",
        "args": gnp(learning_rate=0.0, gnp_r=1e-3, gnp_stochastic_rounding=rounding, max_steps=3),
    }
    for engine in ("ddp", "fsdp2")
    for rounding in ("auto", "false")
}
UNSYNCED = {
    "unsynced": {
        "engine": "ddp",
        "kind": "vit",
        "count": True,
        "args": gnp(gnp_sync_perturbation=False, logging_steps=1000),
    },
    "unsynced-logged": {"engine": "ddp", "kind": "vit", "args": gnp(gnp_sync_perturbation=False)},
    "unsynced-accumulated": {"engine": "ddp", "kind": "vit", "args": gnp(gnp_sync_perturbation=False, **ACCUMULATION)},
    "stock": {"engine": "ddp", "kind": "vit", "stock": True, "count": True, "args": {"logging_steps": 1000}},
    "unsynced-nan": {
        "engine": "ddp",
        "kind": "vit",
        "faults": {"2.1@1": "nan"},
        "args": gnp(gnp_sync_perturbation=False, max_steps=3),
    },
    "rounded-on-replicas": {
        "engine": "ddp",
        "kind": "vit",
        "dtype": "bfloat16",
        "faults": {},
        "compare_ranks": True,
        "args": gnp(gnp_r=1e-3, max_steps=3),
    },
    "unsynced-zero2": {"engine": "zero2", "kind": "vit", "args": gnp(gnp_sync_perturbation=False)},
    "rounding-fp32-zero2": {"engine": "zero2", "kind": "vit", "args": gnp(gnp_stochastic_rounding=True)},
}


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> dict[str, Any]:
    return run_cases(VARIED | ROUNDED | PURE_BF16 | UNSYNCED, tmp_path_factory.mktemp("variants"))


def along_the_norm_layers(parameters, g1):
    chosen = ["norm" in name for name, _ in make_model("vit").named_parameters()]
    length = reference.norm(g for g, is_chosen in zip(g1, chosen, strict=True) if is_chosen)
    return [g / length if is_chosen else torch.zeros_like(g) for g, is_chosen in zip(g1, chosen, strict=True)]


FORMULAS: dict[str, dict[str, Any]] = {
    "adaptive": {"direction": reference.scale_invariant},
    "targets": {"direction": along_the_norm_layers},
    "normalized": {"mix": reference.authors_mix},
}


@pytest.mark.parametrize("name", VARIED)
def test_variant_matches_its_formula(results, name):
    assert_matches_reference(result_of(results, name), VARIED[name], **FORMULAS[name.split("-")[0]])


def unsynced_reference(accumulation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each rank climbs along its own gradient; the mixed gradients are averaged over ranks, then clipped."""
    model = make_model("vit")
    start = flat_weights(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=BASE["learning_rate"])
    for window in windows("vit", RANKS * accumulation):
        mixed = []
        for rank in range(RANKS):
            # The loss of a rank is its part of the mean over all labels, times the ranks that DDP divides by.
            own = window[rank::RANKS]
            g1 = reference.gradient(model, window_loss(model, own))
            origin = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, d in zip(parameters, reference.along_the_gradient(parameters, g1), strict=True):
                    p += 0.05 * d
            g2 = reference.gradient(model, window_loss(model, own))
            with torch.no_grad():
                for p, value in zip(parameters, origin, strict=True):
                    p.copy_(value)
            mixed.append(reference.paper_mix(g1, g2, 0.8))
        for p, *gradients in zip(parameters, *mixed, strict=True):
            p.grad = sum(gradients) / RANKS
        torch.nn.utils.clip_grad_norm_(parameters, BASE["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
    return start, flat_weights(model)


@pytest.mark.parametrize("name, accumulation", [("unsynced-logged", 1), ("unsynced-accumulated", 2)])
def test_unsynced_perturbation_is_along_each_ranks_own_gradient(results, name, accumulation):
    start, expected = unsynced_reference(accumulation)
    assert relative_distance(result_of(results, name)["weights"], expected, start) < WEIGHTS_TOLERANCE
    _, synced, _ = reference_of({"kind": "vit", "args": gnp(gradient_accumulation_steps=accumulation)})
    assert relative_distance(synced, expected, start) > 10 * WEIGHTS_TOLERANCE  # else the test would not tell


def test_unsynced_perturbation_communicates_as_much_as_plain_training(results):
    plain, unsynced = (result_of(results, name)["collectives"] for name in ("stock", "unsynced"))
    assert unsynced == plain


def test_unsynced_ranks_stay_together_when_one_has_no_direction(results):
    result = result_of(results, "unsynced-nan")
    assert torch.equal(result["weights"], result["start_of_step"])


def test_refused_where_an_engine_cannot_follow(results):
    assert "ValueError: gnp_sync_perturbation=False" in results["unsynced-zero2"]["error"]
    assert "ValueError: gnp_stochastic_rounding=True" in results["rounding-fp32-zero2"]["error"]


@pytest.mark.parametrize("engine", BF16_MASTERED)
def test_rounding_of_weights_with_a_master(results, engine):
    """At learning rate 0 the weights come back exactly, and the noise of rounding shows in the move only."""
    nearest, stochastic = (result_of(results, f"rounded-{engine}-{rounding}") for rounding in ("auto", "true"))
    assert torch.equal(nearest["weights"], stochastic["weights"])
    assert torch.equal(nearest["weights"], flat_weights(make_model("vit").to(torch.bfloat16)))
    assert nearest["logs"]["gnp_grad_norm"] == stochastic["logs"]["gnp_grad_norm"]
    assert nearest["logs"]["gnp_fidelity"] != stochastic["logs"]["gnp_fidelity"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_rounding_of_weights_without_a_master(results, engine):
    auto, nearest = (result_of(results, f"bf16-weights-{engine}-{rounding}") for rounding in ("auto", "false"))
    assert torch.equal(auto["weights"], nearest["weights"])
    assert torch.equal(auto["weights"], flat_weights(make_model("vit").to(torch.bfloat16)))
    assert auto["logs"]["gnp_fidelity"] != nearest["logs"]["gnp_fidelity"]


def test_replicas_are_rounded_alike(results):
    assert result_of(results, "rounded-on-replicas")["ranks_agree"]
