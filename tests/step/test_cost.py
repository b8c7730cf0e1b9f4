"""What the penalty costs: twice the FLOPs of plain training, a forward more in a run, and a copy of the weights."""

import gc
from collections.abc import Callable

import pytest
import torch
from runs import CHECKPOINTING, MICRO_BATCH, make_trainer, probe_flops, record_forwards, without_probe
from tiny import KINDS, Net, collate, make_data, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback

from hf_gnp import GNPTrainer, penalty


STEPS = 2


def flops_and_forwards(tmp_path, kind: str, cls: type[Trainer], **kwargs) -> tuple[int, int]:
    trainer = make_trainer(tmp_path, kind, cls, max_steps=STEPS, **kwargs)
    forwards = record_forwards(trainer.model, id)
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    return counter.get_total_flops(), len(forwards)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_flops(tmp_path, kind, accumulation, checkpointing):
    settings = {"gradient_accumulation_steps": accumulation, CHECKPOINTING: checkpointing}
    plain_flops, plain_forwards = flops_and_forwards(tmp_path, kind, Trainer, **settings)
    flops, forwards = flops_and_forwards(tmp_path, kind, GNPTrainer, **settings)
    assert plain_flops > 0
    assert (flops, forwards) == (2 * plain_flops + probe_flops(kind), 2 * plain_forwards + 1)
    assert plain_forwards == STEPS * accumulation


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_perturbation_is_one_operation(tmp_path, monkeypatch):
    """Where nothing has to be kept, rounded or measured: on a GPU each operation is a launch."""
    move_, operations = penalty.move_, []

    def spy(*args, **kwargs):
        with Operations() as recorded:
            result = move_(*args, **kwargs)
        operations.append(recorded.names)
        return result

    monkeypatch.setattr(penalty, "move_", spy)
    make_trainer(tmp_path, "vit", max_steps=STEPS, logging_strategy="no").train()
    assert operations == [["aten._foreach_add_.List"]] * STEPS


class Readings(TorchDispatchMode, TrainerCallback):
    """
    How often the host reads from the device in each step, where a GPU's queue runs empty: `item`, what Python does for
    it (`bool`, `float`, `if`), `tolist`, `equal`.
    """

    def __init__(self):
        super().__init__()
        self.count, self.begun, self.steps = 0, 0, []

    def __enter__(self):
        self.tolist, count = torch.Tensor.tolist, self._count

        def counted(tensor):
            count()
            return self.tolist(tensor)

        torch.Tensor.tolist = counted  # on a CPU no operation
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        return super().__exit__(*error)

    def _count(self) -> None:
        self.count += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal):
            self._count()
        return function(*args, **(kwargs or {}))

    def on_step_begin(self, *args, **kwargs):
        self.begun = self.count

    def on_optimizer_step(self, *args, **kwargs):
        self.steps.append(self.count - self.begun)


def readings(tmp_path, cls: type[Trainer], make: Callable[[], torch.nn.Module], scales: bool, **kwargs) -> int:
    """In a step that neither probes nor learns which buffers move nor logs."""
    counted = Readings()
    kind = "net" if make is batch_norm else "vit"
    settings = {"model": make(), "max_steps": 5, "logging_strategy": "no", "callbacks": [counted], **kwargs}
    trainer = make_trainer(tmp_path, kind, cls, **settings)
    if scales:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256)
    with counted:
        trainer.train()
    assert len(set(counted.steps[-2:])) == 1
    return counted.steps[-1]


def vit() -> torch.nn.Module:
    return make_model("vit")


def half_frozen() -> torch.nn.Module:
    model = make_model("vit")
    model.vit.requires_grad_(False)
    return model


def batch_norm() -> torch.nn.Module:
    return Net(lambda: torch.nn.BatchNorm1d(7))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("make", [vit, half_frozen, batch_norm])
@pytest.mark.parametrize(
    ("optim", "settings", "expected"),
    [
        ("adamw_torch_fused", {}, 1),  # Trainer's default
        ("adamw_torch_fused", {"bf16": True}, 1),
        ("adamw_torch_fused", {"gnp_scope": "micro_batch"}, "one for each micro-batch"),
        ("adamw_torch_fused", {"gnp_alpha": 1.0, "gnp_metric": "element"}, 1),
        ("adamw_torch", {}, 2),  # the host has to know whether this step may be made
        ("sgd", {"bf16": True}, 2),
        ("sgd", {"scales": True}, 1),  # the scaler knows it
    ],
)
def test_host_reads(tmp_path, make, accumulation, optim, settings, expected):
    """‖g₁‖ (with the loss scale, and what moved in the first pass), beyond what plain training reads."""
    scales = settings.get("scales", False)
    gnp = {name: value for name, value in settings.items() if name.startswith("gnp_")}
    plain = {name: value for name, value in settings.items() if name not in gnp and name != "scales"}
    plain |= {"optim": optim, "gradient_accumulation_steps": accumulation}
    stock = readings(tmp_path, Trainer, make, scales, **plain)
    penalised = readings(tmp_path, GNPTrainer, make, scales, **plain, **gnp)
    assert penalised - stock == (expected if isinstance(expected, int) else accumulation)


class Live(TrainerCallback):
    """The bytes of all live tensors at the start of each forward and before the optimizer steps."""

    def __init__(self, model: torch.nn.Module):
        self.forwards = record_forwards(model, live_bytes)
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(live_bytes(model))


def live_bytes(model: torch.nn.Module) -> int:
    """Only of what the test has made: conftest.py hides what is older from `gc.get_objects`."""
    gradients = [parameter.grad for parameter in model.parameters()]  # gc finds those that Python has seen
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):  # isinstance would ask proxies, which may import what they stand for
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    del gradients
    return sum(storages.values())


def live_in_last_step(tmp_path, kind: str, frozen: int, accumulation: int, **gnp) -> tuple[list[int], int]:
    """At the start of each forward of the last step, and before the optimizer steps: its states exist by then."""
    gc.collect()
    model = make_model(kind)
    for parameter in list(model.parameters())[:frozen]:
        parameter.requires_grad_(False)
    settings = {"gradient_accumulation_steps": accumulation, "optim": "adamw_torch", "max_steps": 3}
    trainer = make_trainer(tmp_path, kind, model=model, **settings, **gnp)
    live = Live(trainer.model)
    trainer.add_callback(live)
    trainer.train()
    forwards = without_probe(live.forwards, accumulation) if len(live.forwards) % 2 else live.forwards
    return forwards[-(len(forwards) // 3) :], live.steps[-1]


# The copies of the trainable weights that a forward holds beyond plain training.
HELD = {
    "alpha0.8": ({"gnp_alpha": 0.8}, 1),
    "alpha1": ({"gnp_alpha": 1.0}, 1),
    "micro_batch": ({"gnp_scope": "micro_batch"}, 2),  # the weights, and the gradient of earlier micro-batches
    "momentum": ({"gnp_direction": "momentum"}, 1),
}


@pytest.mark.parametrize("frozen", [0, 9])
@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_held(tmp_path, kind, name, frozen):
    accumulation, (arguments, copies) = 2, HELD[name]
    forwards, step = live_in_last_step(tmp_path, kind, frozen, accumulation, **arguments)
    plain_forwards, plain_step = live_in_last_step(tmp_path, kind, frozen, accumulation, gnp_alpha=0.0)
    copy = sum(p.nbytes for p in list(make_model(kind).parameters())[frozen:])
    inputs = sum(value.nbytes for value in collate(make_data(kind)[: accumulation * MICRO_BATCH]).values())
    buffers = sum(buffer.nbytes for buffer in make_model(kind).buffers())
    # A copy of the window's inputs, small buffers before and after the first pass, a state of the CPU's generator for
    # each micro-batch and for the end of the window, a few scalar losses.
    slack = inputs + 2 * buffers + (accumulation + 1) * torch.get_rng_state().nbytes + 512
    assert len(plain_forwards) == accumulation
    if name.startswith("alpha"):
        assert len(forwards) == 2 * accumulation
        assert 0 <= max(forwards[:accumulation]) - max(plain_forwards) <= slack
    assert copies * copy <= max(forwards[-accumulation:]) - max(plain_forwards) <= copies * copy + slack
    assert 0 <= step - plain_step <= slack
