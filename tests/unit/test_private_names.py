"""Private names of torch and DeepSpeed that are assigned: without a check, a release that drops one is silent."""

import ast
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from hf_gnp import engines
from hf_gnp.engines import private
from hf_gnp.engines.deepspeed import make_deepspeed_engine
from hf_gnp.engines.deepspeed.zero3 import Zero3Engine
from hf_gnp.engines.fsdp import Fsdp2Engine
from hf_gnp.perturbation import Perturbation


# Attributes of DeepSpeed's optimizers that the engines assign, or whose items they assign.
CHECKED = {"micro_step_id"}
READ_FIRST = {"all_grad_tensors", "averaged_gradients", "local_overflow"}


def sentence(package: str, name: str) -> str:
    installed, tested = version(package), private.TESTED[package]
    return f"{re.escape(name)}, which {package} {re.escape(installed)}, the installed.*tested with {package} {tested}"


@pytest.mark.parametrize("package, owner, name", [("deepspeed", Path(), "gone"), ("torch", torch.ones(1), "gone")])
def test_missing_name_is_refused(package, owner, name):
    with pytest.raises(RuntimeError, match=sentence(package, f"{type(owner).__name__}.{name}")):
        private.require(package, owner, name)


def test_every_assigned_name_is_checked_or_read_first():
    assigned, checked = set(), set()
    for path in (Path(engines.__file__).parent / "deepspeed").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
                checked.add(ast.literal_eval(node.args[2]))
            for target in getattr(node, "targets", []) if isinstance(node, ast.Assign) else []:
                target = target.value if isinstance(target, ast.Subscript) else target
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) in ("optimizer", "self.optimizer"):
                    assigned.add(target.attr)
    assert checked == CHECKED
    assert assigned == CHECKED | READ_FIRST


class FSDPParam(SimpleNamespace):
    """FSDP2's record of a parameter."""


@pytest.mark.parametrize("missing", [None, "unsharded_accumulated_grad"])
def test_gradient_that_fsdp2_has_not_reduced(missing):
    """FSDP2 keeps it where no `grad` shows it, and hf_gnp sets it to None."""
    unsharded = torch.nn.Parameter(torch.ones(2))
    unsharded.grad = torch.ones(2)
    parameters = [FSDPParam(unsharded_accumulated_grad=None) for _ in range(2)]
    parameters[1]._unsharded_param = unsharded  # the first has had no forward
    group = SimpleNamespace(fsdp_params=parameters)
    module = SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(_fsdp_param_group=group))
    engine = object.__new__(Fsdp2Engine)
    engine._modules, engine.all_parameters, engine._mixed = [module], [], []
    if missing is not None:
        delattr(parameters[0], missing)
        with pytest.raises(RuntimeError, match=sentence("torch", f"FSDPParam.{missing}")):
            engine.discard_gradient()
        return
    assert engine.hides_gradient()
    engine.discard_gradient()
    assert not engine.hides_gradient()


# --- What a CPU can show of DeepSpeed's other private state ---


def test_gathers_of_zero3_wait_for_writes():
    """The stream of the gathers is told to wait for the one that wrote."""
    waited_for, stream = [], "_DeepSpeedZeRoOffload__allgather_stream"
    values = {stream: SimpleNamespace(wait_stream=waited_for.append), "partition_all_parameters": lambda: None}
    offload = SimpleNamespace(**values)
    Zero3Engine.publish(SimpleNamespace(optimizer=SimpleNamespace(parameter_offload=offload)))
    assert waited_for == [get_accelerator().current_stream()]


def test_second_run_of_a_trainer_is_refused():
    with pytest.raises(RuntimeError, match="make a new trainer for the next run"):
        make_deepspeed_engine(SimpleNamespace(deepspeed_engine_wrapped=None), Perturbation())
