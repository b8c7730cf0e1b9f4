"""The random generators that a forward may draw from."""

import random
from typing import Any

import numpy as np
import torch
from torch import nn


class RandomState:
    """Record the global random generators of Python, NumPy, and torch on the CPU and on `devices`."""

    def __init__(self, devices: list[torch.device]):
        self.devices = devices
        self.python = random.getstate()
        self.numpy = np.random.get_state()
        self.cpu = torch.get_rng_state()
        self.accelerators = [torch.get_device_module(device).get_rng_state(*_index(device)) for device in devices]

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.accelerators, strict=True):
            torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # MPS has a single generator


def random_devices(trainer: Any, model: nn.Module) -> list[torch.device]:
    """Return the accelerators of the model's parameters, and the trainer's, where offloaded parameters compute."""
    found = {p.device for p in model.parameters()} | {trainer.accelerator.device}
    if trainer.args.n_gpu > 1:  # DataParallel runs replicas on every visible device
        found |= {torch.device("cuda", index) for index in range(trainer.args.n_gpu)}
    return sorted((device for device in found if device.type not in ("cpu", "meta")), key=str)
