"""The trainer against the reference loop, on one process."""

import pytest
from runs import assert_matches_reference, make_trainer, reference_run
from tiny import KINDS


@pytest.mark.parametrize("alpha", [0.8, 1.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference_loop(tmp_path, kind, accumulation, alpha):
    trainer = make_trainer(tmp_path, kind, gradient_accumulation_steps=accumulation, gnp_alpha=alpha, gnp_r=0.05)
    trainer.train()
    assert_matches_reference(trainer, reference_run(kind, accumulation, alpha=alpha))
