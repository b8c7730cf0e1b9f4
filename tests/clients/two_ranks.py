"""
Trains clients on every rank of one launch, plainly and with the penalty off or moving nothing; rank 0 saves all.

    torchrun --nproc_per_node 2 two_ranks.py output_folder
"""

import itertools
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from builders import llama, make_client
from worker import ENGINES, deepspeed_config, full_weights, run_all


CLIENTS_ON_RANKS = ("sft-completion-only", "dpo")
ENGINES_OF_CLIENTS = ("ddp", "zero2")
PENALTIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha0": {"gnp_alpha": 0.0},
    "unmoved": {"gnp_alpha": 1.0, "gnp_r": 1e-30},
}


def run(case: tuple[str, str, str], folder: Path, _: str) -> dict[str, Any]:
    client, engine, penalty = case
    args: dict[str, Any] = {"ddp_backend": "gloo", "bf16": False, **PENALTIES[penalty]}
    if ENGINES[engine]:
        args["deepspeed"] = deepspeed_config("fp32", ENGINES[engine])
    trainer = make_client(client, folder, **args)
    trainer.train()
    return {
        "weights": full_weights(trainer.model),
        "masters": full_weights(trainer.model, masters=True),
        "history": trainer.state.log_history,
    }


def main(output: str) -> None:
    folder = Path(output)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        llama(folder)  # saves it, which other ranks never do, and they load it
    dist.barrier()
    cases = itertools.product(CLIENTS_ON_RANKS, ENGINES_OF_CLIENTS, PENALTIES)
    run_all(run, {"-".join(case): case for case in cases}, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
