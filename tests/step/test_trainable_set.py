"""The set of trainable parameters changes within a window: what had a gradient in any micro-batch belongs to it."""

import pytest
import reference
import torch
from runs import (
    Gradients,
    assert_matches_reference,
    logs_of,
    make_trainer,
    reference_run,
    trained,
    window_loss,
    windows,
)
from tiny import Net, flat_weights, make_data
from torch import nn
from torch.nn.functional import cross_entropy, linear
from transformers import Trainer, TrainerCallback

from hf_gnp import GNPTrainer


class Heads(nn.Module):
    """
    The sum of all heads, of which a micro-batch trains its own. The others are frozen by `requires_grad`, or, for the
    reference, used as constants.
    """

    def __init__(self, freezes: bool, freezes_body: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = nn.Linear(5, 7), nn.ModuleList(nn.Linear(7, 3) for _ in "abc")
        self.freezes, self.freezes_body = freezes, freezes_body

    def forward(self, x, labels, task):
        active = int(task[0])
        features = self.apply_to(self.body, x, not (self.freezes_body and active == 1)).tanh()
        logits = sum(self.apply_to(head, features, number == active) for number, head in enumerate(self.heads))
        return {"loss": cross_entropy(logits, labels), "logits": logits}

    def apply_to(self, layer, x, is_trained):
        if self.freezes:
            return layer.requires_grad_(is_trained)(x)
        weight, bias = (layer.weight, layer.bias) if is_trained else (layer.weight.detach(), layer.bias.detach())
        return linear(x, weight, bias)


def tasks(order: list[int], size: int = 48) -> list[dict[str, torch.Tensor]]:
    """Each micro-batch has one task."""
    rows = enumerate(make_data("net", size))
    return [{**row, "task": torch.tensor(order[number // 4 % len(order)])} for number, row in rows]


WINDOWS = {"one each": ([0, 1], 2), "the other order": ([1, 0], 2), "one comes back": ([0, 1, 2, 0], 4)}


@pytest.mark.parametrize("freezes_body", [False, True])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("order", WINDOWS)
def test_heads_switched_in_a_window(tmp_path, order, alpha, freezes_body):
    numbers, accumulation = WINDOWS[order]
    data = tasks(numbers)
    settings = {"gradient_accumulation_steps": accumulation, "gnp_alpha": alpha}
    trainer = trained(tmp_path, "net", model=Heads(True, freezes_body), data=data, **settings)
    steps = windows("net", accumulation, data)
    expected = reference_run(
        "net", accumulation, alpha=alpha, model=Heads(False, freezes_body), steps=steps, loss=window_loss
    )
    assert_matches_reference(trainer, expected)


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("r", [1e-30, 0.05])
def test_gradient_of_heads_switched_in_a_window(tmp_path, r, alpha):
    """Parameters that are frozen by the optimizer's step have theirs. The head that no micro-batch uses has none."""

    def gradient(cls, model, **settings):
        seen = Gradients()
        options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "max_steps": 1, "callbacks": [seen]}
        make_trainer(tmp_path, "net", cls, model=model, data=tasks([0, 1]), **options, **settings).train()
        return seen.steps[-1]

    result = gradient(GNPTrainer, Heads(True), gnp_alpha=alpha, gnp_r=r, gnp_warmup_type="none")
    plain = gradient(Trainer, Heads(True))
    model = Heads(False)
    window = windows("net", 2, tasks([0, 1]))[0]
    first = reference.gradient(model, window_loss(model, window))
    _, second = reference.gradient_at(model, [r * g for g in reference.unit(first)], window_loss, window)
    mixed = reference.paper_mix(first, second, alpha)
    for (name, _), expected in zip(model.named_parameters(), mixed, strict=True):
        if name.startswith("heads.2"):
            assert result[name] is None and plain[name] is None
            continue
        # Both sides add micro-batches in fp32, in another order.
        torch.testing.assert_close(result[name], expected.float(), rtol=1e-5, atol=1e-7)
        if r < 1e-20:
            torch.testing.assert_close(result[name], plain[name], rtol=1e-6, atol=1e-8)


class Renormalised(nn.Module):
    """Uses its embedding in every other step, whose rows its forward shortens in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(3, 5, max_norm=1.0), nn.Linear(5, 3)
        self.is_used = False

    def forward(self, x, labels):
        if self.is_used:
            x = x + self.embedding(labels)
        logits = self.out(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class EveryOtherStep(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.is_used = state.global_step % 2 == 1


def test_weight_that_a_forward_writes_moves(tmp_path):
    """It had no gradient in the window before, when it counted as frozen."""
    model, passes = Renormalised(), ([], [])
    trainer = make_trainer(tmp_path, "net", model=model, max_steps=6, gnp_r=0.5, callbacks=[EveryOtherStep()])
    weight = model.embedding.weight
    model.embedding.register_forward_pre_hook(
        lambda *_: passes[trainer.in_second_pass].append(weight.detach().clone())
    )
    trainer.train()
    assert [len(weights) for weights in passes] == [3, 3]
    assert all((first - second).norm() > 0.05 for first, second in zip(*passes, strict=True))


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("metric", ["l2", "layer", "element"])
def test_weights_that_the_optimizer_has_not_stay(tmp_path, metric, alpha):
    """They have a gradient, and neither move nor count in the norm: as if they were frozen, and as under ZeRO."""
    ends = []
    for is_frozen in (False, True):
        model = Net()
        model.layers[0].requires_grad_(not is_frozen)
        settings = {"gnp_metric": metric, "gnp_alpha": alpha, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
        optimizer = torch.optim.SGD(model.layers[2].parameters(), lr=0.1)
        trainer = trained(tmp_path, "net", model=model, optimizers=(optimizer, None), gnp_r=0.5, **settings)
        ends.append((flat_weights(model), logs_of(trainer, "gnp_grad_norm", "gnp_sharpness", "gnp_cosine")))
    (weights, logs), (expected, expected_logs) = ends
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-8)
    for name, values in logs.items():
        assert values == pytest.approx(expected_logs[name], rel=1e-4, abs=1e-6)


class OfCopies(torch.optim.SGD):
    """Steps copies of matrices, and vectors themselves, as optimizers do that are offloaded."""

    def __init__(self, model: nn.Module, lr: float):
        self.copied = {p: nn.Parameter(p.detach().clone()) for p in model.parameters() if p.dim() > 1}
        super().__init__([self.copied.get(p, p) for p in model.parameters()], lr=lr)

    def step(self, closure=None):
        for parameter, copy in self.copied.items():
            copy.grad = parameter.grad
        super().step()
        for parameter, copy in self.copied.items():
            parameter.data.copy_(copy.data)
            copy.grad = None


def test_optimizer_of_copies(tmp_path):
    results = []
    for make in (OfCopies, lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr)):
        model = Net()
        trainer = trained(tmp_path, "net", model=model, optimizers=(make(model, 0.1), None), max_grad_norm=0.0)
        results.append((flat_weights(model), logs_of(trainer, "gnp_grad_norm", "gnp_sharpness")))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def head_alone(tmp_path, **settings):
    model = Net()
    optimizer = torch.optim.SGD(model.layers[2].parameters(), lr=0.1)
    return make_trainer(tmp_path, "net", model=model, optimizers=(optimizer, None), **settings)


def test_targets_that_the_optimizer_has_not(tmp_path):
    with pytest.raises(ValueError, match="gnp_target_modules matches no parameter that the optimizer has"):
        head_alone(tmp_path, gnp_target_modules=["layers.0"]).train()


def test_sharpness_is_that_of_all_trainable_weights(tmp_path):
    alone, whole = head_alone(tmp_path), make_trainer(tmp_path, "net")
    norms = [trainer.measure_sharpness(make_data("net"), k=0, probes=0)["grad_norm"] for trainer in (alone, whole)]
    assert norms[0] == norms[1]
