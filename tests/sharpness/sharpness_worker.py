"""
Measures sharpness during and after training on every rank of one launch, and saves what rank 0 saw of each case.

    torchrun --nproc_per_node 2 sharpness_worker.py cases.json output_folder
"""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from worker import full_weights, make_trainer, reset, run_all

from hf_gnp import SharpnessCallback, plot_loss_surface


METRICS = ("l2", "layer", "element")


class Interrupted(Exception):
    pass


def run_case(case: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    plain = make_trainer(case, folder, name)
    plain.train()
    result: dict[str, Any] = {"plain_weights": full_weights(plain.model)}
    del plain
    reset(dict(os.environ))

    trainer = make_trainer(case, folder, name)
    options = case["options"]
    trainer.eval_dataset = trainer.train_dataset
    if case["engine"] == "ddp":
        result["before_training"] = trainer.measure_sharpness(**options)
    if trainer.is_deepspeed_enabled:
        try:
            trainer.measure_sharpness(**options)
        except RuntimeError as error:
            result["before_training"] = str(error)
    trainer.add_callback(SharpnessCallback(every=2, **options))
    trainer.train()
    result["weights"] = full_weights(trainer.model)
    result["logged"] = [entry for entry in trainer.state.log_history if "sharpness_loss" in entry]
    trainer.evaluate()  # FSDP2's root stays gathered
    result["measured"] = trainer.measure_sharpness(**options)
    picture = {"points": 3, "distance": 0.1, "samples": options["samples"]}
    result["picture"] = plot_loss_surface(trainer, folder / f"{name}.png", **picture)["slices"][0]["losses"]
    measure = functools.partial(trainer.measure_sharpness, **options)
    result["interrupted"] = [interrupted(trainer, measure, call) for call in case["interrupted_at"]]
    use_dropout(trainer.model)
    find_r = functools.partial(trainer.find_r, repeated(trainer.train_dataset), log=False, **case["find_r"])
    result["find_r"] = {metric: find_r(metric=metric) for metric in METRICS}
    # The first gradient, and one at moved weights.
    result["interrupted"] += [interrupted(trainer, find_r, call) for call in (1, 10)]
    result["after_measuring"] = full_weights(trainer.model)
    return result


def use_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1


def repeated(data: list[Any]) -> list[Any]:
    """The first samples again and again: batches of these have descent in common."""
    return data[:3] * 16


def interrupted(trainer: Any, measure: Callable[[], Any], call: int) -> torch.Tensor:
    """The weights after a measurement whose given forward failed on all ranks."""
    calls, compute_loss = 0, type(trainer).compute_loss

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Interrupted
        return compute_loss(trainer, *args, **kwargs)

    trainer.compute_loss = failing
    try:
        measure()
    except Interrupted:
        return full_weights(trainer.model)
    finally:
        del trainer.compute_loss
    raise AssertionError(f"there was no forward {call}")


def main(cases_file: str, output: str) -> None:
    dist.init_process_group("gloo")
    run_all(run_case, json.loads(Path(cases_file).read_text()), Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
