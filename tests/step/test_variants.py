"""The variants of the perturbation, the mix and its scope, each against its formula."""

import functools

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
    trained,
    windows,
)
from tiny import KINDS, collate, flat_weights, make_data, make_model, relative_distance
from transformers import Trainer

from hf_gnp import GNPTrainer
from hf_gnp.perturbation import find_targets


def only(model: torch.nn.Module, *parts: str):
    """The direction on the parameters with one of the parts in their name."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return reference.along_some([any(part in name for part in parts) for name in names])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_normalized_gradient(tmp_path, kind, accumulation):
    trainer = trained(tmp_path, kind, gnp_normalize_gradient=True, gradient_accumulation_steps=accumulation)
    assert_matches_reference(trainer, reference_run(kind, accumulation, mix=reference.authors_mix))


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
    trainer = trained(tmp_path, kind, gnp_target_modules=target_modules, gradient_accumulation_steps=2)
    model = make_model(kind)
    assert_matches_reference(trainer, reference_run(kind, 2, model=model, direction=only(model, *parts[kind])))


def test_target_modules_with_model_init(tmp_path):
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
def test_scopes_agree_on_one_micro_batch(tmp_path, scope):
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
    trainer = trained(tmp_path, kind, data=data, gnp_r=0.1, **settings)
    steps = windows(kind, accumulation, data)
    expected = reference_run(kind, accumulation, r=0.1, alpha=alpha, steps=steps, **by_scope(scope))
    assert_matches_reference(trainer, expected)
    if scope != "rank":  # else the test would not tell
        _, by_step, _ = reference_run(kind, accumulation, r=0.1, alpha=alpha, steps=steps)
        assert relative_distance(by_step, expected[1], expected[0]) > 10 * WEIGHTS_TOLERANCE


@pytest.mark.parametrize("kind", ["vit", "llama"])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_normalized_gradient_with_scope(tmp_path, accumulation, kind):
    """A normalised gradient of each micro-batch counts 1/M, as the mean over unsynchronised devices of the authors."""
    settings = {"gnp_scope": "micro_batch", "gradient_accumulation_steps": accumulation, "gnp_alpha": 0.6}
    trainer = trained(tmp_path, kind, gnp_normalize_gradient=True, **settings)
    mix = reference.authors_mix_of(1 / accumulation)
    assert_matches_reference(trainer, reference_run(kind, accumulation, alpha=0.6, mix=mix, **by_scope("micro_batch")))


@pytest.mark.parametrize("warmup_type", ["r", "lambda"])
def test_normalized_gradient_in_a_warmup(tmp_path, warmup_type):
    """Step 0 is (1-α) g₁/‖g₁‖ + α g₁ at r = 0, and g₁/‖g₁‖ at α = 0, as in the authors' code."""
    settings = {"gnp_warmup_type": warmup_type, "gnp_warmup_steps": 4, "gnp_alpha": 0.6}
    trainer = trained(tmp_path, "vit", gnp_normalize_gradient=True, **settings)

    def penalty(step):
        warmth = min(1.0, step / 4)
        return (0.05 * warmth, 0.6) if warmup_type == "r" else (0.05, 0.6 * warmth)

    start, expected, _ = reference_run("vit", 1, penalty=penalty, mix=reference.authors_mix)
    assert relative_distance(flat_weights(trainer.model), expected, start) < WEIGHTS_TOLERANCE


def test_scope_with_dropout(tmp_path):
    """Dropout, and a plain step between the penalised ones: r → 0 is plain training but for the order of additions."""
    settings = {"gradient_accumulation_steps": 3, "max_steps": 4, "optim": "adamw_torch"}
    make = functools.partial(make_model, "bert", dropout=0.3)
    plain = trained(tmp_path, "bert", Trainer, model=make(), **settings)
    scoped = trained(
        tmp_path, "bert", model=make(), gnp_scope="micro_batch", gnp_r=1e-30, gnp_alpha=1.0, gnp_interval=2, **settings
    )
    assert relative_distance(flat_weights(scoped.model), flat_weights(plain.model), flat_weights(make())) < 1e-4
    assert logs_of(scoped, "gnp_sharpness")["gnp_sharpness"][1] == 0.0
