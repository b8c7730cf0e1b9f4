"""Copies of the inputs. A first pass may write into its inputs: some stock models clamp them in place."""

import copy
from collections import UserDict
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


def copied(inputs: Any, copies: dict[int, Any] | None = None) -> Any:
    """
    Return inputs with copies of their tensors and arrays, in new mappings, lists, tuples and dataclasses.

    Parameters and other objects are not copied. A tensor in two places is copied once, by its id in `copies`.
    """
    copies = {} if copies is None else copies
    if isinstance(inputs, nn.Parameter):
        return inputs
    if isinstance(inputs, torch.Tensor | np.ndarray):
        if getattr(inputs, "grad_fn", None) is not None:
            raise NotImplementedError(
                "The inputs of compute_loss have a graph, which cannot be computed again at perturbed weights. Make "
                "them in compute_loss or in the model's forward, detach them, or set gnp_alpha=0."
            )
        if id(inputs) not in copies:
            if isinstance(inputs, np.ndarray):
                copies[id(inputs)] = inputs.copy()
            else:
                copies[id(inputs)] = inputs.detach().clone().requires_grad_(inputs.requires_grad)
        return copies[id(inputs)]
    if isinstance(inputs, dict | UserDict):  # keeps attributes, such as those of a BatchEncoding
        result: Any = copy.copy(inputs)
        for key, value in inputs.items():
            result[key] = copied(value, copies)
        return result
    if isinstance(inputs, Mapping):
        kind: Any = type(inputs)
        return kind({key: copied(value, copies) for key, value in inputs.items()})
    if isinstance(inputs, tuple | list):
        values = [copied(value, copies) for value in inputs]
        return type(inputs)(*values) if hasattr(inputs, "_fields") else type(inputs)(values)
    if is_dataclass(inputs) and not isinstance(inputs, type):
        result = copy.copy(inputs)
        for field in fields(inputs):
            object.__setattr__(result, field.name, copied(getattr(inputs, field.name), copies))
        return result
    return inputs
