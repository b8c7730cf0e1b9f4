"""DeepSpeed's options and weights of other types: refused by name when the trainer is built, or let through."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from runs import make_args, make_trainer
from tiny import Net, make_model
from torch import nn
from torch.utils._pytree import tree_map_only

from hf_gnp.engines import refuse_unsupported
from hf_gnp.engines.options import unchecked_options


def refuse(tmp_path, config: dict[str, Any], allow_unchecked: bool = False) -> None:
    """`refuse_unsupported` for a DeepSpeed configuration, without DeepSpeed."""
    plugin = SimpleNamespace(hf_ds_config=HfDeepSpeedConfig(config))
    state = SimpleNamespace(deepspeed_plugin=plugin)
    kind = {"distributed_type": DistributedType.DEEPSPEED, "is_fsdp2": False, "parallelism_config": None}
    accelerator = SimpleNamespace(state=state, **kind)
    model, args = make_model("vit"), make_args(tmp_path)
    refuse_unsupported(accelerator, args, None, model, allow_unchecked=allow_unchecked)


def zero(stage: int = 3, **options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **options}}


WRONG = {
    "NVMe offload": zero(offload_param={"device": "nvme"}),
    "SuperOffload": zero(offload_optimizer={"device": "cpu", "super_offload": True}),
    "hpZ": zero(zero_hpz_partition_size=8),
    "MiCS": zero(mics_shard_size=8),
    "ZeRO.. quantisation": zero(zero_quantized_weights=True),
    "ZenFlow": zero(2, zenflow={"topk_ratio": 0.1}),
    "DeepCompile": zero() | {"compile": {"deepcompile": True}},
    "Apex AMP": zero() | {"amp": {"enabled": True}},
    "DeepSpeed's torch_autocast": zero() | {"torch_autocast": {"enabled": True}},
    "fp16 in ZeRO stage 0": zero(0) | {"fp16": {"enabled": True}},
    "AutoTP": zero() | {"tensor_parallel": {"autotp_size": 2}},
    "managed_gradient_accumulation=false": zero() | {"managed_gradient_accumulation": False},
    "the onebitadam optimizer": zero(1) | {"optimizer": {"type": "OneBitAdam"}},
}


@pytest.mark.parametrize("name", WRONG)
def test_an_option_that_is_wrong_is_refused_whatever_is_allowed(tmp_path, name):
    for allow_unchecked in (False, True):
        with pytest.raises(NotImplementedError, match=f"does not run with {name}.*gnp_alpha=0"):
            refuse(tmp_path, WRONG[name], allow_unchecked)


UNCHECKED = {
    "gradient_allreduce_op": zero() | {"gradient_allreduce_op": "sum"},
    "zero_optimization.some_day": zero(some_day=True),
    "zero_optimization.offload_optimizer.ratio": zero(offload_optimizer={"device": "cpu", "ratio": 0.5}),
    "data_efficiency.data_routing.enabled": {"data_efficiency": {"enabled": True, "data_routing": {"enabled": 1}}},
}


@pytest.mark.parametrize("key", UNCHECKED)
def test_an_option_that_nobody_checked_is_refused_by_name(tmp_path, key):
    assert key in list(unchecked_options(UNCHECKED[key]))
    first = next(unchecked_options(UNCHECKED[key]))
    with pytest.raises(NotImplementedError, match=f"option {first}, which was not checked.*gnp_allow_unchecked=True"):
        refuse(tmp_path, UNCHECKED[key])
    refuse(tmp_path, UNCHECKED[key], allow_unchecked=True)


def test_what_is_off_is_not_refused(tmp_path):
    off = {"elasticity": {"enabled": False, "max_train_batch_size": 8}, "amp": {"enabled": False}, "curriculum": None}
    refuse(tmp_path, zero(zero_hpz_partition_size=1, offload_optimizer={"device": "none"}) | off)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs" / "deepspeed").glob("*.json")))
def test_the_configurations_that_come_with_it_are_checked(path):
    assert list(unchecked_options(json.loads(path.read_text()))) == []


class Quantised(torch.Tensor):
    """A subclass that computes as a plain tensor does, and has no operations on lists, as torchao's for training."""

    @staticmethod
    def __new__(cls, plain: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype)

    def __init__(self, plain: torch.Tensor):
        self.plain = plain

    has_lists = False

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if "_foreach" in str(function) and not cls.has_lists:
            raise NotImplementedError(f"{function} of {cls.__name__}")
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.plain, (args, kwargs or {}))
        result = function(*args, **kwargs)
        is_same = function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default)
        return cls(result) if is_same else result


class WithLists(Quantised):
    has_lists = True


def test_trainable_weights_that_cannot_be_moved_are_refused_by_name(tmp_path):
    model = Net(nn.Tanh)
    linear = model.layers[0]
    linear.weight = nn.Parameter(Quantised(linear.weight.detach()))
    with pytest.raises(NotImplementedError, match=r"weights of type Quantised \(layers\.0\.weight\).*gnp_alpha=0"):
        make_trainer(tmp_path, "net", model=model)
    linear.weight.requires_grad_(False)  # below an adapter, say
    make_trainer(tmp_path, "net", model=model)
    linear.weight = nn.Parameter(WithLists(linear.weight.plain))
    make_trainer(tmp_path, "net", model=model)


class Whole(Net):
    """`Trainer` passes its loss on as it is, without a division that makes a new tensor."""

    def forward(self, x, labels, **kwargs):
        return super().forward(x, labels)


class OneBuffer(Whole):
    """Each forward writes over the loss of the one before, as a CUDA graph does."""

    last = None

    def forward(self, x, labels, **kwargs):
        outputs = super().forward(x, labels)
        if self.last is not None:
            self.last.data.fill_(float("nan"))
        self.last = outputs["loss"].detach()
        return outputs


def test_losses_outlive_the_next_pass(tmp_path):
    logs = []
    for cls in (Whole, OneBuffer):
        model = cls(nn.Tanh)
        settings = {"gradient_accumulation_steps": 2, "max_steps": 3, "average_tokens_across_devices": False}
        trainer = make_trainer(tmp_path, "net", model=model, **settings)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == logs[1]
