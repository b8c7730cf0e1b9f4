"""The benchmark scripts on tiny models and data: the numbers that do not depend on the machine, and what is kept."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fork import SERVER, fork_script
from launch import environment
from tiny import make_model, save_tokenizer


datasets = pytest.importorskip("datasets", reason="the benchmarks read parquet with it")
pytest.importorskip("scipy", reason="the benchmarks test with it")

import cost  # noqa: E402
import study  # noqa: E402
from studies import (  # noqa: E402
    calibration,
    catalogue,
    forgetting,
    images,
    labels,
    methods,
    quantisation,
    report,
    statistics,
    store,
    training,
)


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TIMEOUT = 1200
CONTENDERS = ("gnp", "sam", "gnp_interval_2", "loop_sam")
WORDS = ("good", "bad", "film", "plot", "a", "the", "fine", "dull")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Files of the format of ../shared/data: 96 small images, 96 sentences."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    pictures = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    sentences = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    pixels = generator.integers(256, size=(96, 32, 32, 3), dtype=np.uint8)
    image_columns = {"image": list(pixels), "label": generator.integers(10, size=96)}
    texts = [" ".join(generator.choice(WORDS, size=5)) for _ in range(96)]
    text_columns = {"sentence": texts, "label": generator.integers(2, size=96)}
    topics = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(num_classes=4)})
    topic_columns = {"text": texts, "label": generator.integers(4, size=96)}
    files = {
        "cifar10": (image_columns, pictures, ("train", "test")),
        "sst2": (text_columns, sentences, ("train", "validation")),
        "sentiment_shift": (text_columns, sentences, ("test",)),
        "agnews": (topic_columns, topics, ("train", "test")),
    }
    for name, (columns, features, splits) in files.items():
        (folder / name).mkdir()
        for split in splits:
            datasets.Dataset.from_dict(columns, features).to_parquet(folder / name / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vision_model")
    sizes = {"hidden_size": 8, "mlp_ratio": 1, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Dinov2Config(image_size=98, patch_size=14, **sizes)  # takes images of other sizes too
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture
def loud_libraries() -> Iterator[None]:
    """study.py silences them for its process: not for the tests after this one."""
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    save_tokenizer(folder, WORDS)
    make_model("bert", dropout=0.1).bert.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_cost_counts_flops_and_memory(tmp_path):
    pytest.importorskip("matplotlib", reason="the benchmarks draw with it")
    flags = ("--model", "bert-tiny", "--steps", 10, "--contenders", *CONTENDERS)
    output = fork_script(BENCHMARKS / "cost.py", *flags, "--output_dir", tmp_path, timeout=TIMEOUT)
    report = json.loads((tmp_path / "cost_bert-tiny.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["plain", *CONTENDERS]
    flops = {name: row["flops_ratio"] for name, row in rows.items()}
    assert flops == {"plain": 1.0, "gnp": 2.0, "sam": 2.0, "gnp_interval_2": 1.5, "loop_sam": 2.0}
    for name, row in rows.items():
        low, middle, high = row["ratio"]
        assert 0 < low <= middle <= high < math.inf
        assert len(row["steps"]) == 10
        assert f"| {name} |" in output
    # The copy of the weights; the first gradient stays where the second one accumulates, which sam does not need. And
    # the copied inputs of a step.
    assert rows["gnp"]["peak_over_plain_in_weights"] <= 2.1
    assert rows["sam"]["peak_over_plain_in_weights"] <= 1.1
    assert (tmp_path / "cost_bert-tiny.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_cost_counts_bytes_of_ranks(tmp_path, monkeypatch, loud_libraries):
    start = cost.launch

    def launch(model: str, engine: str, contender: str, ranks: int, steps: int) -> dict[str, Any]:
        if contender == "plain":
            return start(model, engine, contender, ranks, steps)
        output = tmp_path / contender / "result.json"  # the others in less time
        output.parent.mkdir()
        flags = ("--model", model, "--engine", engine, "--contender", contender, "--steps", steps, "--output", output)
        fork_script(BENCHMARKS / "ranks.py", *flags, ranks=ranks, timeout=TIMEOUT)
        return json.loads(output.read_text(encoding="utf-8"))

    monkeypatch.setattr(cost, "launch", launch)
    for name, value in environment().items():  # where DeepSpeed finds what it has compiled, say
        monkeypatch.setenv(name, value)
    flags = ("--model", "vit-tiny", "--ranks", "2", "--engines", "zero2", "--steps", "10")
    monkeypatch.setattr(sys, "argv", ["cost.py", *flags, "--output_dir", str(tmp_path)])
    cost.main()
    (row,) = json.loads((tmp_path / "cost_vit-tiny_2_ranks.json").read_text(encoding="utf-8"))["rows"]
    assert row["bytes_ratio"] == pytest.approx(2, rel=1e-3)
    # What is held is counted by tests/engines/test_launches.py: a profiler's figure depends on the machine's load.
    assert all(math.isfinite(peak) for peak in row["peak_over_plain_in_weights"])


@pytest.mark.slow
@pytest.mark.parametrize("name", catalogue.STUDIES)
def test_study_runs_once_and_reports(tmp_path, data, encoder, vision_model, loud_libraries, capsys, name):
    pytest.importorskip("matplotlib", reason="the benchmarks draw with it")
    is_text = next(iter(catalogue.STUDIES[name].cases.values()))["task"] == "sentences"
    flags = [name, "--quick", "--quiet", "--data", str(data), "--output_dir", str(tmp_path)]
    flags += ["--model_path", str(encoder if is_text else vision_model), "--report", *report.REPORTS]
    study.main(flags)
    output = capsys.readouterr().out
    assert "prove nothing" in output and "Nothing is left." in output
    kept = (tmp_path / f"study_{name}.json").read_text(encoding="utf-8")
    runs = json.loads(kept)["runs"]
    assert len(kept.splitlines()) == len(runs) + 2
    reported = [run for run in runs if "best" in run]
    quick = catalogue.quick(catalogue.STUDIES[name])
    assert {(run["method"], run["seed"]) for run in reported} == {(m, s) for m in quick.methods for s in (0, 1)}
    assert {run["seed"] for run in runs if "best" not in run} == set(quick.tuning_seeds)
    for run in reported:
        assert 0 <= run["best"] <= 1 and 0 <= run["calibration_error"] <= 1 and math.isfinite(run["loss_scaled"])
        assert len(run["curve"]) == (2 if run["method"] == methods.TWICE else 1)
        assert ("shift_accuracy" in run) == is_text and ("forgotten" in run) == (name == "forgetting")
    assert (tmp_path / f"study_{name}.png").is_file()
    assert (tmp_path / f"study_{name}.md").read_text(encoding="utf-8").count("| plain |") >= 2

    study.main(flags)
    assert (tmp_path / f"study_{name}.json").read_text(encoding="utf-8") == kept


@pytest.mark.slow
def test_study_in_several_processes(tmp_path, monkeypatch, data, loud_libraries):
    # They would be spawned, which takes longer.
    monkeypatch.setattr(study.multiprocessing, "get_context", lambda _: SERVER)

    def runs_with(jobs: int) -> list[dict]:
        folder = tmp_path / str(jobs)
        flags = ["settings", "--quick", "--quiet", "--data", str(data), "--output_dir", str(folder)]
        study.main([*flags, "--jobs", str(jobs)])
        runs = json.loads((folder / "study_settings.json").read_text(encoding="utf-8"))["runs"]
        runs = [{key: value for key, value in run.items() if key != "cpu_seconds"} for run in runs]
        return sorted(runs, key=lambda run: (run["seed"], run["method"], run["gnp"].get("gnp_r", 0)))

    assert runs_with(2) == runs_with(1)


def test_r_is_chosen_on_other_seeds(tmp_path):
    """The smaller r of two that are as good; and no table before all methods have a seed."""
    settings, name = {"task": "none"}, "m = 8"
    case_study = catalogue.Study({"a": settings}, (methods.PLAIN, name), (0.1, 0.2, 0.4), tuning_seeds=(100, 101))
    runs = store.Store(tmp_path / "runs.json")
    case = study.Case(case_study, settings, runs)

    def add(method: str, seed: int, validation: float, **gnp: float) -> None:
        gnp = methods.METHODS[method].gnp | gnp
        identity = {"method": method, "seed": seed, "settings": settings, "gnp": gnp}
        runs.add(identity | {"validation_best": validation, "best": validation})

    assert len(case.left()) == 3 * 2
    for r, first, second in ((0.1, 0.5, 0.6), (0.2, 0.7, 0.6), (0.4, 0.6, 0.7)):
        add(name, 100, first, gnp_r=r)
        add(name, 101, second, gnp_r=r)
    assert case.chosen()[name].gnp["gnp_r"] == 0.2
    assert {seed for seed, _, _ in case.left()} == set(range(case_study.seeds))
    add(methods.PLAIN, 0, 0.5)
    assert case.reported() == {}
    add(name, 0, 0.9, gnp_r=0.4)  # of an r that was not chosen
    assert case.reported() == {}
    add(name, 0, 0.6, gnp_r=0.2)
    assert {method: list(by_seed) for method, by_seed in case.reported().items()} == {methods.PLAIN: [0], name: [0]}


def test_flags_choose_of_a_study(data, vision_model):
    flags = ["--cases", "4000 images", "--methods", methods.PLAIN, "m = 32", "--radii", "0.01", "0.002"]
    chosen = study.study_of(study.parse_args(["pretrained_vit", "--model_path", str(vision_model), *flags]))
    assert (chosen.methods, chosen.radii) == ((methods.PLAIN, "m = 32"), (0.01, 0.002))
    assert chosen.seeds == catalogue.STUDIES["pretrained_vit"].seeds
    (settings,) = chosen.cases.values()
    assert settings["train_size"] == 4000
    small = settings | {"validation_size": 32, "test_size": 32}
    model = images.image_task(small, str(data), str(vision_model)).make_model()
    assert model.config._attn_implementation == "eager"


def test_best_epoch_is_kept_as_it_was():
    model, best = torch.nn.Linear(1, 1), training.KeepBest()
    for weight, accuracy in ((1.0, 0.5), (2.0, 0.7), (3.0, 0.7), (4.0, 0.6)):
        torch.nn.init.constant_(model.weight, weight)
        best.on_evaluate(None, None, None, {"eval_accuracy": accuracy}, model)
    assert best.weights["weight"].item() == 2.0 and best.curve == [0.5, 0.7, 0.7, 0.6]


@pytest.mark.parametrize("kind", labels.KINDS)
def test_wrong_labels(kind):
    right = np.random.default_rng(0).integers(10, size=1000)
    wrong = labels.with_wrong_labels(right, 40, 10, seed=1, kind=kind)
    assert (wrong != right).sum() == 400 and wrong.min() >= 0 and wrong.max() <= 9
    assert (wrong == labels.with_wrong_labels(right, 40, 10, seed=1, kind=kind)).all()
    alike = np.mean([w in labels.LOOKS_LIKE[r] for r, w in zip(right, wrong, strict=True) if r != w])
    # Uniform: of nine other classes one or two look alike, 0.16 on average; human: that of half, and all of the rest.
    assert alike == pytest.approx(0.16 if kind == "uniform" else 0.58, abs=0.07)


def test_augmentation_moves_and_mirrors():
    torch.manual_seed(0)
    image = torch.arange(1.0, 65.0).reshape(1, 1, 8, 8).expand(64, 3, 8, 8)
    for result in images.crop_and_mirror(image):
        # Undone by the move and mirror that bring the first pixel inside of the picture back to its place.
        candidates = []
        padded = torch.nn.functional.pad(image[0], [images.PADDING] * 4)
        for top in range(2 * images.PADDING + 1):
            for left in range(2 * images.PADDING + 1):
                crop = padded[:, top : top + 8, left : left + 8]
                candidates += [crop, crop.flip(-1)]
        assert any(torch.equal(result, candidate) for candidate in candidates)


def test_what_rounding_to_bf16_leaves(tmp_path, encoder, data):
    flags = ("--model_path", encoder, "--data", data / "sst2" / "train.parquet", "--radii", 0.5, 0.002, "--draws", 4)
    fork_script(BENCHMARKS / "rounding.py", *flags, "--output", tmp_path / "rounding.json", timeout=TIMEOUT)
    large, small = json.loads((tmp_path / "rounding.json").read_text(encoding="utf-8"))
    assert small["move_nearest"] < large["move_nearest"] <= 1.01
    assert large["move_stochastic"] == pytest.approx(1, abs=0.02)
    assert small["move_stochastic"] == pytest.approx(1, abs=0.2)


def test_rounding_leaves_a_level_and_is_undone():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    before = [parameter.clone() for parameter in model.parameters()]
    with quantisation.rounded_weights(model, bits=3):
        weight = model[0].weight
        for row, original in zip(weight, before[0], strict=True):
            # 2^3 - 1 levels, as far apart as a third of the largest weight: none is further than half of that away.
            assert len(row.unique()) <= 7
            assert (row - original).abs().max() <= original.abs().max() / 6 * 1.001
        assert torch.equal(model[1].weight, before[2])
    assert all(torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))


def test_calibration():
    # Sure and always wrong; then 75% sure and right in three cases of four.
    assert calibration.calibration_error(np.array([[1.0, 0.0]]), np.array([1])) == 1.0
    right = np.array([0, 0, 0, 1])
    assert calibration.calibration_error(np.array([[0.75, 0.25]] * 4), right) == pytest.approx(0.0)
    # Logits that say 27:1 where 3:1 is right are three times too large; the grid's steps are 2%.
    logits = torch.tensor([[3 * math.log(3.0), 0.0]] * 4)
    assert calibration.best_temperature(logits, torch.from_numpy(right)) == pytest.approx(3, rel=0.02)


def test_forgetting_at_equal_loss():
    points = [(2.0, 0.9), (1.0, 0.8), (0.5, 0.6)]
    assert forgetting.at_loss(points, 0.75) == pytest.approx(0.7)
    assert forgetting.at_loss(points, 1.0) == pytest.approx(0.8)
    assert forgetting.at_loss(points, 3.0) == 0.9
    assert math.isnan(forgetting.at_loss(points, 0.1))


def test_statistics():
    assert statistics.mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    # t = mean / error = 0.1 / 0.1 with one degree of freedom, where Student's distribution is Cauchy's: p = 1/2.
    # The third seed has no partner.
    mean, error, p = statistics.paired({0: 0.7, 1: 0.6, 2: 9.0}, {0: 0.5, 1: 0.6})
    assert (mean, error, p) == pytest.approx((0.1, 0.1, 0.5))
    # Holm (1979): 3 × 0.01; 2 × 0.03; then no less than the one before. No test counts as none.
    assert statistics.holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
