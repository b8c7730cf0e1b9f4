"""What is refused by name when the trainer is built: options of DeepSpeed, types of weights, optimizers, engines."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, DistributedType
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from runs import make_args, make_trainer
from tiny import Net, make_model
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import TrainingArguments

from hf_gnp.engines import refuse_unsupported
from hf_gnp.engines.support import unchecked_options
from hf_gnp.perturbation import Perturbation


def refuse(tmp_path, config: dict[str, Any]) -> None:
    """`refuse_unsupported` for a DeepSpeed configuration, without DeepSpeed."""
    plugin = SimpleNamespace(hf_ds_config=HfDeepSpeedConfig(config))
    state = SimpleNamespace(deepspeed_plugin=plugin)
    kind = {"distributed_type": DistributedType.DEEPSPEED, "is_fsdp2": False, "parallelism_config": None}
    accelerator = SimpleNamespace(state=state, **kind)
    model, args = make_model("vit"), make_args(tmp_path)
    refuse_unsupported(accelerator, args, None, model, Perturbation())


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
    "fp16 in ZeRO stage 0": zero(0) | {"fp16": {"enabled": True}},
    "AutoTP": zero() | {"tensor_parallel": {"autotp_size": 2}},
    "managed_gradient_accumulation=false": zero() | {"managed_gradient_accumulation": False},
    "the onebitadam optimizer": zero(1) | {"optimizer": {"type": "OneBitAdam"}},
}


# Options that are on as a number.
AS_NUMBERS = [zero(zero_quantized_weights=1), zero(mics_shard_size=1), zero() | {"compile": {"deepcompile": 1}}]


@pytest.mark.parametrize("name, config", [*WRONG.items(), *((".*", config) for config in AS_NUMBERS)])
def test_wrong_option_is_refused(tmp_path, name, config):
    with pytest.raises(NotImplementedError, match=f"does not run with {name}.*gnp_alpha=0"):
        refuse(tmp_path, config)


UNCHECKED = {
    "gradient_allreduce_op": zero() | {"gradient_allreduce_op": "sum"},
    "zero_optimization.some_day": zero(some_day=True),
    "zero_optimization.offload_optimizer.ratio": zero(offload_optimizer={"device": "cpu", "ratio": 0.5}),
    "data_efficiency.data_routing.enabled": {"data_efficiency": {"enabled": True, "data_routing": {"enabled": 1}}},
}


@pytest.mark.parametrize("key", UNCHECKED)
def test_unchecked_option_is_named(key):
    assert key in list(unchecked_options(UNCHECKED[key]))


def test_option_that_is_off_is_accepted(tmp_path):
    off = {"elasticity": {"enabled": False, "max_train_batch_size": 8}, "amp": {"enabled": False}, "curriculum": None}
    refuse(tmp_path, zero(zero_hpz_partition_size=1, offload_optimizer={"device": "none"}) | off)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json")))
def test_own_configs_are_checked(path):
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


def test_weights_of_other_types_are_refused(tmp_path):
    model = Net()
    linear = model.layers[0]
    linear.weight = nn.Parameter(Quantised(linear.weight.detach()))
    with pytest.raises(NotImplementedError, match=r"weights of type Quantised \(layers\.0\.weight\).*gnp_alpha=0"):
        make_trainer(tmp_path, "net", model=model)
    linear.weight.requires_grad_(False)  # below an adapter, say
    make_trainer(tmp_path, "net", model=model)
    linear.weight = nn.Parameter(WithLists(linear.weight.plain))
    make_trainer(tmp_path, "net", model=model)


# --- Optimizers and engines ---

INSIDE_BACKWARD = [
    "lomo",
    "adalomo",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
]


@pytest.mark.parametrize("optim", INSIDE_BACKWARD)
def test_optimizer_inside_backward_is_refused(tmp_path, optim):
    with pytest.raises(ValueError, match=f"optim={optim} .*inside backward.*gnp_alpha=0"):
        make_trainer(tmp_path, "vit", optim=optim, optim_target_modules=["attention"])
    make_trainer(tmp_path, "vit", optim=optim, optim_target_modules=["attention"], gnp_alpha=0.0)


class Lomo(torch.optim.SGD):
    """By its name the optimizer of lomo_optim."""


@pytest.mark.parametrize("option", ["optimizers", "optimizer_cls_and_kwargs"])
def test_own_optimizer_inside_backward_is_refused(tmp_path, option):
    model = make_model("vit")
    values = {"optimizers": (Lomo(model.parameters(), lr=0.1), None), "optimizer_cls_and_kwargs": (Lomo, {"lr": 0.1})}
    with pytest.raises(ValueError, match=r"optim=Lomo .*inside backward"):
        make_trainer(tmp_path, "vit", model=model, **{option: values[option]})


def refuse_engine(args: TrainingArguments, **accelerator) -> None:
    """`refuse_unsupported` for a supported accelerator, but for the attributes given."""
    supported = {"distributed_type": DistributedType.NO, "is_fsdp2": False, "parallelism_config": None}
    fake = SimpleNamespace(**{"state": SimpleNamespace(deepspeed_plugin=None), **supported, **accelerator})
    refuse_unsupported(fake, args, None, make_model("vit"), Perturbation())


@pytest.mark.parametrize(
    ("accelerator", "message"),
    [
        ({"distributed_type": DistributedType.XLA}, "XLA"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "MEGATRON_LM: use DDP"),
        ({"distributed_type": DistributedType.FSDP}, "FSDP version 1"),
        ({"ddp_handler": DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.POWER_SGD)}, "PowerSGD"),
        ({"ddp_handler": DistributedDataParallelKwargs(comm_hook="batched_power_sgd")}, "PowerSGD"),
        ({"parallelism_config": SimpleNamespace(cp_enabled=True, sp_enabled=False)}, "context .*parallelism"),
        (
            {"parallelism_config": SimpleNamespace(cp_enabled=False, sp_enabled=True)},
            "sequence parallelism but under ZeRO-3",
        ),
    ],
)
def test_engine_is_refused(tmp_path, accelerator, message):
    with pytest.raises(NotImplementedError, match=f"{message}.*gnp_alpha=0"):
        refuse_engine(make_args(tmp_path), **accelerator)


@pytest.mark.parametrize(
    "accelerator",
    [
        {},
        {"distributed_type": DistributedType.MULTI_GPU},
        {"ddp_handler": DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)},
        {"distributed_type": DistributedType.FSDP, "is_fsdp2": True},
        {"parallelism_config": SimpleNamespace(cp_enabled=False, sp_enabled=False)},
    ],
)
def test_engine_is_accepted(tmp_path, accelerator):
    refuse_engine(make_args(tmp_path), **accelerator)


def test_trainer_refuses_when_it_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_gnp.engines.support.is_sagemaker_mp_enabled", lambda: True)
    with pytest.raises(NotImplementedError, match=r"SageMaker model parallelism.*gnp_alpha=0"):
        make_trainer(tmp_path, "vit")
    make_trainer(tmp_path, "vit", gnp_alpha=0.0)
