"""Private names of torch and DeepSpeed that are assigned: without a check, a release that drops one is silent."""

import ast
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_gnp import engines
from hf_gnp.engines import private
from hf_gnp.engines.deepspeed import private as deepspeed_private


class Everything:
    """Has every attribute but those that are missing."""

    def __init__(self, *missing: str, **values):
        self._missing = missing
        vars(self).update(values)

    def __getattr__(self, name):
        if name in self._missing or name.startswith("__"):
            raise AttributeError(name)
        return None


# By the class of DeepSpeed's optimizer, and whether it offloads.
ASSIGNED = {
    ("DeepSpeedZeroOptimizer", False): (
        "all_grad_tensors",
        "averaged_gradients",
        "check_grad_overflow",
        "micro_step_id",
    ),
    ("DeepSpeedZeroOptimizer", True): ("local_overflow", "_offload_accumulated_param_ids"),
}


def sentence(package: str, name: str) -> str:
    installed, tested = version(package), private.TESTED[package]
    return f"{re.escape(name)}, which {package} {re.escape(installed)}, the installed.*tested with {package} {tested}"


@pytest.mark.parametrize("kind, offloads, name", [(*kind, name) for kind, names in ASSIGNED.items() for name in names])
def test_assigned_name_is_checked(kind, offloads, name):
    if name == "_offload_accumulated_param_ids" and not deepspeed_private.copies_are_asynchronous():
        pytest.skip("DeepSpeed before 0.19.8 has it not")
    optimizer = type(kind, (Everything,), {})
    values = {"cpu_offload": offloads, "offload_optimizer": offloads}
    deepspeed_private.check_optimizer(optimizer(**values))
    with pytest.raises(RuntimeError, match=sentence("deepspeed", f"{kind}.{name}")):
        deepspeed_private.check_optimizer(optimizer(name, **values))


def test_every_assigned_name_is_here():
    """Attributes of DeepSpeed's optimizers that the engines assign, or whose items they assign."""
    assigned = set()
    for path in (Path(engines.__file__).parent / "deepspeed").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for target in getattr(node, "targets", []) if isinstance(node, ast.Assign) else []:
                target = target.value if isinstance(target, ast.Subscript) else target
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) in ("optimizer", "self.optimizer"):
                    assigned.add(target.attr)
    assert assigned == {name for names in ASSIGNED.values() for name in names}


@pytest.mark.parametrize("missing", [None, "unsharded_accumulated_grad"])
def test_gradient_that_fsdp2_has_not_reduced(missing):
    """FSDP2 keeps it where no `grad` shows it, and hf_gnp sets it to None."""
    unsharded = torch.nn.Parameter(torch.ones(2))
    unsharded.grad = torch.ones(2)
    parameters = [SimpleNamespace(unsharded_accumulated_grad=None) for _ in range(2)]
    parameters[1]._unsharded_param = unsharded  # the first has had no forward
    group = SimpleNamespace(fsdp_params=parameters)
    module = SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(_fsdp_param_group=group))
    if missing is not None:
        delattr(parameters[0], missing)
        with pytest.raises(RuntimeError, match=sentence("torch", f"FSDPParam.{missing}")):
            private.drop_unreduced_gradients([module])
        return
    assert private.has_unreduced_gradient([module])
    private.drop_unreduced_gradients([module])
    assert not private.has_unreduced_gradient([module])


def test_name_that_a_module_lacks():
    for module, name in (("deepspeed.runtime.utils", "gone"), ("deepspeed.gone", "name")):
        with pytest.raises(RuntimeError, match=sentence("deepspeed", f"{module}.{name}")):
            private.look_up("deepspeed", module, name)


# --- What a CPU can show of DeepSpeed's other private state ---


def test_gathers_of_zero3_wait_for_writes():
    """The stream of the gathers is told to wait for the one that wrote."""
    waited_for, stream = [], "_DeepSpeedZeRoOffload__allgather_stream"
    offload = SimpleNamespace(**{stream: SimpleNamespace(wait_stream=waited_for.append)})
    deepspeed_private.order_before_gathers(SimpleNamespace(parameter_offload=offload))
    assert waited_for == [deepspeed_private.get_accelerator().current_stream()]


def test_second_run_of_a_trainer_is_refused():
    with pytest.raises(RuntimeError, match="make a new trainer for the next run"):
        deepspeed_private.check_engine(SimpleNamespace(deepspeed_engine_wrapped=None))


def test_padding_that_is_not_marked():
    parameters = [torch.zeros(size) for size in (4, 3, 5)]
    cut = [torch.zeros(size) for size in (2, 3, 4)]
    deepspeed_private.check_fragments(cut, parameters)
    deepspeed_private.check_fragments([*cut, torch.zeros(1)], parameters)  # padding at the end
    with pytest.raises(RuntimeError, match=sentence("deepspeed", "_zero_padding")):
        deepspeed_private.check_fragments([cut[0], torch.zeros(1), *cut[1:]], parameters)
