"""Two thousand steps with evaluation, checkpoints, batches that run out of memory, and Ctrl-C anywhere."""

import contextlib
import gc
import json
import math
import os
import random
import signal
import threading
import traceback
from pathlib import Path

import pytest
import torch
from runs import MICRO_BATCH, is_perturbed, make_trainer, skipping
from tiny import Net, collate, flat_weights, make_data
from transformers import TrainerCallback

from hf_gnp import GNPTrainer


STEPS, ACCUMULATION, R, LEARNING_RATE = 2000, 2, 0.05, 0.01
INTERRUPTIONS = 12
DATA = make_data("net", STEPS * ACCUMULATION * MICRO_BATCH)
FIRST, SECOND = 0, 1


def fails_in(x: torch.Tensor) -> int | None:
    """The pass in which a batch runs out of memory, if any: by its content, so that a resumed run does the same."""
    return {0: FIRST, 1: SECOND}.get(int(abs(x[0, 0].item()) * 1e4) % 25)


class Unlucky(Net):
    trainer = None

    def forward(self, x, labels):
        if self.training and fails_in(x) == (SECOND if is_perturbed(self.trainer) else FIRST):
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x, labels)


class Watch(TrainerCallback):
    """The weights after each step, how many tensors are alive now and then, and Ctrl-C soon after a step begins."""

    def __init__(self):
        self.weights, self.live = {}, []
        self.rng, self.interrupt_at, self.timer = random.Random(0), None, None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.interrupt_at is not None and state.global_step >= self.interrupt_at:
            self.interrupt_at += 25  # again, if Python drops the exception: it does where it comes in a destructor
            self.timer = threading.Timer(0.02 * self.rng.random(), os.kill, (os.getpid(), signal.SIGINT))
            self.timer.start()

    def calm(self):
        self.interrupt_at = None
        if self.timer is not None:
            self.timer.cancel()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = flat_weights(model)
        if state.global_step % 250 in (2, 3):  # a step with and without what is logged
            gc.collect()
            self.live.append(
                sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()) - len(self.weights)
            )


def reference_weights() -> list[torch.Tensor]:
    """SAM by hand, in the library's order of operations, the windows of which a batch failed left out."""
    model = Net()
    parameters = list(model.parameters())
    weights = [flat_weights(model)]

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            (model(**batch)["loss"] / ACCUMULATION).backward()
        return [p.grad for p in parameters]

    batches = [collate(DATA[i : i + MICRO_BATCH]) for i in range(0, len(DATA), MICRO_BATCH)]
    for start in range(0, len(batches), ACCUMULATION):
        window = batches[start : start + ACCUMULATION]
        # What fails in the first pass of its first batch leaves a window of the second alone.
        failing = [fails_in(batch["x"]) for batch in window]
        if failing[0] == FIRST and failing[1] is None:
            window = window[1:]
        if failing == [None, None] or len(window) == 1:
            first = gradients(window)
            norm = math.sqrt(torch.stack(torch._foreach_norm(first)).square().sum().item())
            kept = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                torch._foreach_add_(parameters, first, alpha=R / norm)
            second = gradients(window)
            with torch.no_grad():
                torch._foreach_copy_(parameters, kept)
                torch._foreach_add_(parameters, second, alpha=-LEARNING_RATE)
        weights.append(flat_weights(model))
    return weights


def newest_checkpoint(folder: Path) -> str | None:
    """The last that is whole: its state is written last, and Ctrl-C may come before, or half way."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            json.loads((checkpoint / "trainer_state.json").read_text())
            return str(checkpoint)
    return None


def writes_weights(error: BaseException) -> bool:
    """Whether it came where torch's optimizer or `Trainer`'s loading write one weight after the other."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any("torch/optim/" in code.co_filename or code.co_name == "_load_from_checkpoint" for code in frames)


@pytest.fixture
def ctrl_c_is_not_ignored():
    """As it is in what a script starts in the background, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c_is_not_ignored")
def test_long_run_with_every_mishap(tmp_path):
    expected = reference_weights()
    watch, interrupted = Watch(), 0
    while True:
        model = Unlucky()
        trainer = make_trainer(
            tmp_path,
            "net",
            skipping(GNPTrainer),
            model=model,
            data=DATA,
            callbacks=[watch],
            eval_dataset=DATA[:8],
            gnp_alpha=1.0,
            gnp_r=R,
            gradient_accumulation_steps=ACCUMULATION,
            learning_rate=LEARNING_RATE,
            max_grad_norm=0,
            logging_steps=100,
            eval_strategy="steps",
            eval_steps=250,
            save_strategy="steps",
            save_steps=50,
            save_total_limit=2,
        )
        model.trainer = trainer
        watch.live.clear()
        checkpoint = newest_checkpoint(tmp_path)
        if interrupted < INTERRUPTIONS:
            done = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
            watch.interrupt_at = done + watch.rng.randrange(5, 100)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            break
        except KeyboardInterrupt as error:
            interrupted += 1
            # Those of some step: never moved, never between two.
            assert writes_weights(error) or any(torch.equal(flat_weights(model), weights) for weights in expected)
            trainer.save_model(tmp_path / "saved")
        finally:
            watch.calm()
            model.trainer = None
    assert interrupted == INTERRUPTIONS
    assert sorted(watch.weights) == list(range(1, STEPS + 1))
    different = [step for step, weights in watch.weights.items() if not torch.equal(weights, expected[step])]
    assert different == []
    assert len(watch.live) >= 4
    assert max(watch.live[2:]) <= max(watch.live[:2])
