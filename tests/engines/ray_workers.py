"""
Trains with `GNPTrainer` on two workers of Ray Train, through `prepare_trainer`; worker 0 saves the weights.

    python ray_workers.py output_folder
"""

import sys
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.huggingface.transformers import prepare_trainer
from ray.train.torch import TorchConfig, TorchTrainer
from runs import MICRO_BATCH, make_trainer
from tiny import flat_weights


def train(config: dict[str, Any]) -> None:
    args = {"max_steps": 3, "per_device_train_batch_size": MICRO_BATCH // 2, "ddp_backend": "gloo"}
    trainer = prepare_trainer(make_trainer(config["folder"], "vit", **args))
    trainer.train()
    if ray.train.get_context().get_world_rank() == 0:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {"weights": flat_weights(trainer.model), "history": history, "ranks": trainer.args.world_size}
        torch.save(result, Path(config["folder"]) / "result.pt")


def main(folder: str) -> None:
    ray.init(num_cpus=2, include_dashboard=False)
    scaling = ray.train.ScalingConfig(num_workers=2, use_gpu=False)
    storage = ray.train.RunConfig(storage_path=folder)
    TorchTrainer(
        train,
        train_loop_config={"folder": folder},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=scaling,
        run_config=storage,
    ).fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
