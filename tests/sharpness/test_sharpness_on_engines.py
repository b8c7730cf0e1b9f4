"""Sharpness with two ranks, on every engine: that of one process at the same weights."""

from pathlib import Path

import pytest
import torch
from cases import result_of, run_cases, untied
from runs import make_trainer
from sharpness_worker import METRICS, repeated, use_dropout
from tiny import make_data, make_model

from hf_gnp import plot_loss_surface


WORKER = Path(__file__).parent / "sharpness_worker.py"
ENGINES = ("ddp", "fsdp2", "zero2", "zero3", "zero2-offload", "zero3-offload")
# Five micro-batches: one rank has three of them, the other two and one that counts nothing.
SAMPLES, BATCH = 13, 3
# Few products: whether they are enough is for tests/sharpness/test_sharpness.py. The same ones on every engine.
OPTIONS = {"k": 1, "samples": SAMPLES, "probes": 2, "radii": [0.05, 0.2], "max_products": 12, "seed": 1}
MICRO_BATCH, ACCUMULATION, RANKS = 4, 2, 2
FIND_R = {"radii": [0.02, 0.2], "batches": 2, "seed": 3}
# Products are differences of gradients in fp32, and off by up to 1e-3 (`product_error`).
TOLERANCE = 2e-3
# A share of its standard error. Positive and negative curvatures along random directions cancel, and the rounding of
# gradients does not: seen is 1e-2.
TRACE = 3e-2
# Rises are differences of losses of size 4, in fp32, and squares of products' errors.
RISE = 2e-5


def case_of(engine: str, kind: str, precision: str = "fp32") -> dict:
    args = {
        "gnp_alpha": 0.8,
        "max_steps": 2,
        "per_device_train_batch_size": MICRO_BATCH,
        "per_device_eval_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
    }
    # A forward of the first gradient, of a product, and of the rise at the end.
    # With seed 1 the noise of 16-bit products ends the iteration before it has met the eigenvector.
    options = OPTIONS | ({"seed": 2} if precision == "bf16" else {})
    case = {"engine": engine, "kind": untied(kind, engine), "args": args, "options": options, "precision": precision}
    return case | {"interrupted_at": [2, 11, 40], "find_r": FIND_R}


CASES = {f"{engine}-llama": case_of(engine, "llama") for engine in ENGINES} | {
    "fsdp2-frozen": case_of("fsdp2", "llama") | {"frozen": "model.embed_tokens"},
    "zero0-vit": case_of("zero0", "vit"),
    "zero1-vit": case_of("zero1", "vit"),
    "zero1-bf16-vit": case_of("zero1", "vit", "bf16"),
    "zero2-round-robin-vit": case_of("zero2", "vit") | {"zero": {"round_robin_gradients": True}},
    "zero3-bf16-vit": case_of("zero3", "vit", "bf16"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_cases(CASES, tmp_path_factory.mktemp("sharpness"), worker=WORKER)


def measured_on_one_process(folder, case, weights):
    model = make_model(case["kind"])
    if "frozen" in case:
        model.get_submodule(case["frozen"]).requires_grad_(False)
    with torch.no_grad():
        sizes = [p.numel() for p in model.parameters()]
        for parameter, part in zip(model.parameters(), weights.split(sizes), strict=True):
            parameter.copy_(part.view_as(parameter))
    trainer = make_trainer(
        folder,
        case["kind"],
        model=model,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=RANKS * ACCUMULATION,
        per_device_eval_batch_size=SAMPLES,
    )
    data = make_data(case["kind"])
    picture = plot_loss_surface(
        trainer, folder / "one.png", dataset=data, points=3, distance=0.1, samples=OPTIONS["samples"]
    )
    result = trainer.measure_sharpness(data, **case["options"]) | {"picture": picture["slices"][0]["losses"]}
    use_dropout(model)
    found = {metric: trainer.find_r(repeated(data), metric=metric, log=False, **FIND_R) for metric in METRICS}
    return result | {"find_r": found}


def assert_same(result, expected, tolerance=TOLERANCE, rise=RISE):
    for name in ("loss", "grad_norm"):
        assert result[name] == pytest.approx(expected[name], rel=max(1e-5, tolerance / 100)), name
    assert result["top_eigenvalues"] == pytest.approx(expected["top_eigenvalues"], rel=tolerance)
    assert abs(result["trace"] - expected["trace"]) < TRACE * expected["trace_standard_error"]
    for name in ("ascent", "ascent_top_eigenvector", "ascent_random"):
        assert result[name] == pytest.approx(expected[name], rel=tolerance, abs=rise), name


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_measure_what_one_process_does(tmp_path, results, name):
    result, case = result_of(results, name), CASES[name]
    # Measuring leaves weights as they were, wherever it ends, and training as it is without.
    assert torch.equal(result["weights"], result["plain_weights"])
    assert torch.equal(result["weights"], result["after_measuring"])
    assert all(torch.equal(result["weights"], weights) for weights in result["interrupted"])
    assert [entry["step"] for entry in result["logged"]] == [2]
    assert result["logged"][0]["sharpness_top_eigenvalue_1"] == result["measured"]["top_eigenvalues"][0]
    expected = measured_on_one_process(tmp_path, case, result["weights"])
    print(name, result["measured"], expected)
    if case["precision"] == "bf16":  # 8 bits of each weight, activation and gradient
        assert result["measured"]["top_eigenvalues"] == pytest.approx(expected["top_eigenvalues"], rel=0.2)
        assert result["measured"]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)
        return
    assert_same(result["measured"], expected)
    assert result["picture"] == pytest.approx(expected["picture"], rel=1e-5)  # losses, and filters' norms, in fp32
    for metric, found in result["find_r"].items():
        for name, value in expected["find_r"][metric].items():
            # Sums in fp32 in another order, with the same dropout masks; rises are differences of losses.
            assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=RISE)), name
    if case["engine"].startswith("zero"):
        assert "during or after training" in result["before_training"]
    if case["engine"] == "ddp":
        start = make_trainer(tmp_path, case["kind"], per_device_eval_batch_size=SAMPLES)
        assert_same(result["before_training"], start.measure_sharpness(make_data(case["kind"]), **OPTIONS))
