"""The authors' and others' variants of the move and the mix, each against its formula; low-precision weights."""

import functools
import itertools
import logging
import math

import pytest
import reference
import torch
from runs import (
    MICRO_BATCH,
    WEIGHTS_TOLERANCE,
    assert_identical,
    assert_matches_reference,
    by_scope,
    logs_of,
    make_args,
    make_trainer,
    reference_run,
    run,
    windows,
)
from tiny import KINDS, collate, flat_weights, make_data, make_model, relative_distance
from transformers import Trainer, TrainerCallback

from hf_gnp import GNPTrainer, GNPTrainingArguments
from hf_gnp.direction import find_targets
from hf_gnp.rounding import Place, round_stochastically, uniform_noise


def only(model: torch.nn.Module, *parts: str):
    """The direction of SAM-ON: r g/‖g‖ on the chosen parameters, with the norm of these, and 0 on the others."""
    chosen = [any(part in name for part in parts) for name, p in model.named_parameters() if p.requires_grad]

    def direction(parameters, g1):
        length = reference.norm(g for g, is_chosen in zip(g1, chosen, strict=True) if is_chosen)
        return [g / length if is_chosen else torch.zeros_like(g) for g, is_chosen in zip(g1, chosen, strict=True)]

    return direction


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_adaptive(tmp_path, kind, alpha, accumulation):
    settings = {"gnp_alpha": alpha, "gnp_r": 0.5, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, kind, gnp_adaptive=True, **settings)
    trainer.train()
    expected = reference_run(kind, accumulation, r=0.5, alpha=alpha, direction=reference.scale_invariant)
    assert_matches_reference(trainer, expected)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_normalize_gradient(tmp_path, kind, accumulation):
    settings = {"gnp_normalize_gradient": True, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, kind, **settings)
    trainer.train()
    assert_matches_reference(trainer, reference_run(kind, accumulation, mix=reference.authors_mix))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_precondition(tmp_path, kind, alpha, accumulation):
    """Adam's own metric. The first step has none yet, and is a plain one."""
    settings = {"gnp_alpha": alpha, "gnp_r": 0.01, "gradient_accumulation_steps": accumulation}
    # With a smaller ε, Adam turns the rounding of gradients that are nearly zero into steps of full length.
    settings |= {"optim": "adamw_torch", "adam_epsilon": 1e-3}
    trainer = make_trainer(tmp_path, kind, gnp_precondition=True, **settings)
    trainer.train()
    model = make_model(kind)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0, eps=1e-3)
    start, expected, logs = reference_run(
        kind,
        accumulation,
        model=model,
        optimizer=lambda parameters, lr: optimizer,
        direction=functools.partial(reference.in_the_metric_of_adam, optimizer=optimizer),
        penalty=lambda step: (0.01, alpha if step > 0 else 0.0),
    )
    assert relative_distance(flat_weights(trainer.model), expected, start) < WEIGHTS_TOLERANCE
    assert logs_of(trainer, "gnp_on")["gnp_on"] == [0.0, *[1.0] * (len(logs) - 1)]


TARGETS = {
    "norm": ("norm", {"vit": ("norm",), "bert": ("LayerNorm",), "llama": ("norm",)}),
    "endings": (
        ["bias", "o_proj.weight"],
        {"vit": ("bias", "o_proj.weight"), "bert": ("bias",), "llama": ("o_proj",)},
    ),
    "expression": (r".*layers?\.1\..*", {"vit": ("layers.1.",), "bert": ("layer.1.",), "llama": ("layers.1.",)}),
}


@pytest.mark.parametrize("spec", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_target_modules(tmp_path, kind, spec):
    target_modules, parts = TARGETS[spec]
    trainer = make_trainer(tmp_path, kind, gnp_target_modules=target_modules, gradient_accumulation_steps=2)
    trainer.train()
    model = make_model(kind)
    assert_matches_reference(trainer, reference_run(kind, 2, model=model, direction=only(model, *parts[kind])))


def test_target_modules_of_a_model_that_is_made_when_training_begins(tmp_path):
    """With `model_init` the parameters are others than those at construction."""
    args = make_args(tmp_path, gnp_target_modules="norm")
    data = make_data("vit")
    trainer = GNPTrainer(args=args, model_init=lambda: make_model("vit"), train_dataset=data, data_collator=collate)
    trainer.train()
    model = make_model("vit")
    assert_matches_reference(trainer, reference_run("vit", 1, model=model, direction=only(model, "norm")))


def test_target_modules_name_modules_or_parameters():
    model = make_model("vit")
    for spec, part in [("classifier", "classifier"), (["classifier"], "classifier"), ("classifier.bias", "fier.bias")]:
        assert find_targets(model, spec) == {id(p) for name, p in model.named_parameters() if part in name}
    model.classifier.requires_grad_(False)
    for spec in ("classifier", "nothing", [], "*malformed"):
        if spec != []:
            with pytest.raises(ValueError, match="gnp_target_modules"):
                find_targets(model, spec)


@pytest.mark.parametrize("scope", ["micro_batch", "rank", "rank_micro_batch"])
def test_scopes_are_one_on_one_process_without_accumulation(tmp_path, scope):
    settings = {"max_steps": 4, "gnp_stochastic_rounding": "auto"}
    ends = [run(make_trainer(tmp_path, "vit", gnp_scope=name, **settings)) for name in ("step", scope)]
    assert_identical(*ends)


# The last window is incomplete, and so is its last micro-batch.
RAGGED = 9 * MICRO_BATCH + 2


@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("scope", ["micro_batch", "rank", "rank_micro_batch"])
@pytest.mark.parametrize("kind", [*KINDS])
def test_scope(tmp_path, kind, scope, alpha, accumulation):
    data = make_data(kind, RAGGED)
    settings = {"gnp_scope": scope, "gnp_alpha": alpha, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, kind, data=data, gnp_r=0.1, **settings)
    trainer.train()
    steps = windows(kind, accumulation, data)
    expected = reference_run(kind, accumulation, r=0.1, alpha=alpha, steps=steps, **by_scope(scope))
    assert_matches_reference(trainer, expected)
    if scope != "rank":  # else the test would not tell
        _, by_step, _ = reference_run(kind, accumulation, r=0.1, alpha=alpha, steps=steps)
        assert relative_distance(by_step, expected[1], expected[0]) > 10 * WEIGHTS_TOLERANCE


@pytest.mark.parametrize("values", [{"gnp_adaptive": True}, {"gnp_normalize_gradient": True}])
def test_variants_of_a_micro_batch(tmp_path, values):
    trainer = make_trainer(tmp_path, "vit", gnp_scope="micro_batch", gradient_accumulation_steps=2, **values)
    trainer.train()
    formula = {"direction": reference.scale_invariant} if "gnp_adaptive" in values else {"mix": reference.authors_mix}
    assert_matches_reference(trainer, reference_run("vit", 2, **formula, **by_scope("micro_batch")))


def test_scope_of_a_micro_batch_sees_the_first_pass_again(tmp_path):
    """Dropout, and a plain step between the penalised ones: r → 0 is plain training but for the order of additions."""
    settings = {"gradient_accumulation_steps": 3, "max_steps": 4, "optim": "adamw_torch"}
    make = functools.partial(make_model, "bert", dropout=0.3)
    plain = make_trainer(tmp_path, "bert", Trainer, model=make(), **settings)
    plain.train()
    scoped = make_trainer(
        tmp_path, "bert", model=make(), gnp_scope="micro_batch", gnp_r=1e-30, gnp_alpha=1.0, gnp_interval=2, **settings
    )
    scoped.train()
    assert relative_distance(flat_weights(scoped.model), flat_weights(plain.model), flat_weights(make())) < 1e-4
    assert logs_of(scoped, "gnp_sharpness")["gnp_sharpness"][1] == 0.0


# --- 16-bit weights without a master ---


def bf16(kind: str) -> torch.nn.Module:
    return make_model(kind).to(torch.bfloat16)


def test_rounding_is_unbiased():
    """
    The mean of n roundings of x differs from x by a normal error of at most spacing/(2√n): five of these are passed
    with a probability of 6e-7 for one of 8 x 2 numbers, 1e-5 for any.
    """
    n = 40_000
    values = torch.tensor([1.001, -1.001, 0.3333, 1e-3, -7e-6, 300.7, 1.0, 0.0])
    for dtype in (torch.bfloat16, torch.float16):
        noise = uniform_noise(Place.whole(0, (n, len(values))), 0, "cpu")
        rounded = round_stochastically(values.repeat(n, 1), dtype, noise).double()
        info = torch.finfo(dtype)
        for value, column in zip(values.double(), rounded.T, strict=True):
            smallest = info.smallest_normal * info.eps
            spacing = max(2.0 ** (math.floor(math.log2(abs(value))) + math.log2(info.eps)) if value else 0, smallest)
            below = math.floor(value.item() / spacing) * spacing
            assert set(column.tolist()) <= {below, below + spacing}
            assert abs(column.mean() - value) < 5 * spacing / (2 * math.sqrt(n)), (dtype, value)


def test_representable_numbers_stay():
    values = torch.randn(1000).to(torch.bfloat16)
    noise = uniform_noise(Place.whole(0, values.shape), 0, "cpu")
    assert torch.equal(round_stochastically(values.float(), torch.bfloat16, noise), values)


def test_stochastic_rounding_is_for_16_bit_weights_and_keeps_the_random_stream(tmp_path):
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


def test_stochastic_rounding_needs_16_bit_weights(tmp_path):
    with pytest.raises(ValueError, match="gnp_stochastic_rounding"):
        make_trainer(tmp_path, "vit", gnp_stochastic_rounding=True)


def test_fidelity_tells_what_rounding_left_of_the_move(tmp_path, caplog):
    def fidelity(**settings) -> list[float]:
        trainer = make_trainer(tmp_path, "vit", learning_rate=0.0, max_steps=6, **settings)
        trainer.train()
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


def test_fidelity_is_measured_at_logging_steps_only(tmp_path, monkeypatch):
    from hf_gnp import penalty

    measured = []
    move_ = penalty.move_

    def spy(*args, measure=False, **kwargs):
        measured.append(measure)
        return move_(*args, measure=measure, **kwargs)

    monkeypatch.setattr(penalty, "move_", spy)
    trainer = make_trainer(tmp_path, "vit", logging_steps=5)
    trainer.train()
    assert measured == [step % 5 == 4 for step in range(12)]
    assert len(logs_of(trainer, "gnp_fidelity")["gnp_fidelity"]) == 2


@pytest.mark.parametrize("alpha", [0.01, 0.1])
def test_16_bit_gradients_are_mixed_after_they_are_summed(tmp_path, alpha):
    """Of α g₂ accumulated in bf16 onto (1-α) g₁ over 12 micro-batches, little would be left."""

    def gradients(**arguments) -> list[torch.Tensor]:
        taken = []

        class Take(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                taken.extend(p.grad.clone() for p in model.parameters())

        settings = {"gradient_accumulation_steps": 12, "max_steps": 1, "gnp_r": 0.5, "max_grad_norm": 0}
        settings["gnp_stochastic_rounding"] = False
        trainer = make_trainer(tmp_path, "bert", model=bf16("bert"), callbacks=[Take()], **settings, **arguments)
        trainer.train()
        return taken

    first, second, mixed = (gradients(gnp_alpha=value) for value in (0.0, 1.0, alpha))
    for g1, g2, result in zip(first, second, mixed, strict=True):
        expected = (1 - alpha) * g1.double() + alpha * g2.double()
        # Each of the two parts rounded once to the 8 bits of bf16.
        parts = (1 - alpha) * g1.double().abs() + alpha * g2.double().abs()
        assert ((result.double() - expected).abs() <= 2.0**-8 * parts + 1e-30).all()


# --- all pairs ---

CHOICES = {
    "gnp_warmup_type": {"gnp_warmup_type": "r", "gnp_warmup_steps": 4},
    "gnp_start": {"gnp_start": 0.4},
    "gnp_end": {"gnp_end": 0.6},
    "gnp_interval": {"gnp_interval": 2},
    "gnp_probability": {"gnp_probability": 0.5},
    "gnp_scope": {"gnp_scope": "micro_batch"},
    "gnp_ascent_fraction": {"gnp_ascent_fraction": 0.5},
    "gnp_direction": {"gnp_direction": "momentum"},
    "gnp_reuse": {"gnp_reuse": True, "gnp_interval": 2},
    "gnp_precondition": {"gnp_precondition": True},
    "gnp_normalize_gradient": {"gnp_normalize_gradient": True},
    "gnp_adaptive": {"gnp_adaptive": True},
    "gnp_target_modules": {"gnp_target_modules": ["layernorm_before", "classifier"]},
    "gnp_stochastic_rounding": {"gnp_stochastic_rounding": True},
    "gnp_lambda": {"gnp_lambda": 0.02},
}
# Together they are refused, by both names; gnp_reuse comes with an interval.
REFUSED = {
    ("gnp_interval", "gnp_probability"): "gnp_interval.*gnp_probability",
    ("gnp_probability", "gnp_reuse"): "gnp_interval.*gnp_probability",
    ("gnp_direction", "gnp_lambda"): "gnp_direction=momentum.*gnp_alpha",
    **{
        pair: "|".join(f"{a}.*{b}" for a, b in (pair, pair[::-1]))
        for pair in (
            ("gnp_scope", "gnp_ascent_fraction"),
            ("gnp_scope", "gnp_direction"),
            ("gnp_scope", "gnp_reuse"),
            ("gnp_ascent_fraction", "gnp_direction"),
            ("gnp_ascent_fraction", "gnp_reuse"),
            ("gnp_direction", "gnp_reuse"),
            ("gnp_direction", "gnp_precondition"),
            ("gnp_direction", "gnp_normalize_gradient"),
            ("gnp_direction", "gnp_adaptive"),
            ("gnp_reuse", "gnp_normalize_gradient"),
            ("gnp_precondition", "gnp_adaptive"),
        )
    },
}
PAIRS = [pair for pair in itertools.combinations(CHOICES, 2) if pair != ("gnp_interval", "gnp_reuse")]


@pytest.mark.parametrize("one, other", PAIRS)
def test_every_pair_works_or_is_refused(tmp_path, one, other):
    """
    That both take effect: the run differs from those with one of the two alone, and from plain training. Where a
    choice decides how steps are thinned out, the other must show on the steps that are left.
    """
    if (one, other) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[one, other]):
            GNPTrainingArguments(output_dir=str(tmp_path), **CHOICES[one], **CHOICES[other])
        return
    settings = {"max_steps": 5, "gradient_accumulation_steps": 2, "optim": "adamw_torch"}
    rounding = "gnp_stochastic_rounding" in (one, other)

    def weights(cls=None, **arguments) -> torch.Tensor:
        model = bf16("vit") if rounding else None
        trainer = make_trainer(tmp_path, "vit", *([cls] if cls else []), model=model, **settings, **arguments)
        trainer.train()
        return flat_weights(trainer.model)

    base = {"gnp_stochastic_rounding": False} if rounding else {}
    both = weights(**CHOICES[one], **CHOICES[other])
    assert torch.isfinite(both).all()
    assert not torch.equal(both, weights(Trainer))
    for kept, dropped in ((one, other), (other, one)):
        assert not torch.equal(both, weights(**(base | CHOICES[kept]))), f"{dropped} has no effect"
