"""Bytes that each engine communicates and holds: against plain training and `benchmarks/memory.py`. 2 ranks, CPU."""

import pytest
from cases import MOMENTUM, RANKS, TWO, case_of, gnp, result_of
from memory import estimate_memory
from meters import CountCollectives


pytestmark = pytest.mark.distributed

STEPS = 6  # 48 samples, 2 ranks, micro-batches of 4
COUNTED_STEPS = STEPS - CountCollectives.first_step
COUNTED = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
BYTES = {
    f"bytes-{engine}-{name}": case_of(
        engine,
        {"logging_steps": 1000, **args},
        stock=name == "stock",
        count=True,
        zero={"stage3_param_persistence_threshold": 0} if engine == "zero3" else {},
    )
    for engine in COUNTED
    for name, args in {"stock": {}, "gnp": gnp()}.items()
}
# What a step of two micro-batches communicates over plain training. Under ZeRO-3 all parameters of so small a model
# stay gathered after a step, and are gathered again when they have changed.
FACTORS: dict[str, dict[str, dict[str, float]]] = {
    "ddp": {
        "step": {"allreduce": 2},
        "micro_batch": {"allreduce": 4},
        "rank": {"allreduce": 1},
        "rank_micro_batch": {"allreduce": 1},
        "momentum": {"allreduce": 1},
    },
    "fsdp2": {
        "micro_batch": {"reduce_scatter_base": 4, "allgather_base": 2},
        "momentum": {"reduce_scatter_base": 1, "allgather_base": 1},
    },
    "zero2": {
        "micro_batch": {"allreduce": 2, "allgather_base": 4},
        "momentum": {"allreduce": 1, "allgather_base": 2},
    },
    "zero3": {
        "micro_batch": {"reduce_scatter_base": 2, "allgather_base": 4},
        "momentum": {"reduce_scatter_base": 1, "allgather_base": 2},
    },
}
BYTES |= {
    f"accumulated-{engine}-{name}": case_of(
        engine,
        {
            **({"momentum": MOMENTUM, "stock": {}}.get(name, gnp(gnp_scope=name))),
            "logging_steps": 1000,
            "max_steps": 4,
            **TWO,
        },
        count=True,
        stock=name == "stock",
    )
    for engine, factors in FACTORS.items()
    for name in ("stock", *factors)
}
SMALL_BUCKETS = {"reduce_bucket_size": 3000, "allgather_bucket_size": 3000}
NOTHING_GATHERED = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
NOTHING_GATHERED |= {"stage3_max_live_parameters": 0}
HELD = {
    f"held-{engine}-{precision}": case_of(
        engine,
        # With accumulation ZeRO-1 has whole gradients when a forward begins, and ZeRO-2 with offload one shard more.
        {"optim": "adamw_torch", "max_steps": 2, **({} if engine == "zero2-offload" else TWO)},
        "vit-deep",
        precision=precision,
        stock=True,
        holds=True,
        zero=zero,
    )
    for engine, zero in {
        "ddp": {},
        "zero1": SMALL_BUCKETS,
        "zero2": SMALL_BUCKETS,
        "zero3": SMALL_BUCKETS | NOTHING_GATHERED,
        "zero2-offload": SMALL_BUCKETS,
        "zero3-offload": SMALL_BUCKETS | NOTHING_GATHERED,
    }.items()
    for precision in ("fp32", "bf16")
}
CASES = HELD | BYTES


@pytest.mark.parametrize("engine", COUNTED)
def test_bytes_communicated(results, engine):
    """
    Twice plain training's and at most one fp32 scalar a step for the norm. Under ZeRO-1 and 2 the second gathering of
    weights is that of the perturbed ones; where weights are whole the norm needs no collective.
    """
    plain, penalised = (result_of(results, f"bytes-{engine}-{run}")["collectives"] for run in ("stock", "gnp"))
    scalars = 4 * COUNTED_STEPS
    assert penalised.pop("allgather") == plain.pop("allgather")  # num_items_in_batch, once a step
    for collective, size in penalised.items():
        assert size <= 2 * plain.get(collective, 0) + scalars, collective
    if engine == "ddp":
        assert penalised == {"allreduce": 2 * plain["allreduce"]}
    for collective, size in plain.items():
        if size > 100 * scalars:  # not the norms for clipping, which are taken once
            assert penalised[collective] >= 2 * size - 4 * scalars, collective


@pytest.mark.parametrize("engine", FACTORS)
def test_bytes_of_variants(results, engine):
    plain = result_of(results, f"accumulated-{engine}-stock")["collectives"]
    for name, factors in FACTORS[engine].items():
        counted = result_of(results, f"accumulated-{engine}-{name}")["collectives"]
        for collective, factor in factors.items():
            assert counted[collective] == pytest.approx(factor * plain[collective], abs=64), (name, collective)
        # Besides, scalars in fp32.
        others = sum(size for collective, size in counted.items() if collective not in factors)
        assert others <= 128, (name, counted)
        if engine == "ddp" and name != "momentum":
            assert counted == {**plain, "allreduce": factors["allreduce"] * plain["allreduce"]}, name
        if engine == "fsdp2" and name == "momentum":
            assert counted == {**plain, "allreduce": 2 * 4}  # one scalar a step


@pytest.mark.parametrize("name", HELD)
def test_bytes_held_by_plain_training(results, name):
    """To the inputs of two micro-batches, buckets of 3000 elements, a largest parameter, and padding: 4% of all."""
    case, result = CASES[name], result_of(results, name)
    size, engine = result["parameters"], case["engine"].replace("-", "_")
    device, host = estimate_memory(engine, size, RANKS, precision=case["precision"])
    expected = device.plain + host.plain
    if engine == "ddp":
        expected -= 4 * size  # its own buckets, which Python does not see
    print(f"{result['held'] / size:.2f} bytes a parameter, estimated {expected / size:.2f}")
    assert result["held"] == pytest.approx(expected, rel=0.04)
