"""
Trains a case once, with the engine that the launcher chose; rank 0 saves the result.

    accelerate launch --config_file ... train_once.py case.json output_folder
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from held import record_held_bytes
from runs import engine_of, logs_of
from worker import full_weights, make_trainer, save_and_end


def main(case_file: str, output: str) -> None:
    trainer = make_trainer(json.loads(Path(case_file).read_text()), Path(output), "run")
    held = record_held_bytes(trainer)
    engines: set[str] = set()
    trainer.model.register_forward_pre_hook(lambda *_: engines.add(type(engine_of(trainer)).__name__))
    trainer.train()
    held_by_rank: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(held_by_rank, max(held))
    result = {
        "weights": full_weights(trainer.model),
        "logs": logs_of(trainer, "loss", "gnp_grad_norm", "gnp_perturbed_loss"),
        "engine": "/".join(engines),
        "held_bytes": held_by_rank,
    }
    save_and_end(result, Path(output) / "result.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
