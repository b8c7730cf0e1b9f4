"""
Trains a small decoder under ZeRO-3 with Ulysses, which shares each sequence between all ranks of the launch.

    torchrun --nproc_per_node 2 sequence_worker.py cases.json output_folder

One case a launch: DeepSpeed changes transformers' attention and makes its groups once a process.
"""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from mesh_worker import allow_meshes_on_cpu, make_decoder
from runs import logs_of, make_args
from tiny import LENGTH, collate, make_data
from worker import RANK_TIMEOUT, deepspeed_config, full_weights, run_all

from hf_gnp import GNPTrainer


def collate_with_positions(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A rank has a part of each sequence, and cannot count its positions."""
    return {**collate(samples), "position_ids": torch.arange(LENGTH).repeat(len(samples), 1)}


def run_case(case: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    lengths = {"sp_seq_length": LENGTH, "sp_seq_length_is_variable": True, "sp_attn_implementation": "sdpa"}
    handler = DeepSpeedSequenceParallelConfig(**lengths)
    parallelism = ParallelismConfig(sp_size=dist.get_world_size(), sp_backend="deepspeed", sp_handler=handler)
    args = make_args(
        folder / name,
        ddp_backend="gloo",
        parallelism_config=parallelism,
        deepspeed=deepspeed_config("fp32", {"stage": 3}),
        **case["args"],
    )
    model, data = make_decoder("llama"), make_data("llama")
    trainer = GNPTrainer(model=model, args=args, train_dataset=data, data_collator=collate_with_positions)
    trainer.train()
    logs = logs_of(trainer, "loss", "grad_norm", "gnp_grad_norm", "gnp_perturbed_loss")
    return {"weights": full_weights(trainer.model), "logs": logs}


def main(cases_file: str, output: str) -> None:
    dist.init_process_group("gloo", timeout=RANK_TIMEOUT)
    deepspeed.init_distributed(dist_backend="gloo")
    allow_meshes_on_cpu()
    run_all(run_case, json.loads(Path(cases_file).read_text()), Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
