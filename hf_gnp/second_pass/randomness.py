"""The random generators that a forward may draw from."""

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn


def global_generators(devices: list[torch.device]) -> list[Callable[[], Any]]:
    """Return functions that restore the global generators of Python, NumPy, and torch on the CPU and on `devices`."""
    restorers: list[Callable[[], Any]] = [
        functools.partial(random.setstate, random.getstate()),
        functools.partial(np.random.set_state, np.random.get_state()),
        functools.partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    for device in devices:
        module, index = torch.get_device_module(device), () if device.type == "mps" else (device,)  # MPS has one
        restorers.append(functools.partial(module.set_rng_state, module.get_rng_state(*index), *index))
    return restorers


def random_devices(trainer: Any, model: nn.Module) -> list[torch.device]:
    """Return the accelerators of the model's parameters, and the trainer's, where offloaded parameters compute."""
    found = {p.device for p in model.parameters()} | {trainer.accelerator.device}
    if trainer.args.n_gpu > 1:  # DataParallel runs replicas on every visible device
        found |= {torch.device("cuda", index) for index in range(trainer.args.n_gpu)}
    return sorted((device for device in found if device.type not in ("cpu", "meta")), key=str)
