"""What each engine holds in plain training, as `benchmarks/memory.py` has it: 2 ranks, gloo, CPU."""

from typing import Any

import pytest
from cases import RANKS, result_of, run_cases
from memory import estimate_memory


pytestmark = pytest.mark.distributed

SMALL_BUCKETS = {"reduce_bucket_size": 3000, "allgather_bucket_size": 3000}
NOTHING_GATHERED = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
NOTHING_GATHERED |= {"stage3_max_live_parameters": 0}
CASES = {
    f"{engine}-{precision}": {
        "engine": engine,
        "kind": "vit-deep",
        "precision": precision,
        "stock": True,
        "holds": True,
        "zero": zero,
        # With accumulation ZeRO-1 has whole gradients when a forward begins, and ZeRO-2 with offload one shard more.
        "args": {
            "optim": "adamw_torch",
            "max_steps": 2,
            "gradient_accumulation_steps": 1 if engine == "zero2-offload" else 2,
        },
    }
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


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    return run_cases(CASES, tmp_path_factory.mktemp("memory"))


@pytest.mark.parametrize("name", CASES)
def test_plain_training_holds_what_is_estimated(results, name):
    """To the inputs of two micro-batches, buckets of 3000 elements, a largest parameter, and padding: 4% of all."""
    case, result = CASES[name], result_of(results, name)
    size, engine = result["parameters"], case["engine"].replace("-", "_")
    device, host = estimate_memory(engine, size, RANKS, precision=case["precision"])
    expected = device.plain + host.plain
    if engine == "ddp":
        expected -= 4 * size  # its own buckets, which Python does not see
    print(f"{result['held'] / size:.2f} bytes a parameter, estimated {expected / size:.2f}")
    assert result["held"] == pytest.approx(expected, rel=0.04)
