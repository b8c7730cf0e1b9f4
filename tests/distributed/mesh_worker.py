"""
Trains a small decoder on a device mesh, on every rank of one launch, and saves what rank 0 saw of each case.

    torchrun --nproc_per_node 2 mesh_worker.py cases.json output_folder
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import parallelism_config
from runs import logs_of, make_args
from tiny import collate, make_data
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from worker import full_weights, run_all

from hf_gnp import GNPTrainer


def make_decoder(tied: bool = False) -> LlamaForCausalLM:
    """Of sizes that two divides: tensor parallelism shards heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=tied, **sizes))


def allow_meshes_on_cpu() -> None:
    """accelerate asks for a GPU wherever a mesh is used; the collectives are there without. In this process only."""
    check = inspect.getsource(parallelism_config.ParallelismConfig._validate_accelerator)
    condition = "if self.total_size > 1 and not ("
    assert condition in check
    names: dict[str, Any] = {}
    lifted = inspect.cleandoc(f"\n{check}").replace(condition, "if False and not (")
    exec(lifted, vars(parallelism_config), names)
    parallelism_config.ParallelismConfig._validate_accelerator = names["_validate_accelerator"]


def run_case(case: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}-start"
    if dist.get_rank() == 0:
        make_decoder(case["tied"]).save_pretrained(path)
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(
        path, dtype=torch.float32, distributed_config=DistributedConfig(**case["distributed"])
    )
    args = make_args(folder / name, ddp_backend="gloo", **case["args"])
    trainer = GNPTrainer(model=model, args=args, train_dataset=make_data("llama"), data_collator=collate)
    trainer.train()
    logs = logs_of(trainer, "loss", "gnp_grad_norm", "gnp_perturbed_loss")
    return {"weights": full_weights(trainer.model), "logs": logs}


def main(cases_file: str, output: str) -> None:
    dist.init_process_group("gloo")
    allow_meshes_on_cpu()
    run_all(run_case, json.loads(Path(cases_file).read_text()), Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
