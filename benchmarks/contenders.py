"""
What cost.py compares: `Trainer`, `GNPTrainer`, and the loops that a user would write instead.

A contender does one optimizer step when asked to, so that steps of all of them alternate in one process.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_gnp import GNPTrainingArguments


Batch = dict[str, torch.Tensor]
RADIUS, LEARNING_RATE, MAX_GRAD_NORM = 0.05, 1e-5, 1.0


@dataclass(frozen=True)
class Settings:
    """What is the same for all contenders."""

    make_model: Callable[[], nn.Module]
    batch: Batch
    device: torch.device
    steps: int
    output_dir: str
    bf16: bool = False
    accumulation: int = 1
    optimizer: str = "foreach"

    @property
    def batch_size(self) -> int:
        return len(self.batch["labels"])

    @property
    def optimizer_kwargs(self) -> dict[str, Any]:
        return {"lr": LEARNING_RATE, "weight_decay": 0.0, self.optimizer: True}


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step: by the clock, and of all threads of this process, which others disturb less."""

    wall: float
    cpu: float


class Contender:
    """Calls `step` in a place of its own: `run_step` is for subclasses, which time with `start` and `stop`."""

    interval = 1
    passes: list[float] | None = None

    def __init__(self, settings: Settings):
        self.settings = settings

    def step(self, context: AbstractContextManager | None = None) -> Step:
        """Do one optimizer step inside `context`."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the model."""

    def now(self) -> tuple[float, float]:
        if self.settings.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


class SameBatch(Dataset):
    """One batch that lies on the device already, as often as asked for: what is timed is training, not loading."""

    def __init__(self, batch: Batch, length: int):
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.batch


def make_arguments(cls: type[Trainer], **kwargs: Any) -> TrainingArguments:
    """Those of `cls` for steps that clip, and write, log and load nothing."""
    args_cls = TrainingArguments if cls is Trainer else GNPTrainingArguments
    return args_cls(
        max_grad_norm=MAX_GRAD_NORM,
        lr_scheduler_type="constant",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **kwargs,
    )


class TrainerContender(Contender):
    """
    The real `train()` in a thread that waits at the end of each step until it is asked for the next.

    A step is a whole turn of the training loop, from one `on_step_end` to the next: batch, passes, clipping,
    optimizer, scheduler, callbacks.
    """

    def __init__(self, settings: Settings, cls: type[Trainer] = Trainer, time_passes: bool = False, **kwargs: Any):
        super().__init__(settings)
        self.interval = kwargs.get("gnp_interval", 1)
        self._contexts: queue.SimpleQueue = queue.SimpleQueue()
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        args = make_arguments(
            cls,
            output_dir=settings.output_dir,
            max_steps=settings.steps + 1,  # one that `close` ends before
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            bf16=settings.bf16,
            use_cpu=settings.device.type == "cpu",
            **kwargs,
        )
        self._trainer = cls(
            model=settings.make_model(),
            args=args,
            train_dataset=SameBatch(settings.batch, args.max_steps * settings.batch_size * settings.accumulation),
            data_collator=lambda batch: batch,
            optimizer_cls_and_kwargs=(torch.optim.AdamW, settings.optimizer_kwargs),
            callbacks=[_Baton(self)],
        )
        self._trainer.remove_callback(PrinterCallback)
        if time_passes:
            self._time_passes()
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()
        self._result()  # the next trainer resets accelerate's global state, which this one needs to begin

    def step(self, context: AbstractContextManager | None = None) -> Step:
        self._contexts.put(context or nullcontext())
        return self._result()

    def close(self) -> None:
        self._contexts.put(None)
        self._thread.join()
        self._trainer = None

    def _result(self) -> Step | None:
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def _train(self) -> None:
        try:
            self._trainer.train()
        except BaseException as error:
            self._results.put(error)

    def _time_passes(self) -> None:
        """Note the seconds of the forward and backward passes of each step in `passes`."""
        self.passes = []
        inner, seconds = self._trainer.training_step, []

        def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
            start = self.now()[0]
            loss = inner(*args, **kwargs)
            seconds.append(self.now()[0] - start)
            if len(seconds) == self.settings.accumulation:
                self.passes.append(sum(seconds))
                seconds.clear()
            return loss

        self._trainer.training_step = training_step


class _Baton(TrainerCallback):
    """Waits in the thread of `train()` for its turn, and times what lies between two waits."""

    def __init__(self, contender: TrainerContender):
        self.contender, self.context, self.start = contender, None, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.contender._results.put(None)
        return self._wait(control)

    def on_step_end(self, args, state, control, **kwargs):
        wall, cpu = (now - start for now, start in zip(self.contender.now(), self.start, strict=True))
        self.context.__exit__(None, None, None)
        self.contender._results.put(Step(wall, cpu))
        return self._wait(control)

    def _wait(self, control):
        self.context = self.contender._contexts.get()
        if self.context is None:
            control.should_training_stop = True
        else:
            self.context.__enter__()
            self.start = self.contender.now()
        return control


class LoopContender(Contender):
    """
    A loop written by hand, with the same optimizer, clipping and precision, and nothing that `Trainer` does besides.

    Args:
        settings: Those of all contenders.
        loop: A generator function of this class, one `yield` an optimizer step.
    """

    def __init__(self, settings: Settings, loop: Callable[["LoopContender"], Iterator[None]]):
        super().__init__(settings)
        self.model = settings.make_model().to(settings.device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._steps = loop(self)

    def step(self, context: AbstractContextManager | None = None) -> Step:
        with context or nullcontext():
            start = self.now()
            next(self._steps)
            wall, cpu = (now - before for now, before in zip(self.now(), start, strict=True))
        return Step(wall, cpu)

    def close(self) -> None:
        self._steps.close()
        self.model, self.parameters = None, []

    def backward(self) -> None:
        """The passes of one accumulation window."""
        for _ in range(self.settings.accumulation):
            with torch.autocast(self.settings.device.type, torch.bfloat16, enabled=self.settings.bf16):
                loss = self.model(**self.settings.batch).loss
            (loss / self.settings.accumulation).backward()

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
