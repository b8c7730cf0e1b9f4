"""The model as the engine runs it, in evaluation mode, and what a measurement leaves as it was."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_gnp.engines import refuse_engine
from hf_gnp.engines.dtensors import gradients_hidden
from hf_gnp.replay.buffers import RunningTensors, addresses, budget_of
from hf_gnp.replay.contents import Held
from hf_gnp.replay.owners import (
    find_large_tensors,
    find_modules,
    find_owners,
    find_parameters_beside,
    find_trained,
)
from hf_gnp.replay.randomness import RandomState, random_devices
from hf_gnp.replay.side_effects import PythonState


FP16 = (
    "Sharpness is not measured in fp16: a Hessian-vector product is the small difference of two gradients, and fp16 "
    "has neither the range for such gradients without a loss scale (below 6e-8 they are 0) nor the digits for their "
    "difference. Load the model in fp32 or bf16."
)


def refuse_unsupported(trainer: Any) -> None:
    """Raise where a gradient would not be that of the mean loss, or weights cannot be moved."""
    accelerator = trainer.accelerator
    deepspeed_config = getattr(accelerator.deepspeed_plugin, "hf_ds_config", None)
    in_deepspeed = deepspeed_config is not None and deepspeed_config.get_value("fp16.enabled") is True
    parameters = trainer.model.parameters()
    if accelerator.mixed_precision == "fp16" or in_deepspeed or any(p.dtype == torch.float16 for p in parameters):
        raise ValueError(FP16)
    # Options that were not checked pass: the gradient at θ itself is DeepSpeed's own.
    refuse_engine(accelerator, trainer.model, "Sharpness cannot be measured with {}.", allow_unchecked=True)
    if trainer.args.n_gpu > 1:
        raise NotImplementedError(
            "Sharpness cannot be measured with DataParallel: start one process a GPU (torchrun)."
        )
    if trainer.get_tp_size() > 1:
        raise NotImplementedError("Sharpness cannot be measured with tensor parallelism: use FSDP2 or DeepSpeed ZeRO.")
    if trainer.is_in_train and not accelerator.sync_gradients:
        raise RuntimeError("Sharpness is measured between optimizer steps, not between the micro-batches of one.")


@contextlib.contextmanager
def prepared_model(trainer: Any) -> Iterator[nn.Module]:
    """The model wrapped for the engine: as `train` left it, or for the time of the measurement."""
    accelerator = trainer.accelerator
    needs_optimizer = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if trainer.model_wrapped is not trainer.model or (accelerator._models and accelerator.num_processes == 1):
        wrapped = trainer.model_wrapped
        if trainer.is_deepspeed_enabled and getattr(wrapped, "optimizer", None) is None:
            raise RuntimeError(_too_early("DeepSpeed"))
        yield wrapped
        return
    if trainer.is_fsdp_enabled and trainer.optimizer is not None and accelerator._models:
        yield trainer.model_wrapped  # FSDP shards the model itself
        return
    if needs_optimizer:
        raise RuntimeError(_too_early("DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"))
    attributes, models = dict(vars(trainer.model)), list(accelerator._models)
    try:
        if getattr(trainer.model, "is_distributed_loading_by_transformers", False):  # older releases have no such name
            yield accelerator.prepare_model(trainer.model, device_placement=False, evaluation_mode=True)
        else:
            yield accelerator.prepare_model(trainer.model)
    finally:
        accelerator._models[:] = models
        for name in ("forward", "_original_forward"):  # where accelerate puts autocast
            if name in attributes:
                setattr(trainer.model, name, attributes[name])
            else:
                vars(trainer.model).pop(name, None)


def _too_early(engine: str) -> str:
    return (
        f"{engine} shards a model together with its optimizer, which `train` makes: call measure_sharpness during or "
        "after training (SharpnessCallback does), or on one process before it."
    )


@contextlib.contextmanager
def kept_generators(trainer: Any, model: nn.Module) -> Iterator[None]:
    """On leaving, random generators stand where they stood: a collator may draw from them, too."""
    state = RandomState(random_devices(trainer, model))
    try:
        yield
    finally:
        state.restore()


class UntouchedState:
    """All that a forward in evaluation mode may move beside a gradient: put back after each pass, and at the end."""

    def __init__(self, trainer: Any, model: nn.Module):
        self._tensors = RunningTensors()
        trained = find_trained(trainer)
        owners = find_owners(trainer)
        self._tensors.start(find_modules(owners), trained, find_large_tensors(owners))
        self._random_state = RandomState(random_devices(trainer, model))
        moved = addresses(tensor for parameter in trained for tensor in (parameter, parameter.grad))
        self._python_state = PythonState(owners, moved, Held(budget_of(trained)))
        self._beside, self._hidden = find_parameters_beside(trainer, owners, trained), contextlib.ExitStack()
        self._model, self._training = model, [(module, module.training) for module in model.modules()]

    def begin(self) -> None:
        self._model.eval()
        self._hidden.enter_context(gradients_hidden(self._beside))

    def put_back(self) -> None:
        self._tensors.rewind()
        self._random_state.restore()
        self._python_state.put_back()

    def end(self) -> None:
        self.put_back()
        self._hidden.close()
        for module, training in self._training:
            module.training = training
