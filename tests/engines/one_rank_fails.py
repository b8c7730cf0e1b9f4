"""
The second pass fails on rank 0 alone. Its handler looks at the weights, saves, and lets the error go on.

    torchrun --nproc_per_node 2 one_rank_fails.py ENGINE output_folder
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from runs import engine_of
from worker import RANK_TIMEOUT, make_trainer


def local_weights(model: torch.nn.Module, engine: str) -> list[torch.Tensor]:
    """What this rank holds: whole weights, or its shards."""
    if engine == "zero3":
        return [p.ds_tensor.detach().clone() for p in model.parameters()]
    return [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]


def main(engine: str, output: str) -> None:
    dist.init_process_group("gloo", timeout=RANK_TIMEOUT)
    if engine.startswith(("zero1", "zero2")):
        from hf_gnp.engines.deepspeed import zero12

        zero12.FAILED_RANKS_TIMEOUT = timedelta(seconds=5)
    args = {"gradient_accumulation_steps": 2, "gnp_alpha": 0.8}
    case = {"engine": engine, "kind": "vit", "args": args, "faults": {"1.4@0": "raise"}}
    trainer = make_trainer(case, Path(output), engine)
    start: list[torch.Tensor] = []
    compute_loss = trainer.compute_loss

    def remember_start(*args, **kwargs):
        if trainer.state.global_step == 1 and not start:
            start.extend(local_weights(trainer.model, engine))
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = remember_start
    try:
        trainer.train()
    except RuntimeError as error:
        report = {"rank": dist.get_rank(), "error": str(error)}
        now = local_weights(trainer.model, engine)
        report["clean"] = all(torch.equal(a, b) for a, b in zip(now, start, strict=True))
        if engine.startswith(("zero1", "zero2")):
            pairs = engine_of(trainer).partitions()  # still there: other ranks' parts are moved
            report["own_partition_clean"] = all(torch.equal(weight, master) for weight, master in pairs)
        if dist.get_rank() == 0 and engine in ("ddp", "zero2"):
            try:
                trainer.save_model(f"{output}/saved")
            except RuntimeError as refusal:
                report["refused"] = str(refusal)
        Path(output, f"report{dist.get_rank()}.json").write_text(json.dumps(report))
        torch.save(start, Path(output, f"start{dist.get_rank()}.pt"))
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
