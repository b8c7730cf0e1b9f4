"""The `gnp_*` metrics of the optimizer steps between two logs."""

import torch
from accelerate import Accelerator

from .schedule import Penalty


class StepMetrics:
    """Sums over steps, kept on the device: nothing is read back until they are logged."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.steps, self.penalised_steps, self.grad_norms = 0, 0, 0.0
        self.penalty: Penalty | None = None
        self._is_counted = False
        self.losses: torch.Tensor | None = None
        self.fidelity: torch.Tensor | None = None

    def begin(self, penalty: Penalty | None) -> None:
        """A step begins, with the penalty that the schedule has for it."""
        self.steps += 1
        self.penalty = penalty
        self._is_counted = False

    def add(self, grad_norm: float, clean_loss: torch.Tensor, perturbed_loss: torch.Tensor) -> None:
        """
        A step was penalised, or one of its micro-batches that have a direction each: those of a step are summed. The
        loss of a micro-batch is its share of the step's, so the sums are means over micro-batches.

        Args:
            grad_norm: ‖g₁‖.
            clean_loss, perturbed_loss: Detached scalars of this rank, summed over the micro-batches as `Trainer`
                sums the loss that it logs.
        """
        losses = torch.stack([perturbed_loss, perturbed_loss - clean_loss]).float()
        self.losses = losses if self.losses is None else self.losses + losses
        self.grad_norms += grad_norm
        self.penalised_steps += not self._is_counted
        self._is_counted = True

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """What to log: the penalty of the last step, and means over penalised steps and over ranks. A collective."""
        if self.steps == 0:
            return {}
        logs = {
            "gnp_r": self.penalty.r if self.penalty else 0.0,
            "gnp_alpha": self.penalty.alpha if self.penalty else 0.0,
            "gnp_on": self.penalised_steps / self.steps,
        }
        if self.losses is not None:  # a step was penalised
            grad_norms = torch.tensor([self.grad_norms], device=self.losses.device)
            means = torch.cat([grad_norms, self.losses]) / self.penalised_steps
            means = accelerator.reduce(means, reduction="mean").tolist()
            logs |= dict(zip(("gnp_grad_norm", "gnp_perturbed_loss", "gnp_sharpness"), means, strict=True))
        if self.fidelity is not None:
            kept, moved = accelerator.reduce(self.fidelity, reduction="sum").tolist()
            if moved > 0:
                logs["gnp_fidelity"] = kept / moved
        self.reset()
        return logs
