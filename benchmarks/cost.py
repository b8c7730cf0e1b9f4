"""
What a penalised step costs, against plain training and against the loops that a user would write instead.

    python benchmarks/cost.py --model vit-s16-small bert-base-small
        On a CPU. Of the other models on a GPU: vit-s16, vit-b16, bert-base, llama-1b (with --contenders: each holds
        its own weights and optimizer states).
    python benchmarks/cost.py --model many-modules many-modules-2000 bert-tiny
        Host time: models with next to no work in them.
    python benchmarks/cost.py --sweep
        How what the penalty adds beyond the second pass grows with parameters and accumulation steps.
    python benchmarks/cost.py --model vit-s16-small --ranks 2
        What engines of several ranks (--engines) communicate in a step, and hold at its peak.

All contenders train the same model on the same batch in one process, and their steps alternate, in rounds of one step
each and in another order each round. Trainers run their real `train()`, a thread each, one at a time; a step is a
whole turn of its loop. Ratios are taken within a round, to stock `Trainer`; k rounds hold one penalised step at
interval k, and the two kinds of its steps are weighted 1 : k-1. Prints tables, writes cost_<model>.json and .png.

`pytorch_optimizer` (pip install pytorch_optimizer) is a contender only; nothing else needs it. matplotlib draws.
"""

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from contenders import Contender, Settings, Step
from cost_report import QUARTILES, draw, print_report, spread, summarise, write
from loops import CONTENDERS, make_contender
from meters import StepProfile, bytes_sent, measure_matmul_rate
from models import CASES, SWEEP, Case, items_per_step, make_case
from ranks import ENGINES, launch
from torch.utils.flop_counter import FlopCounterMode


LAP = 10  # the longest interval: so many steps hold the same share of penalised ones for each
BEFORE = 3 * LAP  # at most: to warm up, to count FLOPs, to profile


def alternate(contenders: dict[str, Contender], rounds: int) -> dict[str, list[Step]]:
    steps: dict[str, list[Step]] = {name: [] for name in contenders}
    generator = np.random.default_rng(0)
    for _ in range(rounds):
        # Another order each time: a step takes longer after some contenders than after others.
        for name in generator.permutation(list(contenders)):
            steps[name].append(contenders[name].step())
    return steps


def compare(names: Sequence[str], settings: Settings, time_passes: bool = False) -> dict[str, dict[str, Any]]:
    """Per contender: steps, FLOPs a step, the peak memory of one, and the mean time of its operations."""
    # Of all of them or none: on a GPU, timing waits for it.
    kwargs = {"time_passes": True} if time_passes else {}
    contenders = {name: make_contender(name, settings, **kwargs) for name in names}
    results: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        for _ in range(LAP):  # a run probes its first penalised step
            contender.step()
        flops = 0
        for _ in range(contender.interval):  # any so many steps hold one penalised step
            counter = FlopCounterMode(display=False)
            contender.step(counter)
            flops += counter.get_total_flops()
        profiles = [StepProfile(settings.device) for _ in range(contender.interval)]
        for profile in profiles:
            contender.step(profile)
        operations = {operation for profile in profiles for operation in profile.seconds}
        results[name] = {
            "interval": contender.interval,
            "flops": flops / contender.interval,
            "peak": max(profile.peak for profile in profiles),
            "profile": {
                o: sum(profile.seconds.get(o, 0.0) for profile in profiles) / len(profiles) for o in operations
            },
        }
    rounds = settings.steps - BEFORE
    steps = alternate(contenders, rounds)
    for name, contender in contenders.items():
        results[name]["steps"] = steps[name]
        if contender.passes is not None:
            results[name]["passes"] = contender.passes[-rounds:]
        contender.close()
    return results


def beyond_two_passes(plain: dict[str, float], other: dict[str, float], count: int = 12) -> list[dict[str, Any]]:
    """The operations that take more time in `other` than in two plain steps, and those that take less."""
    beyond = {name: other.get(name, 0.0) - 2 * plain.get(name, 0.0) for name in plain | other}
    largest = sorted(beyond, key=lambda name: -abs(beyond[name]))[:count]
    return [{"operation": n, "plain": plain.get(n, 0.0), "penalised": other.get(n, 0.0)} for n in largest]


def make_settings(args: argparse.Namespace, case: Case, accumulation: int, folder: str) -> Settings:
    make_model, batch = make_case(case, args.device, args.batch_size)
    return Settings(
        make_model=make_model,
        batch=batch,
        device=args.device,
        steps=BEFORE + args.steps,
        output_dir=folder,
        bf16=args.bf16,
        accumulation=accumulation,
        optimizer=args.optimizer,
    )


def run_model(args: argparse.Namespace, name: str, folder: str) -> None:
    case = CASES[name]
    settings = make_settings(args, case, args.accumulation, folder)
    weights = list(settings.make_model().parameters())
    rate = None
    if args.device.type == "cuda":
        rate = measure_matmul_rate(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    # A chain of linear layers has no norm layer to move alone.
    contenders = [who for who in args.contenders if case.kind != "modules" or who != "gnp_norm_only"]
    results = compare(list(dict.fromkeys(["plain", *contenders])), settings)
    unit, items = items_per_step(case, settings.batch, args.accumulation)
    rows = summarise(results, items, sum(p.nbytes for p in weights), rate)
    report = describe_steps(args, settings) | {
        "model": name,
        "parameters": sum(p.numel() for p in weights),
        "unit": unit,
        "rows": rows,
    }
    if "gnp" in results:
        report["beyond_two_passes"] = beyond_two_passes(results["plain"]["profile"], results["gnp"]["profile"])
    print_report(report, args.profile)
    write(args.output_dir, f"cost_{name}{args.label}", report)
    draw(rows, name, Path(args.output_dir) / f"cost_{name}{args.label}.png")


def run_sweep(args: argparse.Namespace, folder: str) -> None:
    """What the penalty adds to a step beyond the second pass, in shares of a plain step."""
    points = [(size, 1) for size in args.sweep_sizes] + [(args.sweep_sizes[0], n) for n in args.sweep_accumulation]
    rows = []
    print("| parameters | accumulated | × plain | beyond the second pass, of a plain step | ns a parameter |")
    print("|---|---|---|---|---|")
    for size, accumulation in dict.fromkeys(points):
        settings = make_settings(args, SWEEP[size], accumulation, folder)
        parameters = sum(p.numel() for p in settings.make_model().parameters())
        results = compare(["plain", "gnp"], settings, time_passes=True)
        walls = {name: np.array([step.wall for step in result["steps"]]) for name, result in results.items()}
        beyond = walls["gnp"] - walls["plain"] - np.array(results["plain"]["passes"])
        row = {
            "parameters": parameters,
            "accumulation": accumulation,
            "ratio": np.percentile(walls["gnp"] / walls["plain"], QUARTILES).tolist(),
            "beyond_second_pass": np.percentile(beyond / walls["plain"], QUARTILES).tolist(),
            "beyond_ns_per_parameter": float(np.median(beyond)) / parameters * 1e9,
        }
        rows.append(row)
        print(
            f"| {parameters / 1e6:.1f}M | {accumulation} | {spread(row['ratio'])} "
            f"| {spread(row['beyond_second_pass'], 100, 1)}% | {row['beyond_ns_per_parameter']:.2f} |",
            flush=True,
        )
    write(args.output_dir, f"cost_sweep{args.label}", describe(args) | {"steps": args.steps, "rows": rows})


def run_ranks(args: argparse.Namespace, name: str) -> None:
    """What a rank sends in a step by engine, and the peak of rank 0 over that of plain training."""
    rows = []
    print(f"\n{name}, {args.ranks} ranks, rank 0")
    print("| engine | MB sent a step, plain | penalised | ratio | peak over plain, α = 0.8 | α = 1 |")
    print("|---|---|---|---|---|---|")
    for engine in args.engines:
        plain, gnp, sam = (launch(name, engine, who, args.ranks, args.steps) for who in ("plain", "gnp", "sam"))
        sent = [bytes_sent(run["bytes"], args.ranks) for run in (plain, gnp)]
        over_plain = [(other["peak"] - plain["peak"]) / plain["weight_bytes"] for other in (gnp, sam)]
        rows.append({"engine": engine, "plain": plain, "gnp": gnp, "sam": sam, "bytes_sent": sent})
        rows[-1] |= {"bytes_ratio": sent[1] / sent[0], "peak_over_plain_in_weights": over_plain}
        print(
            f"| {engine} | {sent[0] / 1e6:.3f} | {sent[1] / 1e6:.3f} | {sent[1] / sent[0]:.3f} "
            f"| {over_plain[0]:+.2f} × weights | {over_plain[1]:+.2f} × weights |",
            flush=True,
        )
    report = describe(args) | {"model": name, "ranks": args.ranks, "rows": rows}
    write(args.output_dir, f"cost_{name}_{args.ranks}_ranks{args.label}", report)


def describe(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bf16": args.bf16,
    }


def describe_steps(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    return describe(args) | {
        "steps": args.steps,
        "batch_size": settings.batch_size,
        "accumulation": settings.accumulation,
        "optimizer": f"AdamW {args.optimizer}",
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=CASES, help="Default: the ones for this device.")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="Plain is always in.")
    parser.add_argument("--steps", type=int, default=30, help=f"Timed steps of each, a multiple of {LAP}.")
    parser.add_argument("--batch_size", type=int, help="Examples a micro-batch. Default: the model's.")
    parser.add_argument("--accumulation", type=int, default=1, help="Micro-batches a step.")
    parser.add_argument("--optimizer", choices=("foreach", "fused"), default="foreach", help="Kind of AdamW.")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="Autocast. Default: on a GPU.")
    parser.add_argument("--profile", action="store_true", help="Print what takes longer than in two plain steps.")
    parser.add_argument("--sweep", action="store_true", help="Vary parameters and accumulation steps instead.")
    parser.add_argument("--sweep_sizes", nargs="+", choices=SWEEP, help="Default: 1M … 1000M, or … 10M on a CPU.")
    parser.add_argument("--sweep_accumulation", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--ranks", type=int, help="Launch so many processes for each of --engines instead.")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--label", default="", help="Added to the names of the files that are written.")
    parser.add_argument("--output_dir", default="outputs/benchmarks")
    args = parser.parse_args()
    if args.sweep and (args.ranks or args.model or args.accumulation > 1):
        parser.error("--sweep has its own models and accumulation steps, and no --ranks.")
    if args.steps % LAP or args.steps < LAP:
        parser.error(f"--steps must be a multiple of {LAP}, so that each interval has its share of penalised steps.")
    on_gpu = torch.cuda.is_available()
    args.device = torch.device("cuda" if on_gpu else "cpu")
    args.bf16 = on_gpu if args.bf16 is None else args.bf16
    args.model = args.model or (["vit-b16", "bert-base"] if on_gpu else ["vit-s16-small", "bert-base-small"])
    args.sweep_sizes = args.sweep_sizes or list(SWEEP)[: None if on_gpu else 3]
    return args


def main() -> None:
    args = parse_args()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        if args.sweep:
            run_sweep(args, folder)
        else:
            for name in args.model:
                run_ranks(args, name) if args.ranks else run_model(args, name, folder)


if __name__ == "__main__":
    main()
