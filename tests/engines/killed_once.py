"""
Trains a case. In the second pass of a chosen step, rank 1 kills itself, the first time that it comes there; started
again by the launcher, all ranks go on from the last checkpoint.

    torchrun --nproc_per_node 2 --max_restarts 1 killed_once.py case.json output_folder
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from runs import is_perturbed
from worker import RANK_TIMEOUT, full_weights, make_trainer, save_and_end


KILLED_AT = 2  # the step, of which a checkpoint was just written


def main(case_file: str, output: str) -> None:
    # The launcher's store outlives the first start in torch 2.13, and gloo would find the addresses of the dead in it.
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    store, rank, size = next(dist.rendezvous("env://", timeout=RANK_TIMEOUT))
    store = dist.PrefixStore(f"attempt{attempt}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=RANK_TIMEOUT)
    folder = Path(output)
    trainer = make_trainer(json.loads(Path(case_file).read_text()), folder, "run")
    killed = folder / "killed"

    def kill(*_: Any) -> None:
        is_here = trainer.state.global_step == KILLED_AT and dist.get_rank() == 1
        if is_perturbed(trainer) and is_here and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.model.register_forward_pre_hook(kill)
    trainer.train(resume_from_checkpoint=attempt != "0")
    save_and_end({"weights": full_weights(trainer.model), "attempt": attempt}, folder / "result.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
