"""Each private name of DeepSpeed, accelerate and torch taken away in turn: the engine says so when it is made."""

import ast
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from torch.nn.parallel import DistributedDataParallel

from hf_gnp import engines
from hf_gnp.engines import native, private
from hf_gnp.engines.deepspeed import private as deepspeed_private


def sentence(package: str, name: str) -> str:
    installed, tested = (
        f"{package} {version(package)}, the installed",
        f"tested with {package} {private.TESTED[package]}",
    )
    return f"{re.escape(name)}, which {re.escape(installed)}.*{re.escape(tested)}"


def without(names, missing: str) -> SimpleNamespace:
    return SimpleNamespace(**{name: None for name in names if name != missing})


@pytest.mark.parametrize("name", private.FOREACH)
def test_torch(monkeypatch, name):
    monkeypatch.delattr(torch, name)
    with pytest.raises(RuntimeError, match=sentence("torch", f"torch.{name}")):
        private.check_private_names(Accelerator(cpu=True))


def test_tensor(monkeypatch):
    monkeypatch.setattr(private, "TENSOR", ("_gone",))  # its own names cannot be taken away
    with pytest.raises(RuntimeError, match=sentence("torch", "Tensor._gone")):
        private.check_private_names(Accelerator(cpu=True))


def test_accelerate(monkeypatch):
    accelerator = Accelerator(cpu=True)
    private.check_private_names(accelerator)
    monkeypatch.delattr(GradientState, "_set_sync_gradients")
    with pytest.raises(RuntimeError, match=sentence("accelerate", "GradientState._set_sync_gradients")):
        private.check_private_names(accelerator)


@pytest.mark.parametrize("name", private.DDP)
def test_ddp(name):
    ddp = DistributedDataParallel.__new__(DistributedDataParallel)  # without a process group
    torch.nn.Module.__init__(ddp)
    vars(ddp).update({other: [] for other in private.DDP if other != name})
    with pytest.raises(RuntimeError, match=sentence("torch", f"DistributedDataParallel.{name}")):
        native.has_communication_hook(ddp)


def fsdp_module(missing: str | None = None) -> SimpleNamespace:
    """What is asked of a module that FSDP2 shards, without one of the names; with a gradient of one parameter."""

    def having(**names) -> SimpleNamespace:
        return SimpleNamespace(**{name: value for name, value in names.items() if name != missing})

    unsharded = torch.nn.Parameter(torch.ones(2))
    unsharded.grad = torch.ones(2)
    parameters = [having(unsharded_accumulated_grad=None), having(unsharded_accumulated_grad=None)]
    parameters[1]._unsharded_param = unsharded  # the first has had no forward
    group = having(fsdp_params=parameters)
    return having(_get_fsdp_state=lambda: having(_fsdp_param_group=group))


@pytest.mark.parametrize(
    "owner, name",
    [
        ("FSDPModule", "_get_fsdp_state"),
        ("FSDPState", "_fsdp_param_group"),
        ("FSDPParamGroup", "fsdp_params"),
        ("FSDPParam", "unsharded_accumulated_grad"),
    ],
)
def test_fsdp(owner, name):
    module = fsdp_module()
    assert private.has_unreduced_gradient([module])
    private.drop_unreduced_gradients([module])
    assert not private.has_unreduced_gradient([module])
    with pytest.raises(RuntimeError, match=sentence("torch", f"{owner}.{name}")):
        private.has_unreduced_gradient([fsdp_module(name)])


def offload_names(kind: str) -> tuple[str, ...]:
    asynchronous = kind == "DeepSpeedZeroOptimizer" and deepspeed_private.copies_are_asynchronous()
    return deepspeed_private.OFFLOAD_NAMES[kind] + deepspeed_private.ASYNCHRONOUS_COPIES_NAMES * asynchronous


def optimizer_without(kind: str, missing: str | None, offloads: bool):
    """A stand-in of the class's name that has all names but one."""
    names = [*deepspeed_private.OPTIMIZER_NAMES[kind], *(offload_names(kind) if offloads else ())]
    values = dict.fromkeys(names)
    values |= dict.fromkeys({"cpu_offload", "offload_optimizer"} & set(names), offloads)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        parameter = SimpleNamespace(**dict.fromkeys(deepspeed_private.PARAMETER_NAMES))
        values["parameter_offload"] = SimpleNamespace(**dict.fromkeys(deepspeed_private.PARAMETER_OFFLOAD_NAMES))
        values["fp16_groups"] = [[parameter]]
    values.pop(missing, None)
    optimizer = type(kind, (), {})()
    vars(optimizer).update(values)
    return optimizer


@pytest.mark.parametrize(
    "kind, name, offloads",
    [(kind, name, False) for kind, names in deepspeed_private.OPTIMIZER_NAMES.items() for name in names]
    + [(kind, name, True) for kind in deepspeed_private.OFFLOAD_NAMES for name in offload_names(kind)],
)
def test_deepspeed_optimizer(kind, name, offloads):
    deepspeed_private.check_optimizer(optimizer_without(kind, None, offloads))
    with pytest.raises(RuntimeError, match=sentence("deepspeed", f"{kind}.{name}")):
        deepspeed_private.check_optimizer(optimizer_without(kind, name, offloads))


@pytest.mark.parametrize("name", deepspeed_private.PARAMETER_NAMES)
def test_deepspeed_parameter(name):
    optimizer = optimizer_without("DeepSpeedZeroOptimizer_Stage3", None, False)
    delattr(optimizer.fp16_groups[0][0], name)
    with pytest.raises(RuntimeError, match=sentence("deepspeed", f"a parameter's.{name}")):
        deepspeed_private.check_optimizer(optimizer)


@pytest.mark.parametrize("name", deepspeed_private.PARAMETER_OFFLOAD_NAMES)
def test_deepspeed_parameter_offload(name):
    optimizer = optimizer_without("DeepSpeedZeroOptimizer_Stage3", None, False)
    delattr(optimizer.parameter_offload, name)
    with pytest.raises(RuntimeError, match=sentence("deepspeed", f"DeepSpeedZeRoOffload.{name}")):
        deepspeed_private.check_optimizer(optimizer)


def test_gathers_of_zero3_wait_for_what_was_moved():
    """What a CPU can show of it: the stream of the gathers is told to wait for the one that wrote."""
    waited_for, stream = [], "_DeepSpeedZeRoOffload__allgather_stream"
    offload = SimpleNamespace(**{stream: SimpleNamespace(wait_stream=waited_for.append)})
    deepspeed_private.order_before_gathers(SimpleNamespace(parameter_offload=offload))
    assert waited_for == [deepspeed_private.get_accelerator().current_stream()]


@pytest.mark.parametrize("name", deepspeed_private.ENGINE_NAMES)
def test_deepspeed_engine(name):
    engine = without(deepspeed_private.ENGINE_NAMES, name)
    accelerator = SimpleNamespace(deepspeed_engine_wrapped=SimpleNamespace(engine=engine, backward=None))
    with pytest.raises(RuntimeError, match=sentence("deepspeed", f"DeepSpeedEngine.{name}")):
        deepspeed_private.check_engine(accelerator)


def test_deepspeed_engine_that_accelerate_has_forgotten():
    with pytest.raises(RuntimeError, match="make a new trainer for the next run"):
        deepspeed_private.check_engine(SimpleNamespace(deepspeed_engine_wrapped=None))


def test_deepspeed_padding_that_is_not_marked():
    parameters = [torch.zeros(size) for size in (4, 3, 5)]
    cut = [torch.zeros(size) for size in (2, 3, 4)]
    deepspeed_private.check_fragments(cut, parameters)
    deepspeed_private.check_fragments([*cut, torch.zeros(1)], parameters)  # padding at the end
    with pytest.raises(RuntimeError, match=sentence("deepspeed", "_zero_padding")):
        deepspeed_private.check_fragments([cut[0], torch.zeros(1), *cut[1:]], parameters)


def test_a_name_that_a_module_lacks():
    with pytest.raises(RuntimeError, match=sentence("deepspeed", "deepspeed.runtime.utils.gone")):
        private.look_up("deepspeed", "deepspeed.runtime.utils", "gone")
    with pytest.raises(RuntimeError, match=sentence("deepspeed", "deepspeed.gone.name")):
        private.look_up("deepspeed", "deepspeed.gone", "name")


PUBLIC = {"param_groups", "state"}  # torch's own


def test_every_attribute_of_a_deepspeed_optimizer_that_is_used_is_in_the_list():
    folder = Path(engines.__file__).parent / "deepspeed"
    listed = {name for names in deepspeed_private.OPTIMIZER_NAMES.values() for name in names}
    listed |= {name for names in deepspeed_private.OFFLOAD_NAMES.values() for name in names}
    listed |= set(deepspeed_private.ASYNCHRONOUS_COPIES_NAMES)
    used = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", None)
                if name == "optimizer":
                    used.add(node.attr)
            if isinstance(node, ast.Dict):  # the class variables `names`
                used |= {v.value for v in node.values if isinstance(v, ast.Constant) and isinstance(v.value, str)}
    assert "check_grad_overflow" in used  # else the scan finds nothing
    assert used - PUBLIC <= listed
