"""The `gnp_*` metrics of the penalised steps between two logs."""

import torch
from accelerate import Accelerator


class StepMetrics:
    """Sums over penalised steps, kept on the device: nothing is read back until they are logged."""

    names = ("gnp_perturbed_loss", "gnp_sharpness")

    def __init__(self):
        self.steps = 0
        self._norms = 0.0
        self._losses: torch.Tensor | None = None

    def add(self, grad_norm: float, clean_loss: torch.Tensor, perturbed_loss: torch.Tensor) -> None:
        """
        Add one step.

        Args:
            grad_norm: ‖g₁‖, global.
            clean_loss, perturbed_loss: Detached scalars of this rank, summed over the micro-batches as `Trainer`
                sums the loss that it logs.
        """
        losses = torch.stack([perturbed_loss, perturbed_loss - clean_loss]).float()
        self._losses = losses if self._losses is None else self._losses + losses
        self._norms += grad_norm
        self.steps += 1

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over steps and ranks since the last call; empty if no step was penalised. A collective."""
        if self.steps == 0:
            return {}
        losses = accelerator.reduce(self._losses / self.steps, reduction="mean").tolist()
        logs = {"gnp_grad_norm": self._norms / self.steps} | dict(zip(self.names, losses, strict=True))
        self.steps, self._norms, self._losses = 0, 0.0, None
        return logs
