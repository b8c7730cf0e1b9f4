"""16-bit weights and gradients on engines: distance from fp32, loss scaling, stochastic rounding. 2 ranks, CPU."""

from typing import Any

import pytest
import torch
from cases import MOMENTUM, MOMENTUM_ADAM, RANKS, TWO, case_of, distance_from_reference, gnp, result_of, steps_of
from runs import by_scope
from tiny import flat_weights, make_model


pytestmark = pytest.mark.distributed

LOW = {"learning_rate": 0.1, "num_train_epochs": 2}
FP32_SUMS = tuple(f"zero{stage}-fp32-accumulation" for stage in (1, 2, 3))
PRECISION = {
    f"{precision}-{engine}{'-stock' if stock else ''}": case_of(
        engine, {**LOW, **({} if stock else gnp())}, precision=precision, stock=stock
    )
    for precision, engines in {
        "bf16": ("ddp", "zero0", "zero1", "zero2", "zero3", "zero2-offload", *FP32_SUMS),
        "fp16": ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"),
    }.items()
    for engine in engines
    for stock in (True, False)
}
PRECISION |= {
    f"autocast-{engine}{'-stock' if stock else ''}": case_of(
        engine,
        {**LOW, **({} if stock else gnp())},
        deepspeed={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        stock=stock,
    )
    for engine in ("zero1", "zero3")
    for stock in (True, False)
}
NEAR = {
    f"momentum-{engine}-{precision}": case_of(
        engine, {**MOMENTUM, "learning_rate": 0.05, "max_steps": 4, **TWO}, precision=precision
    )
    for engine, precision in (("zero1", "bf16"), ("zero2", "fp16"), ("zero3", "fp16"), ("zero3-offload", "bf16"))
}
NEAR |= {
    f"micro_batch-{engine}-{precision}-{where}": case_of(
        engine,
        gnp(learning_rate=0.1, gnp_scope="micro_batch", max_steps=4, **TWO),
        precision=precision,
        faults=faults,
    )
    for precision, engines in {
        "fp16": ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"),
        "bf16": ("zero1", "zero2", "zero3"),
    }.items()
    for engine in engines
    for where, faults in {"clean": {}, "overflow": {"2.1": "1e38" if precision == "fp16" else "nan"}}.items()
}
HUGE = "1e38"  # a loss of which no 16-bit gradient is finite
OVERFLOWS = {"none": {}, "first": {"2.1": HUGE}, "second": {"2.2": HUGE}, "both": {"2.1": HUGE, "2.2": HUGE}}
SCALED = ("ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
OVERFLOW = {
    f"overflow-{engine}-{where}{'-stock' if stock else ''}": case_of(
        engine,
        {"learning_rate": 0.1, **({} if stock else gnp())},
        precision="fp16",
        scaler=engine == "ddp",
        stock=stock,
        faults=faults,
    )
    for engine in SCALED
    for where, faults in OVERFLOWS.items()
    for stock in (False, True)
    if not stock or where in ("none", "first")
}
BF16_MASTERED = ("zero1", "zero2", "zero3", "zero2-offload", "zero1-fp32-accumulation")
AT_REST = {"learning_rate": 0.0, "gnp_r": 1e-3, "max_steps": 3}
ROUNDED = {
    f"rounded-{engine}-{rounding}": case_of(engine, gnp(gnp_stochastic_rounding=rounding) | AT_REST, precision="bf16")
    for engine in BF16_MASTERED
    for rounding in ("auto", "true")
} | {
    f"rounded-{engine}-{rounding}": case_of(engine, gnp(gnp_stochastic_rounding=rounding) | AT_REST, dtype="bfloat16")
    for engine in ("ddp", "fsdp2")
    for rounding in ("auto", "false")
}
OTHERS = {
    "replicas": case_of(
        "ddp", gnp() | AT_REST | {"learning_rate": 1e-2}, dtype="bfloat16", faults={}, compare_ranks=True
    ),
    "rounding-fp32": case_of("zero2", gnp(gnp_stochastic_rounding=True)),
    "momentum-zero0-bf16": case_of("zero0", {**MOMENTUM_ADAM, "max_steps": 2}, precision="bf16"),
}
CASES: dict[str, Any] = PRECISION | NEAR | OVERFLOW | ROUNDED | OTHERS


@pytest.mark.parametrize("name", [name for name in PRECISION if not name.endswith("-stock")])
def test_as_close_to_fp32_as_plain_training(results, name):
    """
    16-bit forward weights round each weight by up to 2⁻⁹ (bf16) or 2⁻¹² (fp16) of it, which moves both gradients by
    the same relative amount; the mix adds nothing of first order. So the penalised run may be as far from its fp32
    trajectory as the plain run is from its own, at the same places: a factor of 2 leaves room for the second pass's
    own rounding, which is independent of the first's.
    """
    plain, penalised = (
        distance_from_reference(result_of(results, name + stock), CASES[name + stock], "masters")
        for stock in ("-stock", "")
    )
    assert penalised < 2 * plain
    assert plain < 0.1  # else it would not say much


@pytest.mark.parametrize("name", NEAR)
def test_low_precision_is_near_the_formula(results, name):
    """A step with an overflow in one micro-batch is skipped whole."""
    case, variant = CASES[name], {}
    if "gnp_scope" in case["args"]:
        variant = by_scope(case["args"]["gnp_scope"], RANKS)
    steps = steps_of(case)
    if name.endswith("overflow"):
        del steps[2]
    # Each of two passes rounds a gradient to 8 bits (bf16; 11 in fp16), and takes ten operations that do.
    distance = distance_from_reference(result_of(results, name), case, "masters", steps=steps, **variant)
    assert distance < 20 * 2.0**-8


@pytest.mark.parametrize("engine", SCALED)
def test_overflow(results, engine):
    """As in plain training."""

    def run(where: str) -> dict[str, Any]:
        return result_of(results, f"overflow-{engine}-{where}")

    untouched, skipped = run("none-stock")["loss_scale"], run("first-stock")["loss_scale"]
    assert skipped == untouched / 2
    for where, scale in {"none": untouched, "first": skipped, "second": skipped, "both": skipped}.items():
        assert run(where)["loss_scale"] == scale, where
        assert torch.isfinite(run(where)["weights"]).all()
    # Whichever pass overflows, the step is skipped, and all that follows is the same.
    for where in ("second", "both"):
        assert torch.equal(run(where)["weights"], run("first")["weights"]), where
    assert not torch.equal(run("first")["weights"], run("none")["weights"])


@pytest.mark.parametrize("engine", [*BF16_MASTERED, "ddp", "fsdp2"])
def test_stochastic_rounding(results, engine):
    """At learning rate 0 the weights come back exactly, and rounding shows in the perturbation alone."""
    names = [f"rounded-{engine}-{rounding}" for rounding in ("auto", "true" if engine in BF16_MASTERED else "false")]
    auto, other = (result_of(results, name) for name in names)
    assert torch.equal(auto["weights"], other["weights"])
    assert torch.equal(auto["weights"], flat_weights(make_model("vit").to(torch.bfloat16)))
    assert auto["logs"]["gnp_fidelity"] != other["logs"]["gnp_fidelity"]
    if engine in BF16_MASTERED:
        assert auto["logs"]["gnp_grad_norm"] == other["logs"]["gnp_grad_norm"]


def test_replicas_round_alike(results):
    assert result_of(results, "replicas")["ranks_agree"]


def test_rounding_of_fp32_weights_is_refused(results):
    assert "ValueError: gnp_stochastic_rounding=True" in results["rounding-fp32"]["error"]


def test_momentum_that_cannot_be_found_is_refused(results):
    assert "ValueError: gnp_direction=momentum under ZeRO stage 0" in results["momentum-zero0-bf16"]["error"]
