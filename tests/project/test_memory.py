"""The estimate of memory, against what one process holds, and as the docs print it. (2 ranks: test_launches.py.)"""

from pathlib import Path

import pytest
from held import record_held_bytes
from memory import ENGINES, estimate_memory, table
from runs import make_trainer
from tiny import make_model
from transformers import TrainerCallback


class GradientBytes(TrainerCallback):
    """The bytes of the gradients, when the optimizer is about to use them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.bytes = sum(p.grad.nbytes for p in model.parameters())


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_estimate_of_one_process(tmp_path, precision, alpha):
    model, gradients = make_model("vit"), GradientBytes()
    trainer = make_trainer(
        tmp_path,
        "vit",
        model=model,
        max_steps=2,
        gnp_alpha=alpha,
        optim="adamw_torch",
        bf16=precision == "bf16",
        callbacks=[gradients],
    )
    held = record_held_bytes(trainer)
    trainer.train()
    parameters = list(model.parameters())
    states = [value for state in trainer.optimizer.optimizer.state.values() for value in state.values()]
    step_counters = sum(value.nbytes for value in states if value.ndim == 0)

    size = sum(p.numel() for p in parameters)
    device, host = estimate_memory("ddp", size, ranks=1, precision=precision, alpha=alpha)
    assert device.weights == sum(p.nbytes for p in parameters)
    assert device.gradients == gradients.bytes
    assert device.optimizer == sum(value.nbytes for value in states) - step_counters
    assert (0, device.penalty) == (held[0], max(held))
    assert host.plain + host.penalty == 0


@pytest.mark.parametrize(("engine", "gigabytes"), [("zero0", 120), ("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)])
def test_estimate_of_the_zero_paper(engine, gigabytes):
    """Figure 1 of Rajbhandari et al., arXiv 1910.02054: 7.5B parameters, 64 ranks, Adam in 16 bit."""
    device, _ = estimate_memory(engine, 7.5e9, 64)
    assert device.plain / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine.startswith(("zero1", "zero2", "zero3"))])
def test_estimate_at_alpha_1(engine):
    assert [memory.penalty for memory in estimate_memory(engine, 1e9, 8, alpha=1.0)] == [0, 0]
    assert sum(memory.penalty for memory in estimate_memory(engine, 1e9, 8)) > 0


def test_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="engine"):
        estimate_memory("zero4", 1e9, 8)
    with pytest.raises(ValueError, match="precision"):
        estimate_memory("ddp", 1e9, 8, precision="fp8")


def test_docs_print_the_tables():
    page = (Path(__file__).parents[2] / "docs" / "multi_node.md").read_text(encoding="utf-8")
    assert table() in page
    assert table(host=True) in page
