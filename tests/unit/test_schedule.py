"""When the penalty is on, with which r and α: the formulas, the cost, and resuming in the middle."""

import logging

import pytest
import torch
from runs import assert_identical, assert_matches_reference, logs_of, make_trainer, probe_flops, reference_run, run
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer

from hf_gnp import GNPTrainer
from hf_gnp.momentum import is_adaptive
from hf_gnp.schedule import Penalty, Schedule


R, ALPHA, STEPS, WARMUP = 0.05, 0.8, 12, 4


def ramp(step: int) -> float:
    return min(1.0, step / WARMUP)


SCHEDULES = {
    "constant": ({}, lambda step: (R, ALPHA)),
    "warmup-r": ({"gnp_warmup_type": "r", "gnp_warmup_steps": WARMUP}, lambda step: (R * ramp(step), ALPHA)),
    "warmup-lambda": ({"gnp_warmup_type": "lambda", "gnp_warmup_steps": WARMUP}, lambda step: (R, ALPHA * ramp(step))),
    "warmup-zero": (
        {"gnp_warmup_type": "zero", "gnp_warmup_steps": WARMUP},
        lambda step: (R, ALPHA if step >= WARMUP else 0.0),
    ),
    "warmup-fraction": (
        {"gnp_warmup_type": "r", "gnp_warmup_steps": WARMUP / STEPS},
        lambda step: (R * ramp(step), ALPHA),
    ),
    "late-phase": ({"gnp_start": 0.5}, lambda step: (R, ALPHA if step >= 6 else 0.0)),
    "early-phase": ({"gnp_end": 0.25}, lambda step: (R, ALPHA if step < 3 else 0.0)),
    "interval": ({"gnp_interval": 3}, lambda step: (R, ALPHA if step in (2, 5, 8, 11) else 0.0)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_r_and_alpha_of_each_step(tmp_path, name):
    arguments, penalty = SCHEDULES[name]
    trainer = make_trainer(tmp_path, "vit", gnp_r=R, **arguments)
    trainer.train()
    start, expected, reference_logs = reference_run("vit", 1, penalty=penalty)
    logs = logs_of(trainer, "loss", "gnp_r", "gnp_alpha", "gnp_on", "gnp_perturbed_loss")
    for step, reference_log in enumerate(reference_logs):
        r, alpha = penalty(step)
        is_on = r * alpha > 0
        assert logs["gnp_on"][step] == is_on
        assert (logs["gnp_r"][step], logs["gnp_alpha"][step]) == (pytest.approx((r, alpha)) if is_on else (0, 0))
        assert (logs["gnp_perturbed_loss"][step] is not None) == is_on
        assert logs["loss"][step] == pytest.approx(reference_log["loss"], rel=1e-5)
    if name == "constant":
        assert_matches_reference(trainer, (start, expected, reference_logs))


def test_default_warmup_steps(tmp_path):
    settings = {"lr_scheduler_type": "linear", "warmup_steps": WARMUP, "gnp_warmup_type": "r"}
    trainer = make_trainer(tmp_path, "vit", gnp_r=R, **settings)
    trainer.train()
    assert logs_of(trainer, "gnp_r")["gnp_r"] == pytest.approx([R * ramp(step) for step in range(STEPS)])


def test_probability():
    def chosen(seed: int) -> list[bool]:
        schedule = Schedule(R, ALPHA, 10_000, probability=0.3, seed=seed)
        return [schedule.at(step) is not None for step in range(10_000)]

    assert chosen(0) == chosen(0) != chosen(1)
    # 10,000 draws at p = 0.3 have a standard deviation of 46: five of them are passed once in two million seeds.
    assert abs(sum(chosen(0)) - 3000) < 5 * 46
    assert Schedule(R, ALPHA, 10, probability=1.0).at(3) == Penalty(R, ALPHA)


@pytest.mark.parametrize(
    "arguments, passes",
    [
        ({"gnp_interval": 2}, 1 + 1 / 2),
        ({"gnp_interval": 3}, 1 + 1 / 3),
        ({"gnp_probability": 0.5}, None),  # 1 + p on average: here as often as the schedule says
        ({"gnp_warmup_type": "zero", "gnp_warmup_steps": STEPS}, 1),
        ({"gnp_start": 0.5}, 1.5),
    ],
)
def test_counted_cost(tmp_path, arguments, passes):
    def flops(cls) -> tuple[int, float]:
        """Those of a run, and the share of its steps that were penalised."""
        trainer = make_trainer(tmp_path, "vit", cls, **arguments)
        with FlopCounterMode(display=False) as counter:
            trainer.train()
        return counter.get_total_flops(), sum(on or 0 for on in logs_of(trainer, "gnp_on")["gnp_on"]) / STEPS

    plain, _ = flops(Trainer)
    penalised, share = flops(GNPTrainer)
    assert 0 < share < 1 if passes is None else 1 + share == pytest.approx(passes)
    probe = probe_flops("vit") if share > 0 else 0  # at the first penalised step, if there is one
    assert penalised - probe == pytest.approx((1 + share) * plain)


def test_step_without_penalty_is_plain(tmp_path):
    """Bit for bit: a run whose penalty never comes on is plain training."""
    settings = {"optim": "adamw_torch", "gradient_accumulation_steps": 2, "max_steps": 5}
    off = run(make_trainer(tmp_path, "bert", gnp_interval=100, **settings))
    plain = run(make_trainer(tmp_path, "bert", Trainer, **settings))
    for log in off["logs"]:
        assert log.pop("gnp_on") == log.pop("gnp_r") == log.pop("gnp_alpha") == 0
    assert_identical(off, plain)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gnp_warmup_type": "r", "gnp_warmup_steps": 6},
        {"gnp_warmup_type": "lambda", "gnp_warmup_steps": 0.5},
        {"gnp_interval": 5},
        {"gnp_probability": 0.5},
        {"gnp_start": 0.25, "gnp_end": 0.75},
    ],
)
def test_schedules_resume_exactly(tmp_path, arguments):
    settings = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 4, **arguments}
    whole = run(make_trainer(tmp_path, "vit", **settings))
    resumed = run(make_trainer(tmp_path, "vit", **settings), resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_identical(resumed, whole)


@pytest.mark.parametrize(
    "settings, warns",
    [
        ({"optim": "adamw_torch", "warmup_steps": 3, "gnp_warmup_type": "none"}, True),
        ({"optim": "adamw_torch", "warmup_steps": 3}, False),
        ({"optim": "adamw_torch", "warmup_steps": 3, "gnp_warmup_type": "zero"}, False),
        ({"optim": "adamw_torch", "warmup_steps": 0}, False),
        ({"optim": "sgd", "warmup_steps": 3, "gnp_warmup_type": "none"}, False),
        ({"optim": "adamw_torch", "warmup_steps": 3, "gnp_warmup_type": "none", "gnp_alpha": 0.0}, False),
    ],
)
def test_missing_warmup_warns(tmp_path, caplog, settings, warns):
    """Adaptive optimizer, learning-rate warm-up, and no GNP warm-up (arXiv 2406.09723): once a run."""
    trainer = make_trainer(tmp_path, "bert", lr_scheduler_type="linear", max_steps=3, **settings)
    with caplog.at_level(logging.WARNING, logger="hf_gnp"):
        trainer.train()
    assert [("gnp_warmup_type" in record.getMessage()) for record in caplog.records].count(True) == warns


@pytest.mark.parametrize(
    "settings, chosen",
    [
        ({"optim": "adamw_torch", "warmup_steps": 3}, "zero"),
        ({"optim": "adamw_torch", "warmup_steps": 0.5}, "zero"),
        ({"optim": "adafactor", "warmup_steps": 3}, "zero"),
        ({"optim": "adamw_torch", "warmup_steps": 0}, "none"),
        ({"optim": "sgd", "warmup_steps": 3}, "none"),
    ],
)
def test_automatic_warmup(tmp_path, caplog, settings, chosen):
    """Bit for bit as the choice written out, and one line says which it is."""
    settings = {"lr_scheduler_type": "linear", "max_steps": 5, **settings}
    with caplog.at_level(logging.INFO, logger="hf_gnp"):
        auto = run(make_trainer(tmp_path, "bert", **settings))
    lines = [record.getMessage() for record in caplog.records if "gnp_warmup_type=auto" in record.getMessage()]
    assert len(lines) == 1
    assert f"gnp_warmup_type=auto: {chosen}" in lines[0]
    assert_identical(auto, run(make_trainer(tmp_path, "bert", gnp_warmup_type=chosen, **settings)))
    assert [log["gnp_on"] for log in auto["logs"]] == ([0, 0, 0, 1, 1] if chosen == "zero" else [1] * 5)


def test_schedule_is_the_same_on_every_rank():
    """Nothing but the arguments and the step go in."""
    schedules = [Schedule(R, ALPHA, STEPS, probability=0.5, seed=3) for _ in range(2)]
    torch.manual_seed(0)
    first = [schedules[0].at(step) for step in range(STEPS)]
    torch.manual_seed(1)
    assert first == [schedules[1].at(step) for step in range(STEPS)]


@pytest.mark.parametrize("share", [0.07, 0.14, 0.28, 0.55, 0.56])
def test_share_that_is_a_whole_step(share):
    """0.07 * 100 is a little more than 7 in floating point."""
    step = round(100 * share)
    begins, ends = Schedule(0.1, 1.0, 100, start=share), Schedule(0.1, 1.0, 100, end=share)
    assert [begins.at(step - 1), begins.at(step)] == [None, Penalty(0.1, 1.0)]
    assert [ends.at(step - 1), ends.at(step)] == [Penalty(0.1, 1.0), None]


@pytest.mark.parametrize("name", ["AdamW", "AdEMAMix", "CAME", "SOAP", "Adafactor", "RMSprop", "DistributedShampoo"])
def test_adaptive_optimizers(name):
    assert is_adaptive(type(name, (), {})())
    assert not is_adaptive(torch.optim.SGD([torch.zeros(1)], lr=0.1))
