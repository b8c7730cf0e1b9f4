"""
Trains a small decoder on a device mesh, on every rank of one launch, and saves what rank 0 saw of each case.

    torchrun --nproc_per_node 4 mesh_worker.py cases.json output_folder
"""

import inspect
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import parallelism_config, state
from runs import make_args
from tiny import collate, make_data
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig
from worker import RANK_TIMEOUT, FaultyLoss, ForwardFirst, run_all, trained, trainer_class


# Of sizes that four divides: tensor parallelism shards heads.
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4}
EXPERTS = {"num_experts_per_tok": 2}


def make_decoder(kind: str, loaded_from: Any = None, **kwargs: Any) -> PreTrainedModel:
    """A decoder with seeded weights, or one that `from_pretrained` loads. Kinds: llama, llama-tied, mixtral, qwen3."""
    torch.manual_seed(0)
    if kind == "mixtral":
        model_class, config = MixtralForCausalLM, MixtralConfig(num_local_experts=4, **EXPERTS, **SIZES)
    elif kind == "qwen3":
        narrow = {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, **EXPERTS}
        model_class, config = Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES, **narrow)
    else:
        model_class, config = LlamaForCausalLM, LlamaConfig(tie_word_embeddings=kind == "llama-tied", **SIZES)
    return model_class(config) if loaded_from is None else model_class.from_pretrained(loaded_from, **kwargs)


def allow_meshes_on_cpu() -> None:
    """
    accelerate asks for a GPU wherever a mesh is used, and for FSDP; the collectives are there without. In this process
    only.
    """
    check = parallelism_config.ParallelismConfig
    lift(parallelism_config, check, "_validate_accelerator", "if self.total_size > 1 and not (", "if False and not (")
    on_gpus = "DistributedType.MULTI_NEURON,"
    lift(state, state.AcceleratorState, "__init__", on_gpus, f"{on_gpus} DistributedType.MULTI_CPU,")


def lift(module: ModuleType, owner: type, name: str, condition: str, instead: str) -> None:
    """Put a method in the place of the owner's own, in which the condition is another."""
    source = inspect.getsource(getattr(owner, name))
    assert source.count(condition) == 1
    names: dict[str, Any] = {}
    exec(inspect.cleandoc(f"\n{source}").replace(condition, instead), vars(module), names)
    setattr(owner, name, names[name])


def load_decoder(case: dict[str, Any], folder: Path) -> PreTrainedModel:
    kind, dtype = case["kind"], getattr(torch, case.get("dtype", "float32"))
    if "distributed" not in case:
        return make_decoder(kind).to(dtype)
    path = folder / kind
    if dist.get_rank() == 0 and not path.exists():
        make_decoder(kind).save_pretrained(path)
    dist.barrier()
    return make_decoder(kind, path, dtype=dtype, distributed_config=DistributedConfig(**case["distributed"]))


def differs(model: torch.nn.Module) -> list[str]:
    """The parameters that are not the same on all ranks when each puts them together from the shards it can reach."""
    names = []
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        others = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
        dist.all_gather(others, whole.detach().contiguous())
        if not all(torch.equal(other, others[0]) for other in others):
            names.append(name)
    return names


class ComparesRanks:
    """Notes which parameters differ between ranks at each forward, the moved ones of the second pass too."""

    seen: SimpleNamespace  # out of reach of the replay, which puts a trainer's own lists back

    def compute_loss(self, *args, **kwargs):
        self.seen.differs.append(differs(self.model))
        return super().compute_loss(*args, **kwargs)


SPECIAL = {"faults": FaultyLoss, "compare_ranks": ComparesRanks, "forward_first": ForwardFirst}


def run_case(case: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    stock, faults = case.get("stock", False), case.get("faults")
    args = make_args(folder / name, *([TrainingArguments] if stock else []), ddp_backend="gloo", **case["args"])
    cls = trainer_class(case, SPECIAL)
    data = make_data("llama", case.get("size", 48))
    model = load_decoder(case, folder)
    options: dict[str, Any] = {"eval_dataset": data[:8]} if "eval_strategy" in case["args"] else {}
    if "momentum" in case:
        options["optimizer_cls_and_kwargs"] = (
            torch.optim.SGD,
            {"lr": args.learning_rate, "momentum": case["momentum"]},
        )
    trainer = cls(model=model, args=args, train_dataset=data, data_collator=collate, **options)
    trainer.seen, trainer.faults = SimpleNamespace(calls={}, differs=[]), faults
    return trained(trainer, case, folder) | {"differs": trainer.seen.differs}


def main(cases_file: str, output: str) -> None:
    dist.init_process_group("gloo", timeout=RANK_TIMEOUT)
    allow_meshes_on_cpu()
    run_all(run_case, json.loads(Path(cases_file).read_text()), Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
