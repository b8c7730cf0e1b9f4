"""Counts what the collectives of whole optimizer steps move."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback


class CountCollectives(TorchDispatchMode, TrainerCallback):
    """Bytes by collective, of the steps after the first (in which engines broadcast, and trace their parameters)."""

    first_step = 2

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function.__name__.split(".")[0].strip("_")
            tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
            self.bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return function(*args, **(kwargs or {}))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first_step:
            self.__enter__()
        if state.global_step == state.max_steps:
            self.__exit__(None, None, None)
