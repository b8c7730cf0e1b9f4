"""What the penalty costs: twice the FLOPs of plain training, a forward more in a run, and a copy of the weights."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from runs import CHECKPOINTING, MICRO_BATCH, make_trainer, probe_flops, record_forwards, without_probe
from tiny import KINDS, Net, collate, make_data, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
def test_costs_twice_the_flops(tmp_path, kind, accumulation, checkpointing):
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


def test_all_weights_move_in_one_operation(tmp_path, monkeypatch):
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
        ("adamw_torch_fused", {"gnp_alpha": 1.0, "gnp_adaptive": True}, 1),
        ("adamw_torch", {}, 2),  # the host has to know whether this step may be made
        ("sgd", {"bf16": True}, 2),
        ("sgd", {"scales": True}, 1),  # the scaler knows it
    ],
)
def test_what_the_host_reads(tmp_path, make, accumulation, optim, settings, expected):
    """‖g₁‖ (with the loss scale, and what moved in the first pass), beyond what plain training reads."""
    scales = settings.get("scales", False)
    gnp = {name: value for name, value in settings.items() if name.startswith("gnp_")}
    plain = {name: value for name, value in settings.items() if name not in gnp and name != "scales"}
    plain |= {"optim": optim, "gradient_accumulation_steps": accumulation}
    stock = readings(tmp_path, Trainer, make, scales, **plain)
    penalised = readings(tmp_path, GNPTrainer, make, scales, **plain, **gnp)
    assert penalised - stock == (expected if isinstance(expected, int) else accumulation)


class PeakBytes(TorchDispatchMode):
    """The most that the results of operations held at once, of the storages that came into being meanwhile."""

    def __init__(self, older: list[torch.Tensor]):
        super().__init__()
        self.live: dict[int, weakref.ref] = {}
        self.older = {tensor.untyped_storage().data_ptr() for tensor in older}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.older:
                self.live[id(tensor)] = weakref.ref(tensor)
        tensors = [tensor for ref in self.live.values() if (tensor := ref()) is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.peak = max(self.peak, sum(storages.values()))
        return result


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("noise_seed", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_in_parts_is_moving_at_once_in_less_memory(monkeypatch, dtype, noise_seed, adaptive, measure):
    torch.manual_seed(0)
    shapes = 4 * [(30, 10), (100,), (7, 9), (200,), (64, 4), (1,), (90, 3)]
    masters = [torch.randn(shape) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    weights, sums, peaks = {}, {}, {}
    for part in (300, 2**22):
        monkeypatch.setattr(penalty, "PART", part)
        weights[part] = [master.to(dtype, copy=True) for master in masters]
        settings = {"adaptive": adaptive, "noise_seed": noise_seed, "measure": measure}
        with PeakBytes([*weights[part], *gradients, *masters]) as peak:
            sums[part] = penalty.move_(weights[part], gradients, masters, 0.05, **settings)
        peaks[part] = peak.peak
    assert all(map(torch.equal, *weights.values()))
    if measure:
        assert torch.allclose(*sums.values())  # summed in another order
    assert peaks[300] < peaks[2**22] / 2  # the largest part is 300 of 4760 elements


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


def live_in_last_step(tmp_path, kind: str, frozen: int, accumulation: int, alpha: float) -> tuple[list[int], int]:
    """At the start of each forward of the last step, and before the optimizer steps: its states exist by then."""
    gc.collect()
    model = make_model(kind)
    for parameter in list(model.parameters())[:frozen]:
        parameter.requires_grad_(False)
    settings = {"gradient_accumulation_steps": accumulation, "gnp_alpha": alpha, "optim": "adamw_torch"}
    trainer = make_trainer(tmp_path, kind, model=model, max_steps=3, **settings)
    live = Live(trainer.model)
    trainer.add_callback(live)
    trainer.train()
    forwards = live.forwards if alpha == 0 else without_probe(live.forwards, accumulation)
    return forwards[-(len(forwards) // 3) :], live.steps[-1]


@pytest.mark.parametrize("frozen", [0, 9])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_second_pass_holds_one_copy_of_the_trainable_weights(tmp_path, kind, alpha, frozen):
    accumulation = 2
    forwards, step = live_in_last_step(tmp_path, kind, frozen, accumulation, alpha)
    plain_forwards, plain_step = live_in_last_step(tmp_path, kind, frozen, accumulation, alpha=0.0)
    copy = sum(p.nbytes for p in list(make_model(kind).parameters())[frozen:])
    inputs = sum(value.nbytes for value in collate(make_data(kind)[: accumulation * MICRO_BATCH]).values())
    # A copy of the window's inputs, a state of the CPU's generator for each micro-batch and for the end of the window,
    # a few scalar losses.
    slack = inputs + (accumulation + 1) * torch.get_rng_state().nbytes + 512
    assert (len(forwards), len(plain_forwards)) == (2 * accumulation, accumulation)
    assert 0 <= max(forwards[:accumulation]) - max(plain_forwards) <= slack
    assert copy <= max(forwards[accumulation:]) - max(plain_forwards) <= copy + slack
    assert 0 <= step - plain_step <= slack


# Beyond plain training, in copies of the trainable weights: at the most of a forward, and when the optimizer steps.
HELD = {
    "micro_batch": ({"gnp_scope": "micro_batch"}, 2, 0),  # the weights, and the gradient of earlier micro-batches
    "fraction": ({"gnp_ascent_fraction": 0.5}, 1, 0),
    "momentum": ({"gnp_direction": "momentum"}, 1, 0),
    "reuse": ({"gnp_reuse": True, "gnp_interval": 3}, 2, 1),  # the weights, and g₁, of which the reused part is left
    "precondition": ({"gnp_precondition": True}, 1, 0),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_what_other_penalised_steps_hold(tmp_path, kind, name):
    arguments, in_forward, in_step = HELD[name]
    accumulation, peaks = 2, {}
    for run, values in (("plain", {"gnp_alpha": 0.0}), ("penalised", arguments)):
        gc.collect()
        model = make_model(kind)
        settings = {"gradient_accumulation_steps": accumulation, "optim": "adamw_torch", "max_steps": 3}
        trainer = make_trainer(tmp_path, kind, model=model, **settings, **values)
        live = Live(trainer.model)
        trainer.add_callback(live)
        trainer.train()
        peaks[run] = max(live.forwards[-accumulation:]), live.steps[-1]  # not the probe
    copy = sum(p.nbytes for p in make_model(kind).parameters())
    inputs = sum(value.nbytes for value in collate(make_data(kind)[: accumulation * MICRO_BATCH]).values())
    slack = inputs + (accumulation + 1) * torch.get_rng_state().nbytes + 512  # as above
    for copies, plain, penalised in zip((in_forward, in_step), peaks["plain"], peaks["penalised"], strict=True):
        assert copies * copy <= penalised - plain <= copies * copy + slack
