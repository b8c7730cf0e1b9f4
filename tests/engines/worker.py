"""
Runs training cases on every rank of one launch, and saves what rank 0 saw of each.

    torchrun --nproc_per_node 2 worker.py cases.json output_folder
"""

import contextlib
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from meters import CountCollectives
from runs import logs_of, make_args
from tiny import adversarial, collate, flat_weights, make_data, make_model
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_gnp import GNPMixin, GNPTrainer, GNPTrainingArguments


# The most that a rank waits in a collective for another, which may be dead, or slow on a loaded machine.
# The limit of a launch is longer.
RANK_TIMEOUT = timedelta(minutes=10)
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {},
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3-offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


def deepspeed_config(precision: str, zero: dict[str, Any], **config: Any) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **config,
    }
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    if precision == "bf16":
        config["bf16"] = {"enabled": True} | config.get("bf16", {})
    return config


def load_model(case: dict[str, Any], folder: Path) -> torch.nn.Module:
    kind, dropout = case["kind"], case.get("dropout", 0.0)
    dtype = getattr(torch, case.get("dtype", "float32"))
    if case["engine"] != "fsdp2":
        return make_model(kind, dropout).to(dtype)
    from transformers.distributed import DistributedConfig

    path = folder / f"{kind}-{dropout}"
    if dist.get_rank() == 0 and not path.exists():
        make_model(kind, dropout, adapter=False).save_pretrained(path)
    dist.barrier()
    config = DistributedConfig(**{"fsdp_size": dist.get_world_size()} | case.get("distributed", {}))
    return make_model(kind, loaded_from=path, distributed_config=config, dtype=dtype)


class FaultyLoss:
    """Spoils the loss of chosen calls: `faults` maps "step.call" (calls counted within a step) to what happens."""

    faults: dict[str, str]
    compares_ranks = False
    seen: SimpleNamespace  # out of reach of the replay, which puts a trainer's own counters back

    def compute_loss(self, model, inputs, *args, **kwargs):
        key, seen = (id(self.state), self.state.global_step), self.seen
        seen.calls[key] = seen.calls.get(key, 0) + 1
        call = f"{self.state.global_step}.{seen.calls[key]}"
        if seen.calls[key] == 1:
            seen.start_of_step = full_weights(self.model)
        if seen.calls[key] == 2 and self.compares_ranks:
            seen.second_call = flat_weights(self.model)
        fault = self.faults.get(call) or self.faults.get(f"{call}@{dist.get_rank()}")
        if fault == "raise":
            raise RuntimeError(f"injected at {call}")
        if fault == "raise inside":
            self.model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(_raise)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if fault is not None:
            loss = loss * float(fault)
        return loss


def _raise(*_: Any) -> None:
    raise RuntimeError("injected in the forward")


class ForwardFirst:
    """Runs the model where trainers generate, or compute log-probabilities: before the loss, without a backward."""

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        with torch.no_grad():
            self.model_wrapped(**inputs)
        return inputs


class SkipsLastTrainer(Trainer):
    """Skips the last micro-batch of the last step, without a backward."""

    def training_step(self, *args, **kwargs):
        if self.accelerator.sync_gradients and self.state.global_step == self.state.max_steps - 1:
            return torch.zeros((), device=self.args.device)
        return super().training_step(*args, **kwargs)


class SkipsLast(GNPMixin, SkipsLastTrainer):
    pass


class StopsWithin(TrainerCallback):
    """Stops the run between two micro-batches of the third step. Notes its weights there, and in the evaluation."""

    def __init__(self):
        self.theta = self.evaluated = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.theta = full_weights(model)

    def on_substep_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.evaluated = full_weights(model)


class LoggingLoss:
    """Logs parts of its loss on the main process only, as people do, under the names of `Trainer`'s own logs."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.is_world_process_zero():
            self.log({"loss": loss.item(), "learning_rate": 1.0, "part": 1.0})
        return loss


class AdversarialLoss:
    """Differentiates its loss by the inputs, in `compute_loss`."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        compute_loss = super().compute_loss
        return compute_loss(model, adversarial(lambda moved: compute_loss(model, moved), inputs), *args, **kwargs)


class AuxiliaryLoss:
    """Calls backward on a loss of its own, of inputs twice as large: `where` is before, after or inside the step."""

    where: str

    def auxiliary(self, model, inputs):
        inputs = self._prepare_inputs({name: 2 * v if v.is_floating_point() else v for name, v in inputs.items()})
        self.accelerator.backward(0.1 * model(**inputs).loss)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.where == "inside":
            self.auxiliary(model, inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        if self.where == "before":
            self.auxiliary(model, inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.where == "after":
            self.auxiliary(model, inputs)
        return loss


class SkipsFaults(FaultyLoss):
    """Goes on after an error, as trainers do that run out of memory on a long batch."""

    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        except RuntimeError as error:
            if "injected" not in str(error):
                raise
            return torch.zeros(())


class Hooked:
    """Registers a communication hook of DDP, as users do: `Trainer` has no argument for it."""

    comm_hook: str | None

    def training_step(self, model, *args, **kwargs):
        if self.comm_hook == "power_sgd":
            model.register_comm_hook(powerSGD_hook.PowerSGDState(None), powerSGD_hook.powerSGD_hook)
        elif self.comm_hook is not None:
            model.register_comm_hook(None, getattr(default_hooks, f"{self.comm_hook}_compress_hook"))
        self.comm_hook = None
        return super().training_step(model, *args, **kwargs)


# What a trainer is besides, by the key of its case.
SPECIAL: dict[str, type] = {
    "auxiliary": AuxiliaryLoss,
    "skips": SkipsFaults,
    "skips_last": SkipsLast,
    "forward_first": ForwardFirst,
    "logs_in_loss": LoggingLoss,
    "is_adversarial": AdversarialLoss,
    "comm_hook": Hooked,
    "faults": FaultyLoss,
}


def trainer_class(case: dict[str, Any], special: dict[str, type] = SPECIAL) -> type[Trainer]:
    base = Trainer if case.get("stock", False) else GNPTrainer
    own = next((own for key, own in special.items() if key in case), None)
    if own is None or issubclass(own, Trainer):
        return own or base
    return type(f"{own.__name__}Trainer", (own, base), {})


def parameters_whole(parameters: list[torch.nn.Parameter]) -> Iterator[torch.Tensor]:
    for parameter in parameters:
        if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_full_fp32_param

            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            yield parameter if master is None else master.view(getattr(parameter, "ds_shape", parameter.shape))
        else:
            yield parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


@torch.no_grad()
def full_weights(model: torch.nn.Module, masters: bool = False) -> torch.Tensor:
    """All weights, whole, flat and in float64: those of the forward, or the fp32 masters behind them. A collective."""
    parameters = list(model.parameters())
    gathered: Any = contextlib.nullcontext()
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parameters)
    with gathered:
        if masters:
            whole = list(parameters_whole(parameters))
        else:
            whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
        return torch.cat([p.detach().double().flatten().cpu() for p in whole])


def make_trainer(case: dict[str, Any], folder: Path, name: str) -> Trainer:
    args = {"ddp_backend": "gloo", **case.get("args", {})}
    zero = ENGINES[case["engine"]] | case.get("zero", {})
    precision = case.get("precision", "fp32")
    if precision != "fp32":
        args[precision] = True
    if zero:
        args["deepspeed"] = deepspeed_config(precision, zero, **case.get("deepspeed", {}))
    stock = case.get("stock", False)
    if case.get("holds"):
        gc.freeze()  # what is older is not looked at
    training_args = make_args(folder / name, TrainingArguments if stock else GNPTrainingArguments, **args)
    model = load_model(case, folder)
    if "frozen" in case:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(case["frozen"] not in parameter_name)
    if case.get("unused"):
        model.unused = torch.nn.Parameter(torch.ones(7))
    if "leaf" in case:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [case["leaf"]])
    cls = trainer_class(case)
    data = make_data(case["kind"], case.get("size", 48))
    held_out = data[:8] if "eval_strategy" in args else None
    trainer = cls(model=model, args=training_args, train_dataset=data, eval_dataset=held_out, data_collator=collate)
    if "faults" in case:
        trainer.faults, trainer.seen = case["faults"], SimpleNamespace(calls={})
        trainer.compares_ranks = case.get("compare_ranks", False)
    for key, callback in {"generates": Generates, "stops_within": StopsWithin, "count": CountCollectives}.items():
        if case.get(key):
            trainer.add_callback(callback())
    if "auxiliary" in case:
        trainer.where = case["auxiliary"]
    if "comm_hook" in case:
        trainer.comm_hook = case["comm_hook"]
    if case.get("holds"):
        trainer.add_callback(Holds(trainer))
    if case.get("scaler"):  # accelerate makes none on a CPU
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256)
    return trainer


def loss_scale(trainer: Trainer) -> float | None:
    if trainer.is_deepspeed_enabled:
        return getattr(trainer.model_wrapped.optimizer, "cur_scale", None)
    return trainer.accelerator.scaler.get_scale() if trainer.accelerator.scaler is not None else None


def trained(trainer: Trainer, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, also to an injected failure, and return the logs and weights that the run leaves."""
    result: dict[str, Any] = {}
    try:
        trainer.train(resume_from_checkpoint=case.get("resume") and str(folder / case["resume"]))
    except RuntimeError as error:
        if "injected" not in str(error):
            raise
        result["raised"] = str(error)
    if "faults" in case:
        result["start_of_step"] = trainer.seen.start_of_step
    trainer.state.log_history = [entry for entry in trainer.state.log_history if "part" not in entry]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "grad_norm", "gnp_grad_norm", "gnp_perturbed_loss", "gnp_fidelity")
    result["logs"] = logs_of(trainer, *[n for n in names if logged and n in logged[0]])
    result["weights"] = full_weights(trainer.model)
    return result


def run_case(case: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    trainer = make_trainer(case, folder, name)
    result = trained(trainer, case, folder)
    result["masters"] = full_weights(trainer.model, masters=True)
    result["loss_scale"] = loss_scale(trainer)
    if case.get("compare_ranks"):
        result["ranks_agree"] = is_same_on_ranks(trainer.seen.second_call)
    if "auxiliary" in case:
        result["ranks_agree"] = is_same_on_ranks(result["weights"])
    if case.get("count"):
        result["collectives"] = dict(trainer.pop_callback(CountCollectives).bytes)
    if case.get("holds"):
        result["held"] = trainer.pop_callback(Holds).bytes
        result["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    if case.get("stops_within"):
        stopped = trainer.pop_callback(StopsWithin)
        result["theta"], result["evaluated"] = stopped.theta, stopped.evaluated
    if case.get("generates"):
        result["generated"] = trainer.pop_callback(Generates).tokens
    if case.get("zero_to_fp32") and dist.get_rank() == 0:
        result["from_checkpoint"] = zero_to_fp32(trainer)
    return result


def is_same_on_ranks(values: torch.Tensor) -> bool:
    others = values.clone()
    dist.broadcast(others, src=0)
    is_same = torch.tensor(torch.equal(others, values))
    dist.all_reduce(is_same, op=dist.ReduceOp.MIN)
    return bool(is_same)


def storages() -> dict[int, int]:
    """The bytes of what tensors that Python knows lie in, by address."""
    found = {}
    for tensor in gc.get_objects():
        if issubclass(type(tensor), torch.Tensor):
            for held in (tensor, tensor.grad if tensor.is_leaf else None):
                if held is not None:
                    storage = getattr(held, "_local_tensor", held).untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found


class Holds(TrainerCallback):
    """
    The most that is held of weights, gradients, optimizer states and masters, at the start of a forward or before the
    optimizer steps.
    """

    def __init__(self, trainer: Trainer):
        data = {v.untyped_storage().data_ptr() for sample in trainer.train_dataset for v in sample.values()}
        self.trainer, self.data, self.bytes, self._is_hooked = trainer, data, 0, False
        trainer.model.register_forward_pre_hook(self.measure)

    def measure(self, *_: Any) -> None:
        gc.collect()
        held = sum(size for pointer, size in storages().items() if pointer not in self.data)
        self.bytes = max(self.bytes, held)

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.measure()

    def on_step_begin(self, *args, **kwargs):
        if self.trainer.is_deepspeed_enabled and not self._is_hooked:  # which steps at the end of backward
            self._is_hooked = True
            optimizer = self.trainer.model_wrapped.optimizer
            step = optimizer.step
            optimizer.step = lambda *args, **kwargs: (self.measure(), step(*args, **kwargs))[1]


class Generates(TrainerCallback):
    """Lets the model generate between steps, as an evaluation with `predict_with_generate` does."""

    def __init__(self):
        self.tokens: list[list[int]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.eval()
        with torch.no_grad():
            tokens = model.generate(
                torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False, synced_gpus=True, pad_token_id=0
            )
        model.train()
        self.tokens.append(tokens[0].tolist())


def zero_to_fp32(trainer: Trainer) -> torch.Tensor:
    """The weights that DeepSpeed's own tool puts together from the last checkpoint, as `full_weights`."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    state_dict = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    return torch.cat([state_dict[name].double().flatten() for name, _ in trainer.model.named_parameters()])


def reset(environment: dict[str, str]) -> None:
    """Forget the engine of the case before; the process group stays."""
    gc.collect()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    os.environ.clear()
    os.environ.update(environment)


def allow_fp16_on_cpu() -> None:
    # DeepSpeed asks whether the CPU multiplies fp16 fast. The arithmetic is there without.
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def save_and_end(result: dict[str, Any], path: Path) -> None:
    """Rank 0 saves; then all ranks end together. Does not return."""
    if dist.get_rank() == 0:
        torch.save(result, path)
    dist.barrier()
    dist.destroy_process_group()
    # Models and engines hold their groups on. A thread of gloo that is late to free a tensor would ask for the lock of
    # an interpreter that is being torn down, and abort the process (pytorch/pytorch#190489).
    sys.stdout.flush()
    os._exit(0)


def run_all(run: Callable[[Any, Path, str], dict[str, Any]], cases: dict[str, Any], folder: Path) -> None:
    """Save what `run` returns for each case, or the error that it raised, and leave the process group."""
    environment = dict(os.environ)
    results = {}
    # Each run collects garbage several times, which is slow over all that the imported modules hold.
    gc.freeze()
    for name, case in cases.items():
        try:
            results[name] = run(case, folder, name)
        except Exception:
            traceback.print_exc()  # the other rank may wait for this one in a collective until the launch is ended
            results[name] = {"error": traceback.format_exc()}
        reset(environment)
    save_and_end(results, folder / "results.pt")


def main(cases_file: str, output: str) -> None:
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    allow_fp16_on_cpu()
    run_all(run_case, json.loads(Path(cases_file).read_text()), Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
