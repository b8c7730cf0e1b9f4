"""One penalised step, out of engine, window, schedule and mix. It knows of the trainer what a window records."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .direction import Perturbation
from .engines import Engine, make_engine
from .foreign import ForeignGradient
from .interrupts import DeferredSignals
from .metrics import StepMetrics
from .replay.first_pass import is_called_by_training_step, replaced
from .replay.probe import not_logged, probe
from .replay.window import Deferred, MicroBatch, Window, first_rows
from .reuse import OrthogonalComponent
from .schedule import Penalty, Schedule


RunPass = Callable[[MicroBatch | Deferred], torch.Tensor]


class PenalisedSteps:
    """
    The steps of one run of the training loop, which begins with a new state and perhaps a new wrapping of the model.

    Args:
        trainer: Of it, the accelerator, the state and what `Window` records are used.
        schedule: The penalty of each step.
    """

    def __init__(self, trainer: Any, model: nn.Module, schedule: Schedule):
        self.trainer, self.model, self.state = trainer, model, trainer.state
        self.schedule = schedule
        self.metrics = StepMetrics()
        self.window = Window(trainer, model)
        self.engine: Engine = make_engine(
            trainer.accelerator, model, Perturbation.from_args(trainer.gnp_args, trainer.model), trainer.optimizer
        )
        self.step: int | None = None
        self.penalty: Penalty | None = None
        self.reuse = OrthogonalComponent(self.engine) if trainer.gnp_args.gnp_reuse else None
        self._first_passes = math.inf
        self._begins_penalised = False
        self._is_probed = False
        self._recorded = 0
        self._hooks = contextlib.ExitStack()
        self._foreign = ForeignGradient(self.engine, type(trainer).__name__)
        self._has_reached = False  # `Trainer.training_step`
        self._inputs: Any = None

    @property
    def is_perturbed(self) -> bool:
        return self.engine.is_perturbed

    @property
    def _perturbation(self) -> Perturbation:
        return self.engine.perturbation

    def begin_micro_batch(self, step: int, inputs: Any) -> None:
        """Before the first pass of each micro-batch of the step, whose `inputs` are as the data loader gave them."""
        if step != self.step:
            penalty = self._penalty_at(step)
            if self.step is not None and len(self.window) and self.penalty != penalty:
                self.close()
            self.step, self.penalty = step, penalty
            self.metrics.begin(self.penalty)
        if not len(self.window):
            perturbation = Perturbation.from_args(self.trainer.gnp_args, self.trainer.model)
            self.engine.begin_window(perturbation if self.penalty else perturbation.of_plain_step())
            self.close()
            micro_batches = self.trainer.current_gradient_accumulation_steps or 1
            self._first_passes = self._perturbation.first_passes(micro_batches)
            self._hooks.enter_context(replaced(self.trainer.accelerator, backward=self._backward))
            self._foreign.set_aside()
        elif inputs is self._inputs:
            raise NotImplementedError(called_twice(self.trainer))
        self._inputs = inputs

    def _penalty_at(self, step: int) -> Penalty | None:
        if self._begins_penalised:
            self._begins_penalised = False
            return self.schedule.strength(step)
        return self.schedule.at(step)

    def end_micro_batch(self) -> None:
        """`Trainer`'s loop goes on: the next inputs may be the same object, from a loader that repeats a batch."""
        self._inputs = None

    def resume_from(self, checkpoint: str | None) -> None:
        """Before the first step: what `gnp_reuse` kept. A run that resumes without begins with a penalised step."""
        if self.reuse is not None and checkpoint is not None:
            self._begins_penalised = not self.reuse.load(checkpoint)

    # The first pass.

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """Around a subclass's `training_step`: what `Trainer.training_step` computes in it is recorded."""
        self._recorded = len(self.window)
        marks = self.engine.gradient_marks()
        is_last = self._recorded + 1 == self._first_passes
        with self.engine.first_pass(is_last), replaced(self.trainer, compute_loss=self._compute_loss):
            yield
        if len(self.window) > self._recorded:
            self._has_reached = True
            self.window.drop_unfinished()
        elif marks != self.engine.gradient_marks() or (marks is None and not self._has_reached):
            raise NotImplementedError(never_reached(self.trainer))  # else a batch was skipped
        self._foreign.refuse()

    def end_first_pass(self, loss: torch.Tensor) -> None:
        """What `training_step` returned."""
        if len(self.window.micro_batches) > self._recorded:
            self.window.micro_batches[-1].loss = loss

    def _compute_loss(
        self, original: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not is_called_by_training_step():
            return original(model, inputs, *args, **kwargs)
        if len(self.window) > self._recorded:
            raise NotImplementedError(called_twice(self.trainer))
        items, steps = kwargs.get("num_items_in_batch"), self.trainer.current_gradient_accumulation_steps
        if len(self.window) >= self._first_passes:
            self.window.deferred.append(Deferred(inputs, items, steps))
            return torch.zeros((), device=self.trainer.accelerator.device, requires_grad=True)
        micro_batch = self.window.record(inputs, items, steps, self.penalty is not None)
        if not self._takes_rows:
            loss = original(model, inputs, *args, **kwargs)
        else:
            # A pass without a trace: that of the whole micro-batch is yet to come, at the moved weights.
            micro_batch.first_rows = first_rows(inputs, self._perturbation.first_rows)
            self._hooks.enter_context(self.window.gradients_beside_hidden())
            kwargs["num_items_in_batch"] = self._items_in([micro_batch.first_rows])
            with replaced(self.trainer, log=not_logged), self.engine.hidden_gradient():
                loss = original(model, micro_batch.first_rows, *args, **kwargs)
        micro_batch.forward_loss = loss.detach().clone()
        return loss

    def _items_in(self, batches: list[Any]) -> torch.Tensor | int | None:
        """The labels in some micro-batches, as `Trainer` counts those of a window: over all ranks. A collective."""
        return self.trainer._get_num_items_in_batch(batches, self.trainer.args.device)

    def _backward(self, original: Callable[..., Any], loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if is_called_by_training_step():
            if self.window.deferred:
                return  # of a loss that is yet to be computed
            self._foreign.before_backward()
            original(loss, *args, **kwargs)
            self.engine.after_backward()
            self._foreign.after_backward()
            self.window.micro_batches[-1].has_gradient = True
            if self._takes_rows:  # only now: backward asks whether buffers are as the forward left them
                self.window.tensors.end()
                next(self.window.replayed())
        else:
            self._foreign.backward(functools.partial(original, loss, *args, **kwargs))

    # The end of the window.

    @property
    def is_end_of_window(self) -> bool:
        """Whether a second pass follows now: on the last micro-batch of a step, or on each."""
        return self.trainer.accelerator.sync_gradients or self.engine.perturbation.is_per_micro_batch

    def end_window(self, run_pass: RunPass, noise_seed: int, measure: bool) -> torch.Tensor | None:
        """
        The second pass, if there is a penalty and a direction. If the step ends too, that of engines that step in
        backward; else the gradient is held for the rest of the step.

        Returns:
            What the losses that `training_step` returned lack of the window's, where some micro-batches had no first
            pass; else None.
        """
        engine, lacking = self.engine, None
        assert self.step is not None  # since `begin_micro_batch`
        with DeferredSignals():
            self._hooks.close()
            if not self.window.micro_batches:
                self._foreign.set_aside()
            if self.penalty is not None and len(self.window):
                lacking = self._penalise(self.penalty, run_pass, noise_seed, measure)
            elif self.reuse is not None and (strength := self.schedule.strength(self.step)) is not None:
                self.reuse.add(strength.alpha)
            self._foreign.add()
            if self.trainer.accelerator.sync_gradients:
                engine.finish()
            else:
                engine.hold_gradient()
        self.close()
        if not self.trainer.accelerator.sync_gradients and not engine.sets_gradients_aside():
            # In the middle of a step, and the next window would not see it.
            self._hooks.enter_context(replaced(self.trainer.accelerator, backward=self._backward))
        return lacking

    def _penalise(self, penalty: Penalty, run_pass: RunPass, noise_seed: int, measure: bool) -> torch.Tensor | None:
        if self._perturbation.is_momentum:
            _, losses = self._second_pass(run_pass, penalty, noise_seed, measure)
            if self.engine.has_direction:
                self.metrics.add()
            return _total(losses)
        # The first rows' pass is rewound already. One reading for both: the device computes on while nobody reads.
        compared = None if self._takes_rows else self.window.tensors.compare()
        norms, moved = self.engine.gradient_norms(compared)
        if not self._takes_rows:
            self.window.tensors.end(moved)
        ratio = self._ratio()
        clean_loss = self.window.loss()
        lacking = clean_loss * (ratio - 1) if self.window.deferred else None
        # What has had no pass yet gets one, also at weights that do not move: of these alone, that is a plain step.
        is_partial = bool(self.window.deferred) or self._takes_rows
        is_plain = is_partial and not self.engine.has_direction and math.isfinite(norms.gradient + norms.direction)
        if is_plain:
            penalty = Penalty(penalty.r, 1.0)
        elif not self.engine.wants_second_pass():
            return lacking
        if self.reuse is not None:
            self.reuse.keep_first()
        replayed, losses = self._second_pass(run_pass, penalty, noise_seed, measure, ratio)
        self.engine.mix(penalty.alpha)
        if self.reuse is not None:
            self.reuse.keep_orthogonal()
        if is_plain and not self._perturbation.is_per_rank:  # else other ranks have something to log together
            return lacking
        if not self._takes_rows:
            sharpness = (_total(replayed) - clean_loss) * ratio
            self.metrics.add(norms.gradient * ratio, _total(losses), sharpness)
        else:
            self.metrics.add(norms.gradient, _total(losses))
        return lacking

    @property
    def _takes_rows(self) -> bool:
        """Whether g₁ is that of a micro-batch's first rows. The same on all ranks, however many rows each has."""
        # Not in an incomplete window of a run that accumulates, whose inputs may have no rows.
        return self.trainer.args.gradient_accumulation_steps == 1 and self._perturbation.ascent_fraction < 1

    def _ratio(self) -> float:
        """What g₁ of the first passes lacks in size to that of the window: its tokens, or its micro-batches."""
        first, deferred = self.window.micro_batches, self.window.deferred
        if not deferred:
            return 1.0
        micro_batches: list[MicroBatch | Deferred] = [*first, *deferred]
        items = deferred[0].num_items_in_batch
        args, is_scaled = self.trainer.args, getattr(self.trainer, "loss_is_scaled_for_ga", None)
        # Of labels only where the loss is a mean over those of all ranks and of this window alone.
        is_global = args.average_tokens_across_devices or args.world_size == 1
        is_one_window = all(micro_batch.num_items_in_batch is items for micro_batch in micro_batches)
        first_items = None
        if items is not None and is_scaled is not False and is_global and is_one_window:
            first_items = self._items_in([micro_batch.inputs for micro_batch in first])
        if first_items is None:
            return len(micro_batches) / len(first)
        counts = [torch.as_tensor(count).flatten()[0].to(args.device) for count in (items, first_items)]
        of_all, of_first = torch.stack(counts).tolist()
        return of_all / of_first if of_first > 0 else 1.0

    def _second_pass(
        self, run_pass: RunPass, penalty: Penalty, noise_seed: int, measure: bool, ratio: float = 1.0
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """
        All micro-batches at the moved weights. Those that ran before leave no trace but their gradient; the others run
        for the first time.

        Returns:
            The losses of those that ran before, and of all.
        """
        engine, window = self.engine, self.window
        again: Iterable[MicroBatch] = window.replayed()
        first: Sequence[MicroBatch | Deferred] = tuple(window.deferred)
        if self._takes_rows:
            again, first = (), tuple(window.micro_batches)
        passes = len(first) if self._takes_rows else len(window)
        replayed: list[torch.Tensor] = []
        losses: list[torch.Tensor] = []
        with contextlib.ExitStack() as kept:
            if window.micro_batches and not self._takes_rows:
                kept.enter_context(window.kept())
                self._probe()
            with engine.perturbed(penalty.r, penalty.alpha, noise_seed, measure, ratio) as fidelity:
                of_again = {"compute_loss": self._compute_loss_again}
                for micro_batches, collected, methods in ((again, replayed, of_again), (first, losses, {})):
                    for micro_batch in micro_batches:
                        is_last = len(replayed) + len(losses) + 1 == passes
                        with engine.micro_batch(is_last), replaced(self.trainer, **methods):
                            # CUDA graphs write the next pass's loss over it.
                            collected.append(run_pass(micro_batch).clone())
                            engine.after_backward()
                    if first:
                        kept.close()
        if fidelity is not None:
            self.metrics.fidelity = fidelity.to(self.trainer.accelerator.device)
        return replayed, replayed + losses

    def _compute_loss_again(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # A backward of its own, for adversarial inputs or a regulariser, counted in the first pass; and it may end in
        # `zero_grad`, which would take g₁.
        with self.engine.hidden_gradient():
            return original(*args, **kwargs)

    def _probe(self) -> None:
        """Once a run: the window's first micro-batch again at θ must give the loss that it gave."""
        if not self._is_probed:
            self._is_probed = True
            engine, micro_batch = self.engine, next(self.window.replayed())
            with engine.hidden_gradient():
                probe(self.trainer, self.model, micro_batch, engine.probed(), engine.computes_in_16_bit())

    def abandon(self) -> None:
        """After any exception in a step: clean weights, no gradient, an empty window."""
        with DeferredSignals():
            self.close()
            self.engine.abandon()

    def close(self) -> None:
        """Forget all that belongs to one window, but the gradient."""
        self._hooks.close()
        self.engine.end_step()
        self.window.clear()
        self._foreign.clear()
        self._inputs = None


def replayed_step(trainer: Any, logs: bool = False) -> contextlib.AbstractContextManager[None]:
    """
    Around `Trainer.training_step` in a second pass: inputs are prepared already.

    Args:
        logs: Whether what is logged in it is logged; not what the first pass has logged.
    """
    silenced = {} if logs else {"log": not_logged}
    return replaced(trainer, _prepare_inputs=lambda original, inputs: inputs, **silenced)


def _total(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of at least one, in their order and dtype."""
    return functools.reduce(torch.add, losses)


def never_reached(trainer: Any) -> str:
    name = next(cls.__name__ for cls in type(trainer).__mro__ if _overrides_step(cls))
    return (
        f"{name}.training_step never reaches Trainer.training_step, whose loss the gradient-norm penalty runs again, "
        "so the penalty cannot be applied: call super().training_step(...) in it, or set gnp_alpha=0."
    )


def called_twice(trainer: Any) -> str:
    return (
        f"{type(trainer).__name__} calls training_step twice for one micro-batch, within an accumulation window: what "
        "changed between the calls (weights that an adversarial attack moved) would be gone in the second pass. Do so "
        "in a subclass of GNPTrainer, with gradient_accumulation_steps=1, or set gnp_alpha=0."
    )


def _overrides_step(cls: type) -> bool:
    return "training_step" in vars(cls) and not cls.__module__.startswith("hf_gnp.")
