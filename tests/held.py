"""What the penalty holds through the second pass."""

import torch
from runs import engine_of
from transformers import Trainer


def held_bytes(trainer: Trainer) -> int:
    """The bytes of all tensors in the lists of the engine of this run, but the weights and DeepSpeed's own lists."""
    engine = engine_of(trainer)
    of_deepspeed = {id(value) for value in vars(getattr(engine, "optimizer", torch)).values()}
    lists = [value for value in vars(engine).values() if isinstance(value, list) and id(value) not in of_deepspeed]
    tensors = [t for value in lists for t in value]
    storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in weights}.values())


def record_held_bytes(trainer: Trainer) -> list[int]:
    """A list that gets the bytes held at the start of each forward in training mode."""
    held: list[int] = []

    def record(module: torch.nn.Module, _) -> None:
        if module.training:
            held.append(held_bytes(trainer))

    trainer.model.register_forward_pre_hook(record)
    return held
