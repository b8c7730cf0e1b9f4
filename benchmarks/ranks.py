"""
What a step of one engine communicates and holds, on several ranks: `cost.py --ranks` launches it for each.

    torchrun --nproc_per_node 2 benchmarks/ranks.py --model vit-s16-small --engine zero2 --contender gnp --output FILE
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from contenders import SameBatch, make_arguments
from loops import TRAINERS
from meters import CountCollectives, StepProfile
from models import CASES, make_case
from transformers import Trainer, TrainerCallback
from transformers.distributed import DistributedConfig


CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "deepspeed"
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
COUNTED_STEPS = 2
LAST_COUNTED = CountCollectives.first_step + COUNTED_STEPS


class ProfileLastSteps(TrainerCallback):
    """The peaks of the steps after those that are counted."""

    def __init__(self):
        self.peaks: list[int] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= LAST_COUNTED:
            self.profile = StepProfile(args.device, times_operations=False).__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > LAST_COUNTED:
            self.profile.__exit__(None, None, None)
            self.peaks.append(self.profile.peak)


def deepspeed_config(engine: str, model: torch.nn.Module) -> dict[str, Any]:
    config = json.loads((CONFIGS / f"{engine}.json").read_text(encoding="utf-8"))
    if engine != "zero3":
        # DeepSpeed allocates whole buckets; those of the file would hide what a small model holds besides.
        config["zero_optimization"]["reduce_bucket_size"] = sum(p.numel() for p in model.parameters()) // 8
    return config


def make_trainer(args: argparse.Namespace, folder: Path) -> Trainer:
    make_model, batch = make_case(CASES[args.model], torch.device("cpu"))
    model = make_model()
    if args.engine == "fsdp2":
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
        dist.barrier()
        sharding = DistributedConfig(fsdp_size=dist.get_world_size())
        model = type(model).from_pretrained(folder, distributed_config=sharding)
    on_gpu, size = torch.cuda.is_available(), len(batch["labels"])
    kwargs = {"cls": Trainer, **TRAINERS[args.contender]}
    training_args = make_arguments(
        **kwargs,
        output_dir=str(folder),
        max_steps=LAST_COUNTED + args.steps,
        per_device_train_batch_size=size,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        deepspeed=deepspeed_config(args.engine, model) if args.engine.startswith("zero") else None,
        ddp_backend="nccl" if on_gpu else "gloo",
        optim="adamw_torch",
    )
    data = SameBatch(batch, training_args.max_steps * size * dist.get_world_size())
    return kwargs["cls"](model=model, args=training_args, train_dataset=data, data_collator=lambda rows: rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CASES, required=True)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--contender", choices=TRAINERS, required=True)
    parser.add_argument(
        "--steps", type=int, required=True, help="Profiled steps. On a busy CPU gloo spoils two of three."
    )
    parser.add_argument("--output", required=True, help="A JSON file, in a folder that other files may come into.")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    counter, profile = CountCollectives(LAST_COUNTED), ProfileLastSteps()
    trainer = make_trainer(args, Path(args.output).parent)
    for callback in (counter, profile):
        trainer.add_callback(callback)
    trainer.train()
    result = {
        "bytes": {name: size / COUNTED_STEPS for name, size in counter.bytes.items()},
        # On a CPU, what a thread of gloo frees, the profiler takes for never freed.
        "peak": max(profile.peaks) if trainer.args.device.type == "cuda" else min(profile.peaks),
        "peaks": profile.peaks,
        "weight_bytes": sum(getattr(p, "ds_numel", p.numel()) * 4 for p in trainer.model.parameters()),
    }
    if dist.get_rank() == 0:
        Path(args.output).write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    # A thread of gloo that is late to free a tensor would abort an interpreter that is torn down (pytorch#190489).
    os._exit(0)


def launch(model: str, engine: str, contender: str, ranks: int, steps: int) -> dict[str, Any]:
    """The result of `main` on `ranks` processes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        flags = ["--model", model, "--engine", engine, "--contender", contender, "--steps", str(steps)]
        done = subprocess.run(
            [*command, __file__, *flags, "--output", str(output)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{engine} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
