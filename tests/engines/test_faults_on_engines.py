"""NaN losses, exceptions and failed ranks on engines: the weights of the step's start. 2 ranks, gloo, CPU."""

import json
from pathlib import Path

import pytest
import torch
from cases import ENGINES, TWO, case_of, gnp, result_of
from fork import fork_script
from runs import WEIGHTS_TOLERANCE
from tiny import flat_weights, make_model, relative_distance


pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parent / "one_rank_fails.py"
FUSED = {"optim": "adamw_torch_fused"}  # the optimizer skips the step by itself
NAN = {
    f"nan-{engine}-{name}-pass{call}": case_of(
        engine, gnp(max_steps=3, **args), faults={f"2.{call}": "nan"}, precision="bf16" if name == "bf16" else "fp32"
    )
    for name, engines, args in (
        ("fp32", ENGINES, {"learning_rate": 0.1}),
        ("bf16", ("zero1", "zero2"), {"learning_rate": 0.1}),
        ("fused", ("ddp", "fsdp2"), FUSED),
    )
    for engine in engines
    for call in (1, 2)
}
NAN["nan-on-one-rank"] = case_of("ddp", gnp(gnp_scope="rank", max_steps=3), faults={"2.1@1": "nan"})
RAISING = {
    f"raise-{engine}-call{call}": case_of(engine, gnp(**TWO), faults={f"1.{call}": "raise"})
    for engine in ENGINES
    for call in (3, 4)
}
# In the third step: at its second micro-batch, and in its second pass.
SKIPPED = {
    f"skipped-{engine}-{where}": case_of(
        engine,
        gnp(optim="sgd", num_train_epochs=2, max_steps=5, **TWO),
        "llama-untied",
        skips=True,
        faults={where: "raise"},
    )
    for engine in ("ddp", "fsdp2")
    for where in ("2.2", "2.4")
}
# In the second step one rank has a gradient of 0, and no direction.
NO_DIRECTION = case_of("ddp", gnp(gnp_scope="rank", max_steps=3), faults={"1.1@0": "0.0"})
CASES = NAN | RAISING | SKIPPED | {"no-direction": NO_DIRECTION}


@pytest.mark.parametrize("name", NAN)
def test_nan_loss_leaves_the_weights(results, name):
    result = result_of(results, name)
    assert torch.equal(result["weights"], result["start_of_step"])
    assert torch.isfinite(result["masters"]).all()


@pytest.mark.parametrize("name", RAISING)
def test_exception_leaves_the_weights(results, name):
    result = result_of(results, name)
    assert "injected" in result["raised"]
    assert torch.equal(result["weights"], result["start_of_step"])
    assert not torch.equal(result["weights"], flat_weights(make_model("vit")))


def test_rank_without_direction_logs_with_the_others(results):
    norms = result_of(results, "no-direction")["logs"]["gnp_grad_norm"]
    assert len(norms) == 3 and all(norm > 0 for norm in norms)


@pytest.mark.parametrize("where", ["2.2", "2.4"])
def test_failed_step_leaves_no_gradient(results, where):
    of_fsdp2, of_ddp = (result_of(results, f"skipped-{engine}-{where}") for engine in ("fsdp2", "ddp"))
    start = flat_weights(make_model("llama-untied"))
    assert relative_distance(of_fsdp2["weights"], of_ddp["weights"], start) < WEIGHTS_TOLERANCE
    norms, of_ddp_norms = (result["logs"]["gnp_grad_norm"] for result in (of_fsdp2, of_ddp))
    assert norms[2] is None  # the step that was not made
    assert norms[3:] == pytest.approx(of_ddp_norms[3:], rel=1e-4)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_one_rank_fails(tmp_path, engine):
    """Clean weights on that rank, and the job ends with the error."""
    with pytest.raises(AssertionError, match="failed"):
        fork_script(SCRIPT, engine, tmp_path, ranks=2, timeout=900)
    report = json.loads((tmp_path / "report0.json").read_text())
    assert report["error"] == "injected at 1.4"
    if engine == "zero2":
        assert report["own_partition_clean"]
        assert "nothing was saved" in report["refused"]
        assert not (tmp_path / "saved").exists()
    else:
        assert report["clean"]
    if engine == "ddp":
        saved = type(make_model("vit")).from_pretrained(tmp_path / "saved")
        start = torch.load(tmp_path / "start0.pt")
        assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), start, strict=True))
