"""The prepared model, and the state that a measurement restores."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_gnp.engines import refuse_engine
from hf_gnp.second_pass.window import StateAtHand
from hf_gnp.signals import DeferredSignals
from hf_gnp.tensors import gradients_hidden


FP16 = (
    "Sharpness is not measured in fp16: a Hessian-vector product is the small difference of two gradients, and fp16 "
    "has neither the range for such gradients without a loss scale (below 6e-8 they are 0) nor the digits for their "
    "difference. Load the model in fp32 or bf16."
)


def refuse_unsupported(trainer: Any) -> None:
    """Raise an error where a gradient would not be that of the mean loss, or where weights cannot be moved."""
    accelerator = trainer.accelerator
    config = getattr(accelerator.deepspeed_plugin, "hf_ds_config", None)
    is_fp16 = accelerator.mixed_precision == "fp16" or (config and config.get_value("fp16.enabled") is True)
    if is_fp16 or any(parameter.dtype == torch.float16 for parameter in trainer.model.parameters()):
        raise ValueError(FP16)
    sentence = "Sharpness cannot be measured with {}."
    refuse_engine(accelerator, trainer.model, sentence)
    if trainer.args.n_gpu > 1:
        raise NotImplementedError(sentence.format("DataParallel: start one process a GPU (torchrun)"))
    if trainer.get_tp_size() > 1:
        raise NotImplementedError(sentence.format("tensor parallelism: use FSDP2 or DeepSpeed ZeRO"))
    if trainer.is_in_train and not accelerator.sync_gradients:
        raise RuntimeError("Sharpness is measured between optimizer steps, not between the micro-batches of one.")


@contextlib.contextmanager
def prepared_model(trainer: Any) -> Iterator[nn.Module]:
    """Yield the model as `train` prepared it. Before `train`, prepare it for this context."""
    accelerator, model = trainer.accelerator, trainer.model
    if _is_prepared(trainer):
        yield trainer.model_wrapped
        return
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise RuntimeError(
            f"{'DeepSpeed' if trainer.is_deepspeed_enabled else 'FSDP'} shards a model together with its optimizer, "
            "which `train` makes: measure during or after training (SharpnessCallback does), or before it on one "
            "process."
        )
    attributes, models = dict(vars(model)), list(accelerator._models)
    kwargs = {}
    if getattr(model, "is_distributed_loading_by_transformers", False):  # it is sharded and placed
        kwargs = {"device_placement": False, "evaluation_mode": True}
    try:
        yield accelerator.prepare_model(model, **kwargs)
    finally:
        accelerator._models[:] = models
        for name in ("forward", "_original_forward"):  # accelerate sets them for autocast
            vars(model).pop(name, None)
            if name in attributes:
                setattr(model, name, attributes[name])


def _is_prepared(trainer: Any) -> bool:
    """Decide whether the model is prepared for a backward pass. `evaluate` prepares it for forward passes alone."""
    if trainer.is_deepspeed_enabled:
        return getattr(trainer.model_wrapped, "optimizer", None) is not None
    if trainer.model_wrapped is not trainer.model:
        return True
    if not trainer.accelerator._models:
        return False
    return trainer.optimizer is not None if trainer.is_fsdp_enabled else trainer.accelerator.num_processes == 1


@contextlib.contextmanager
def left_as_found(trainer: Any, model: nn.Module, training: bool) -> Iterator[StateAtHand]:
    """Set the model to training or evaluation mode. On leaving, restore the modes and the state."""
    state, modes = StateAtHand(trainer, model), [(module, module.training) for module in model.modules()]
    try:
        with gradients_hidden(state.found.others):
            model.train(training)
            yield state
    finally:
        with DeferredSignals():
            state.put_back()
            for module, is_training in modes:
                module.training = is_training
