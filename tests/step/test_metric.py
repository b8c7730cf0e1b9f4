"""The metrics of the move and the cosine of both gradients, on one process, against a loop in float64."""

import copy
import functools

import pytest
import reference
import torch
from runs import (
    COSINE_TOLERANCE,
    LOG_TOLERANCE,
    WEIGHTS_TOLERANCE,
    assert_matches_reference,
    by_scope,
    logs_of,
    make_trainer,
    reference_run,
    trained,
    windows,
)
from tiny import KINDS, flat_weights, make_model, relative_distance

from hf_gnp import penalty
from hf_gnp.move import Move


DIRECTIONS = {
    "l2": reference.along_the_gradient,
    "layer": reference.in_proportion_to_each_tensor,
    "element": reference.scale_invariant,
}
STEPS = 4
RADII = {"l2": 0.05, "layer": 0.05, "element": 0.5}


def in_float64(kind: str, accumulation: int):
    """The windows of the data, in float64."""

    def double(batch):
        return {name: v.double() if v.is_floating_point() else v for name, v in batch.items()}

    return [[double(batch) for batch in window] for window in windows(kind, accumulation)]


def lora_at_its_start() -> torch.nn.Module:
    """B is 0, as PEFT makes it."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def with_zero_biases(kind: str) -> torch.nn.Module:
    model = make_model(kind)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


MODELS = {
    **{kind: (kind, functools.partial(make_model, kind)) for kind in (*KINDS, "llama-untied")},
    "llama-lora-of-0": ("llama", lora_at_its_start),
    "vit-without-biases": ("vit", functools.partial(with_zero_biases, "vit")),
}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("alpha", [0.1, 0.8, 1.0])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind_of_metric", DIRECTIONS)
def test_metric_and_cosine_match_float64(tmp_path, kind_of_metric, name, alpha, accumulation):
    kind, make = MODELS[name]
    if name == "llama-lora-of-0" and kind_of_metric == "element":
        pytest.skip("B = 0 has no elements to move, which the metric divides by")
    torch.manual_seed(3)
    model = make()
    twin, twin_of_l2 = copy.deepcopy(model).double(), copy.deepcopy(model)
    settings = {"gnp_metric": kind_of_metric, "gnp_alpha": alpha, "gnp_r": RADII[kind_of_metric], "max_steps": STEPS}
    trainer = trained(tmp_path, kind, model=model, gradient_accumulation_steps=accumulation, **settings)
    start, expected, logs = reference_run(
        kind,
        accumulation,
        r=RADII[kind_of_metric],
        alpha=alpha,
        model=twin,
        steps=in_float64(kind, accumulation)[:STEPS],
        direction=DIRECTIONS[kind_of_metric],
    )
    distance = relative_distance(flat_weights(model), expected, start)
    found = logs_of(trainer, "loss", "gnp_grad_norm", "gnp_cosine")
    if name == "llama-lora-of-0" and kind_of_metric == "layer":  # A has no gradient, B no weights: a plain step
        assert found["gnp_cosine"][0] is None
        found, logs = {log: values[1:] for log, values in found.items()}, logs[1:]
    for log in ("loss", "gnp_grad_norm"):
        assert found[log] == pytest.approx([step[log] for step in logs], rel=LOG_TOLERANCE), log
    difference = max(abs(a - step["gnp_cosine"]) for a, step in zip(found["gnp_cosine"], logs, strict=True))
    print(f"{distance:.1e} of the distance travelled, {difference:.1e} from the cosine")
    # The weights, whose norm is a hundred times the distance travelled, are stored in fp32.
    assert distance < 3 * WEIGHTS_TOLERANCE
    assert difference < COSINE_TOLERANCE
    if kind_of_metric != "l2":  # else the test would not tell
        steps = windows(kind, accumulation)[:STEPS]
        _, of_l2, _ = reference_run(kind, accumulation, r=RADII["l2"], alpha=alpha, model=twin_of_l2, steps=steps)
        assert relative_distance(of_l2, expected, start) > 10 * WEIGHTS_TOLERANCE


@pytest.mark.parametrize("scope", ["micro_batch", "rank", "rank_micro_batch"])
@pytest.mark.parametrize("kind_of_metric", DIRECTIONS)
def test_metric_of_a_scope(tmp_path, kind_of_metric, scope):
    settings = {"gnp_metric": kind_of_metric, "gnp_scope": scope, "gradient_accumulation_steps": 2}
    trainer = trained(tmp_path, "vit", **settings)
    expected = reference_run("vit", 2, direction=DIRECTIONS[kind_of_metric], **by_scope(scope))
    assert_matches_reference(trainer, expected)


def test_metric_of_chosen_modules(tmp_path):
    """The norm of the weights is that of the tensors that move."""
    model = make_model("vit")
    chosen = ["norm" in name for name, _ in model.named_parameters()]

    def direction(parameters, g1):
        only = [g if is_chosen else torch.zeros_like(g) for g, is_chosen in zip(g1, chosen, strict=True)]
        return reference.in_proportion_to_each_tensor(parameters, only)

    trainer = trained(tmp_path, "vit", gnp_metric="layer", gnp_target_modules="norm")
    assert_matches_reference(trainer, reference_run("vit", 1, model=model, direction=direction))


def test_the_move_has_length_r(tmp_path):
    model, seen = make_model("bert"), []
    trainer = make_trainer(tmp_path, "bert", model=model, gnp_metric="layer", gnp_r=0.3, max_steps=1)
    model.register_forward_pre_hook(lambda module, args: seen.append(flat_weights(module)))
    trainer.train()
    assert (seen[-1] - seen[0]).norm().item() == pytest.approx(0.3, rel=1e-5)


def test_momentum_of_each_tensor(tmp_path):
    """One pass at θ - r (‖θ_l‖/‖θ‖) m_l/‖m_l‖, and the step with its gradient from θ. The first step is plain."""
    settings = {"gnp_direction": "momentum", "gnp_metric": "layer", "gnp_r": 0.5}
    # With a smaller ε, Adam turns the rounding of gradients that are nearly zero into steps of full length.
    trainer = trained(tmp_path, "vit", optim="adamw_torch", adam_epsilon=1e-3, **settings)
    assert "gnp_cosine" not in trainer.state.log_history[-2]
    model = make_model("vit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-3)
    momentum = {"m": None}

    def direction(parameters, g1):
        states = [optimizer.state[p] for p in model.parameters()]
        if not all(states):
            return [torch.zeros_like(g) for g in g1]
        momentum["m"] = [state["exp_avg"] for state in states]
        return [-d for d in reference.in_proportion_to_each_tensor(parameters, momentum["m"])]

    start, expected, _ = reference_run(
        "vit", 1, r=0.5, alpha=1.0, model=model, optimizer=lambda *args, **kwargs: optimizer, direction=direction
    )
    assert relative_distance(flat_weights(trainer.model), expected, start) < WEIGHTS_TOLERANCE


@pytest.mark.parametrize("kind_of_metric", DIRECTIONS)
@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("rounding", [True, False])
def test_cosine_of_16_bit_weights(tmp_path, kind_of_metric, alpha, rounding):
    """g₁ beside g₂ is exact; that of the move has the noise of its rounding, which is not along g₂."""
    models = [make_model("bert").to(torch.bfloat16) for _ in range(2)]
    settings = {"gnp_metric": kind_of_metric, "gnp_alpha": alpha, "gnp_r": 0.2, "learning_rate": 0.0, "max_steps": 3}
    trainer = trained(tmp_path, "bert", model=models[0], gnp_stochastic_rounding=rounding, **settings)
    expected = []
    twin = models[1].double()
    parameters = list(twin.parameters())
    for (batch,) in windows("bert", 1)[:3]:
        loss_of = lambda model, batch: model(**batch).loss  # noqa: E731
        g1 = reference.gradient(twin, loss_of(twin, batch))
        weights = [p.detach().clone() for p in parameters]
        e = [0.2 * d for d in DIRECTIONS[kind_of_metric](weights, g1)]
        _, g2 = reference.gradient_at(twin, e, loss_of, batch)
        expected.append(reference.cosine_of(g1, g2, e, weights if kind_of_metric == "element" else None))
    cosines = logs_of(trainer, "gnp_cosine")["gnp_cosine"]
    print(cosines, expected)
    # Gradients in bf16 have 8 bits. In the metric "element" the nearest number is often the weight itself, so little
    # of the move is left to read g₁ from.
    is_poor = kind_of_metric == "element" and not rounding
    # The noise of stochastic rounding is not along g₂ on average, and a bias has few elements.
    tolerance = 5e-2 if is_poor else 3e-2 if rounding else 1e-2
    assert cosines == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("args", [{"logging_steps": 5}, {"logging_strategy": "epoch", "num_train_epochs": 2.5}])
def test_cosine_is_taken_at_logging_steps_only(tmp_path, monkeypatch, args):
    taken, measure = [], Move._measure_cosine
    trainer = make_trainer(tmp_path, "vit", **args)
    step = lambda: trainer.state.global_step + 1  # noqa: E731
    monkeypatch.setattr(Move, "_measure_cosine", lambda self, alpha: taken.append(step()) or measure(self, alpha))
    trainer.train()
    logged = [entry["step"] for entry in trainer.state.log_history if "gnp_cosine" in entry]
    assert taken == [step for step in logged if step != trainer.state.max_steps or "logging_steps" in args]
    assert len(taken) == 2


def test_cosine_in_parts(tmp_path, monkeypatch):
    cosines = []
    for part in (7, 2**22):
        monkeypatch.setattr(penalty, "PART", part)
        trainer = trained(tmp_path, "net", max_steps=3)
        cosines.append(logs_of(trainer, "gnp_cosine")["gnp_cosine"])
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-6)
