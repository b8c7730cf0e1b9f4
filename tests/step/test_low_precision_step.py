"""bf16 autocast, and 16-bit weights without an fp32 master."""

import logging

import pytest
import torch
from runs import Gradients, assert_identical, logs_of, make_trainer, record_forwards, run, trained, without_probe
from tiny import KINDS, flat_weights, make_data, make_model, relative_distance

from hf_gnp import penalty


# Half of the last of the 8 bits that a bf16 number keeps.
BF16_ROUNDING = 2.0**-9


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_stays_near_fp32(tmp_path, kind):
    ends = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, kind, bf16=bf16, max_steps=1, max_grad_norm=0)
        start = flat_weights(trainer.model)
        trainer.train()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        ends.append((trainer, flat_weights(trainer.model)))
    (exact, expected), (rounded, result) = ends
    # A gradient comes out of some ten operations, each rounded to bf16: the errors add up to √10 of one rounding or
    # ten at the worst, and the second pass takes the difference of two such gradients at 0.05 apart.
    assert 0 < relative_distance(result, expected, start) < 20 * BF16_ROUNDING
    for name in ("loss", "gnp_grad_norm", "gnp_perturbed_loss"):
        assert logs_of(rounded, name)[name] == pytest.approx(logs_of(exact, name)[name], rel=10 * BF16_ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_bf16_weights(tmp_path, kind, alpha):
    """Without an fp32 master: θ comes back bit for bit, and the move is r up to the rounding of each element."""
    model = make_model(kind).to(torch.bfloat16)
    data = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in s.items()} for s in make_data(kind)]
    settings = {"gnp_r": 1.0, "gnp_alpha": alpha, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, kind, model=model, data=data, max_steps=2, **settings)
    passes = record_forwards(model, flat_weights)
    trainer.train()
    start, moved, again, _ = without_probe(passes, 1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_identical(again, start)
    assert_identical(flat_weights(model), start)
    # At most half a unit in the last place of each weight is lost; the weights have norm ‖θ‖.
    assert abs((moved - start).norm().item() - 1.0) < BF16_ROUNDING * moved.norm().item() + 1e-3
    assert all(value > 0 for value in logs_of(trainer, "gnp_sharpness")["gnp_sharpness"])


def bf16(kind: str) -> torch.nn.Module:
    return make_model(kind).to(torch.bfloat16)


def test_stochastic_rounding(tmp_path):
    """Also, θ comes back exactly: at learning rate 0 the weights are those of the start."""
    ends = {}
    for rounding in ("auto", True, False):
        model = bf16("vit")
        settings = {"learning_rate": 0.0, "gnp_r": 1e-3, "gnp_stochastic_rounding": rounding, "max_steps": 3}
        ends[rounding] = run(make_trainer(tmp_path, "vit", model=model, **settings))
        assert torch.equal(flat_weights(model), flat_weights(bf16("vit")))
    assert_identical(ends["auto"], ends[True])
    assert ends["auto"]["logs"] != ends[False]["logs"]
    assert_identical(ends["auto"]["generators"], ends[False]["generators"])


def test_stochastic_rounding_of_fp32_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gnp_stochastic_rounding"):
        make_trainer(tmp_path, "vit", gnp_stochastic_rounding=True)


def test_fidelity(tmp_path, caplog):
    def fidelity(**settings) -> list[float]:
        trainer = trained(tmp_path, "vit", learning_rate=0.0, max_steps=6, **settings)
        return logs_of(trainer, "gnp_fidelity")["gnp_fidelity"]

    with caplog.at_level(logging.WARNING, logger="hf_gnp"):
        assert fidelity(gnp_r=0.05) == pytest.approx([1.0] * 6, abs=1e-4)  # fp32 rounds at 6e-8 of a weight
        assert fidelity(gnp_r=0.05, model=bf16("vit"), gnp_stochastic_rounding=False) == pytest.approx(
            [1] * 6, abs=0.1
        )
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="hf_gnp"):
        nearest = fidelity(gnp_r=1e-5, model=bf16("vit"), gnp_stochastic_rounding=False)
    assert all(value < 0.9 for value in nearest)
    assert ["gnp_fidelity" in record.getMessage() for record in caplog.records] == [True]  # once


def test_fidelity_is_measured_when_logged(tmp_path, monkeypatch):
    measured = []
    move_ = penalty.move_

    def spy(*args, measure=False, **kwargs):
        measured.append(measure)
        return move_(*args, measure=measure, **kwargs)

    monkeypatch.setattr(penalty, "move_", spy)
    trainer = trained(tmp_path, "vit", logging_steps=5)
    assert measured == [step % 5 == 4 for step in range(12)]
    assert len(logs_of(trainer, "gnp_fidelity")["gnp_fidelity"]) == 2


@pytest.mark.parametrize("alpha", [0.01, 0.1])
def test_16_bit_gradients_are_mixed_once(tmp_path, alpha):
    """Of α g₂ accumulated in bf16 onto (1-α) g₁ over 12 micro-batches, little would be left."""

    def gradients(**arguments) -> list[torch.Tensor]:
        seen = Gradients()
        settings = {"gradient_accumulation_steps": 12, "max_steps": 1, "gnp_r": 0.5, "max_grad_norm": 0}
        settings["gnp_stochastic_rounding"] = False
        trained(tmp_path, "bert", model=bf16("bert"), callbacks=[seen], **settings, **arguments)
        return list(seen.steps[0].values())

    first, second, mixed = (gradients(gnp_alpha=value) for value in (0.0, 1.0, alpha))
    for g1, g2, result in zip(first, second, mixed, strict=True):
        expected = (1 - alpha) * g1.double() + alpha * g2.double()
        # Each of the two parts rounded once to the 8 bits of bf16.
        parts = (1 - alpha) * g1.double().abs() + alpha * g2.double().abs()
        assert ((result.double() - expected).abs() <= 2.0**-8 * parts + 1e-30).all()
