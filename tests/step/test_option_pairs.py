"""Every pair of the options: both take effect, or the pair is refused by name."""

import functools
import itertools

import pytest
import torch
from runs import trained
from tiny import flat_weights, make_model
from transformers import Trainer

from hf_gnp import GNPTrainer, GNPTrainingArguments


CHOICES = {
    "gnp_warmup_type": {"gnp_warmup_type": "r", "gnp_warmup_steps": 4},
    "gnp_start": {"gnp_start": 0.4},
    "gnp_end": {"gnp_end": 0.6},
    "gnp_interval": {"gnp_interval": 2},
    "gnp_probability": {"gnp_probability": 0.5},
    "gnp_scope": {"gnp_scope": "micro_batch"},
    "gnp_direction": {"gnp_direction": "momentum"},
    "gnp_normalize_gradient": {"gnp_normalize_gradient": True},
    "gnp_metric": {"gnp_metric": "element"},
    "gnp_target_modules": {"gnp_target_modules": ["layernorm_before", "classifier"]},
    "gnp_stochastic_rounding": {"gnp_stochastic_rounding": True},
}


# Pairs that are refused, by both names.
REFUSED = {
    ("gnp_interval", "gnp_probability"): "gnp_interval.*gnp_probability",
    **{
        pair: "|".join(f"{a}.*{b}" for a, b in (pair, pair[::-1]))
        for pair in (
            ("gnp_scope", "gnp_direction"),
            ("gnp_direction", "gnp_normalize_gradient"),
        )
    },
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights at the end of a run with the named choices, made once."""

    @functools.cache
    def train(*names: str, bf16: bool, cls: type[Trainer] = GNPTrainer) -> torch.Tensor:
        model = make_model("vit").to(torch.bfloat16) if bf16 else None
        settings = {"max_steps": 5, "gradient_accumulation_steps": 2, "optim": "adamw_torch"}
        if cls is GNPTrainer and bf16:
            settings["gnp_stochastic_rounding"] = False
        for name in names:
            settings |= CHOICES[name]
        return flat_weights(trained(tmp_path_factory.mktemp("run"), "vit", cls, model=model, **settings).model)

    return train


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(CHOICES, 2)))
def test_option_pairs(weights, tmp_path, one, other):
    """
    That both take effect: the run differs from those with one of the two alone, and from plain training. Where a
    choice decides how steps are thinned out, the other must show on the steps that are left.
    """
    if (one, other) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[one, other]):
            GNPTrainingArguments(output_dir=str(tmp_path), **CHOICES[one], **CHOICES[other])
        return
    bf16 = "gnp_stochastic_rounding" in (one, other)
    both = weights(one, other, bf16=bf16)
    assert torch.isfinite(both).all()
    assert not torch.equal(both, weights(bf16=bf16, cls=Trainer))
    for kept, dropped in ((one, other), (other, one)):
        assert not torch.equal(both, weights(kept, bf16=bf16)), f"{dropped} has no effect"
