"""The variants that touch engines, on every engine that takes them, against the reference loop."""

from typing import Any

import pytest
import reference
import torch
from cases import (
    BESIDE_FSDP2,
    ENGINES,
    RANKS,
    assert_matches_reference,
    gnp,
    reference_of,
    result_of,
    run_cases,
    untied,
)
from runs import WEIGHTS_TOLERANCE, by_scope, reference_run, window_loss, windows
from tiny import adversarial, flat_weights, make_model, relative_distance


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
SCOPED = {
    f"{scope}-{engine}-{kind}-alpha{alpha}": {
        "engine": engine,
        "kind": untied(kind, engine),
        "args": gnp(alpha, gnp_scope=scope, gradient_accumulation_steps=accumulation),
    }
    for scope, engines in {"micro_batch": ENGINES, "rank": ("ddp",), "rank_micro_batch": ("ddp",)}.items()
    for engine in engines
    for kind, alpha, accumulation in (("vit", 0.8, 2), ("vit", 1.0, 4), ("llama", 0.8, 4))
}
SCOPED |= {
    f"micro_batch-fsdp2-{name}": {
        "engine": "fsdp2",
        "kind": kind,
        "args": gnp(0.8, gnp_scope="micro_batch", **ACCUMULATION, **arguments),
    }
    for name, (kind, arguments) in BESIDE_FSDP2.items()
}
SCOPED_LOW = {
    f"micro_batch-{engine}-{precision}-{where}": {
        "engine": engine,
        "kind": "vit",
        "precision": precision,
        "faults": faults,
        "args": gnp(learning_rate=0.1, gnp_scope="micro_batch", max_steps=4, **ACCUMULATION),
    }
    for precision, engines in {
        "fp16": ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"),
        "bf16": ("zero1", "zero2", "zero3"),
    }.items()
    for engine in engines
    for where, faults in {"clean": {}, "overflow": {"2.1": "1e38" if precision == "fp16" else "nan"}}.items()
}
COUNTED = {
    f"count-{name}": {"engine": "ddp", "kind": "vit", "count": True, "stock": name == "stock", "args": args}
    for name, args in {
        "stock": {"logging_steps": 1000, **ACCUMULATION},
        **{
            scope: gnp(gnp_scope=scope, logging_steps=1000, **ACCUMULATION)
            for scope in ("step", "micro_batch", "rank", "rank_micro_batch")
        },
    }.items()
}
OTHERS = {
    "rank-nan": {
        "engine": "ddp",
        "kind": "vit",
        "faults": {"2.1@1": "nan"},
        "args": gnp(gnp_scope="rank", max_steps=3),
    },
    "rounded-on-replicas": {
        "engine": "ddp",
        "kind": "vit",
        "dtype": "bfloat16",
        "faults": {},
        "compare_ranks": True,
        "args": gnp(gnp_r=1e-3, max_steps=3),
    },
    "rank-zero2": {"engine": "zero2", "kind": "vit", "args": gnp(gnp_scope="rank")},
    "rank_micro_batch-fsdp2": {"engine": "fsdp2", "kind": "vit", "args": gnp(gnp_scope="rank_micro_batch")},
    "logs-in-loss": {"engine": "ddp", "kind": "vit", "logs_in_loss": True, "args": gnp(**ACCUMULATION)},
    **{
        f"adversarial-{engine}": {"engine": engine, "kind": "vit", "is_adversarial": True, "args": gnp()}
        for engine in ("ddp", "fsdp2")
    },
    "hook-power_sgd": {"engine": "ddp", "kind": "vit", "comm_hook": "power_sgd", "args": gnp()},
    **{
        f"hook-fp16-{alpha}": {"engine": "ddp", "kind": "vit", "comm_hook": "fp16", "args": gnp(alpha, max_steps=3)}
        for alpha in (1e-6, 0.8)  # bf16's wants a GPU
    },
    "rounding-fp32-zero2": {"engine": "zero2", "kind": "vit", "args": gnp(gnp_stochastic_rounding=True)},
}
CASES = VARIED | ROUNDED | PURE_BF16 | SCOPED | SCOPED_LOW | COUNTED | OTHERS


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> dict[str, Any]:
    return run_cases(CASES, tmp_path_factory.mktemp("variants"))


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


@pytest.mark.parametrize("name", SCOPED)
def test_scope_matches_its_formula(results, name):
    """Each group of micro-batches climbs along its own gradient, and the mixed gradients are added, then clipped."""
    scope = SCOPED[name]["args"]["gnp_scope"]
    assert_matches_reference(result_of(results, name), SCOPED[name], **by_scope(scope, RANKS))
    start, expected, _ = reference_of(SCOPED[name], **by_scope(scope, RANKS))
    _, by_step, _ = reference_of(SCOPED[name])
    assert relative_distance(by_step, expected, start) > 10 * WEIGHTS_TOLERANCE  # else the test would not tell


@pytest.mark.parametrize("name", [name for name in SCOPED_LOW if name.endswith("clean")])
def test_scope_in_low_precision_is_near_its_formula(results, name):
    result, overflowed = (result_of(results, name.replace("clean", where)) for where in ("clean", "overflow"))
    steps = 2 * windows("vit", 2 * RANKS)  # two epochs
    start, expected, _ = reference_run(
        "vit", 2, RANKS, steps=steps[:4], optimizer=sgd_at(0.1), **by_scope("micro_batch", RANKS)
    )
    # Each of two passes rounds a gradient to 8 bits (bf16), and takes ten operations that do.
    assert relative_distance(result["masters"], expected, start) < 20 * 2.0**-8
    # Of a micro-batch that overflows, the whole step is skipped, and the others are made.
    steps = [window for step, window in enumerate(steps[:4]) if step != 2]
    start, expected, _ = reference_run(
        "vit", 2, RANKS, steps=steps, optimizer=sgd_at(0.1), **by_scope("micro_batch", RANKS)
    )
    assert relative_distance(overflowed["masters"], expected, start) < 20 * 2.0**-8


def sgd_at(learning_rate: float):
    return lambda parameters, lr: torch.optim.SGD(parameters, learning_rate)


def test_what_scopes_communicate(results):
    counts = {name: result_of(results, name)["collectives"] for name in COUNTED}
    plain = counts["count-stock"]
    for scope, factor in {"step": 2, "micro_batch": 2 * 2, "rank": 1, "rank_micro_batch": 1}.items():
        expected = {**plain, "allreduce": factor * plain["allreduce"]}
        assert counts[f"count-{scope}"] == expected, scope


def test_ranks_stay_together_when_one_has_no_direction(results):
    result = result_of(results, "rank-nan")
    assert torch.equal(result["weights"], result["start_of_step"])


def test_a_loss_that_logs_on_the_main_process_alone_hangs_nobody(results):
    """Only in `Trainer`'s own log call do all ranks meet."""
    assert_matches_reference(result_of(results, "logs-in-loss"), OTHERS["logs-in-loss"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_loss_that_differentiates_by_its_inputs(results, engine):
    def loss(model, window):
        return window_loss(model, [adversarial(lambda moved: model(**moved).loss, batch) for batch in window])

    name = f"adversarial-{engine}"
    assert_matches_reference(result_of(results, name), OTHERS[name], loss=loss)


@pytest.mark.parametrize("alpha", [1e-6, 0.8])
def test_a_hook_that_compresses_gradients(results, alpha):
    """At a small α, (1-α)/α g₁ has no place in fp16, and α g₂ beside it none in either: g₁ is kept aside."""
    case = OTHERS[f"hook-fp16-{alpha}"]
    start, expected, _ = reference_of(case, steps=windows("vit", RANKS)[:3])
    # Each rank rounds its gradients of two passes once, to 11 bits.
    result = result_of(results, f"hook-fp16-{alpha}")
    # The lower bound: there was a hook.
    assert 1e-5 < relative_distance(result["weights"], expected, start) < 4 * 2.0**-11
    assert (
        "NotImplementedError: The gradient-norm penalty does not run with PowerSGD"
        in results["hook-power_sgd"]["error"]
    )


def test_refused_where_an_engine_cannot_follow(results):
    assert "ValueError: gnp_scope=rank " in results["rank-zero2"]["error"]
    assert "ValueError: gnp_scope=rank_micro_batch " in results["rank_micro_batch-fsdp2"]["error"]
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
