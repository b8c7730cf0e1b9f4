"""The trainers that users have, with the penalty: where it is off, or moves nothing, it changes nothing."""

import functools
from pathlib import Path
from typing import Any

import pytest
from builders import CLIENTS, REFUSED, make_client
from runs import assert_identical, snapshot
from transformers import Trainer


PENALISED = [name for name in CLIENTS if name not in REFUSED]
# Durations, or quotients of one.
TIMES = (
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_tokens_per_second",
    "step_time",
)


def count_generations(trainer: Trainer) -> list[int]:
    """A list that gets the batch size of each call of the trained model's `generate`."""
    calls: list[int] = []
    model = trainer.model
    generate = getattr(model, "generate", None)
    if generate is None:
        return calls

    @functools.wraps(generate)
    def counted(*args: Any, **kwargs: Any):
        calls.append(len(kwargs["input_ids"]))
        return generate(*args, **kwargs)

    model.generate = counted
    return calls


def logs_without(history: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The logs without times, the penalty's own and `names`; a NaN, which equals nothing, as its name."""
    left_out = (*TIMES, *names)
    return [
        {
            key: "nan" if value != value else value
            for key, value in entry.items()
            if key not in left_out and not key.startswith("gnp_")
        }
        for entry in history
    ]


def run(name: str, folder: Path, **args: Any) -> dict[str, Any]:
    trainer = make_client(name, folder, **args)
    generations = count_generations(trainer)
    trainer.train()
    return {
        "weights": snapshot(trainer.model),
        "history": trainer.state.log_history,
        "generations": generations,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def plain(folder):
    """The plain run of a client, made once."""

    @functools.cache
    def run_plain(name: str) -> dict[str, Any]:
        return run(name, folder)

    return run_plain


@pytest.fixture
def client(request) -> str:
    pytest.importorskip(CLIENTS[request.param].library, reason="a client of the dev extra")
    return request.param


@pytest.mark.parametrize("client", CLIENTS, indirect=True)
def test_alpha_zero_is_the_plain_trainer(client, folder, plain):
    result, expected = run(client, folder, gnp_alpha=0.0), plain(client)
    steps = [entry for entry in expected["history"] if "loss" in entry]
    assert len(steps) >= 3
    assert all(entry["grad_norm"] > 0 for entry in steps)  # else every comparison here is of nothing
    assert_identical(result["weights"], expected["weights"])
    assert_identical(logs_without(result["history"]), logs_without(expected["history"]))
    assert result["generations"] == expected["generations"]


@pytest.mark.parametrize("client", PENALISED, indirect=True)
def test_unmoved_run_is_plain(client, folder, plain):
    """At r = 1e-30 a weight plus its perturbation is the weight, so g₂ is g₁ bit for bit if nothing else differs."""
    result, expected = run(client, folder, gnp_alpha=1.0, gnp_r=1e-30), plain(client)
    assert all("gnp_sharpness" in entry for entry in result["history"] if "loss" in entry)
    assert_identical(
        logs_without(result["history"], "total_flos"),  # a second pass is work, and counted
        logs_without(expected["history"], "total_flos"),
    )
    assert_identical(result["weights"], expected["weights"])
    assert result["generations"] == expected["generations"]


# belongs here once they are not.
@pytest.mark.parametrize("client", [name for name in PENALISED if name != "gkd-on-policy"], indirect=True)
def test_unmoved_momentum_run_is_plain(client, folder, plain):
    """Metrics of the single pass are those of plain training, in their order."""
    result, expected = run(client, folder, gnp_direction="momentum", gnp_r=1e-30), plain(client)
    assert [entry["gnp_on"] for entry in result["history"] if "gnp_on" in entry][1:]
    assert_identical(logs_without(result["history"]), logs_without(expected["history"]))
    assert_identical(result["weights"], expected["weights"])
    assert result["generations"] == expected["generations"]


@pytest.mark.parametrize("client", PENALISED, indirect=True)
def test_first_step_logs_and_generates_as_plain(client, folder, plain):
    result, expected = run(client, folder, gnp_alpha=1.0, gnp_r=0.05), plain(client)
    # grad_norm is that of the combined gradient; all else is of the first pass, at the weights of the start.
    first, first_expected = (logs_without(r["history"][:1], "grad_norm") for r in (result, expected))
    assert_identical(first, first_expected)
    # It was moved. The loss does not tell: GRPO's default has the same value at any weights, and only a gradient.
    assert result["history"][0]["grad_norm"] != expected["history"][0]["grad_norm"]
    assert len(result["generations"]) == len(expected["generations"])


@pytest.mark.parametrize("client", REFUSED, indirect=True)
def test_own_training_step_is_refused(client, folder):
    with pytest.raises(
        (RuntimeError, NotImplementedError), match=f"{CLIENTS[client].build(folder).trainer_class.__name__}"
    ):
        run(client, folder, gnp_alpha=1.0, gnp_r=0.05)
