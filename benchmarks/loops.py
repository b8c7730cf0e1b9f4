"""The contenders of cost.py by name, and the loops of those that are written by hand."""

from collections.abc import Iterator
from typing import Any

import torch
from contenders import RADIUS, Contender, LoopContender, Settings, TrainerContender
from torch import nn

from hf_gnp import GNPTrainer


def plain_loop(loop: LoopContender) -> Iterator[None]:
    optimizer = torch.optim.AdamW(loop.parameters, **loop.settings.optimizer_kwargs)
    while True:
        loop.backward()
        loop.clip()
        optimizer.step()
        optimizer.zero_grad()
        yield


def classic_sam_loop(loop: LoopContender) -> Iterator[None]:
    """SAM as it is usually written: a first step up, a second step from where one was, parameter by parameter."""
    optimizer = torch.optim.AdamW(loop.parameters, **loop.settings.optimizer_kwargs)
    old: dict[nn.Parameter, torch.Tensor] = {}

    @torch.no_grad()
    def first_step() -> None:
        norm = torch.stack([p.grad.norm() for p in loop.parameters]).norm()
        scale = RADIUS / (norm + 1e-12)
        for p in loop.parameters:
            old[p] = p.clone()
            p.add_(p.grad * scale)
        optimizer.zero_grad()

    @torch.no_grad()
    def second_step() -> None:
        for p in loop.parameters:
            p.copy_(old.pop(p))
        loop.clip()
        optimizer.step()
        optimizer.zero_grad()

    while True:
        loop.backward()
        first_step()
        loop.backward()
        second_step()
        yield


def pytorch_optimizer_loop(loop: LoopContender) -> Iterator[None]:
    try:
        from pytorch_optimizer import SAM
    except ImportError as error:
        raise ImportError("This contender needs `pip install pytorch_optimizer`; or choose --contenders.") from error

    kwargs = loop.settings.optimizer_kwargs
    optimizer = SAM(loop.parameters, torch.optim.AdamW, rho=RADIUS, **kwargs)

    def second_pass() -> None:
        loop.backward()
        loop.clip()

    while True:
        loop.backward()
        optimizer.step(second_pass)
        optimizer.zero_grad()
        yield


def _gnp(**kwargs: Any) -> dict[str, Any]:
    return {"cls": GNPTrainer, "gnp_r": RADIUS, **kwargs}


TRAINERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gnp_alpha_0": _gnp(gnp_alpha=0.0),  # the same work as plain: what it differs by is noise
    "gnp": _gnp(gnp_alpha=0.8),
    "sam": _gnp(gnp_alpha=1.0),
    "gnp_interval_2": _gnp(gnp_interval=2),
    "gnp_interval_5": _gnp(gnp_interval=5),
    "gnp_interval_10": _gnp(gnp_interval=10),
    "gnp_layer": _gnp(gnp_metric="layer"),  # the default
    "gnp_norm_only": _gnp(gnp_target_modules="norm"),
    "gnp_momentum": _gnp(gnp_alpha=1.0, gnp_direction="momentum"),
}
LOOPS = {"loop_plain": plain_loop, "loop_sam": classic_sam_loop, "pytorch_optimizer_sam": pytorch_optimizer_loop}
CONTENDERS = (*TRAINERS, *LOOPS)


def make_contender(name: str, settings: Settings, **kwargs: Any) -> Contender:
    """The contender called `name`; `kwargs` are for those that are trainers."""
    return (
        TrainerContender(settings, **TRAINERS[name], **kwargs)
        if name in TRAINERS
        else LoopContender(settings, LOOPS[name])
    )
