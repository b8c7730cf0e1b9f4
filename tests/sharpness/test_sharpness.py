"""Sharpness on one process, against Hessians in float64 that are formed here, without the library's products."""

import copy
import gc
import math
import random
import types

import numpy as np
import pytest
import torch
from accelerate.utils import is_compiled_module
from runs import assert_identical, generators, make_trainer, run, snapshot
from scipy.sparse.linalg import LinearOperator, eigsh
from tiny import Net, UnlabelledNet, collate, make_data, make_model
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback

from hf_gnp import GNPTrainer, SharpnessCallback, plot_loss_surface
from hf_gnp.sharpness import measure_sharpness
from hf_gnp.sharpness.hessian import Hessian
from hf_gnp.sharpness.loss import SampleLoss


# What is asked of eigenvalues and trace.
RELATIVE = 1e-3
# Lanczos stops at residuals of 1e-3 of the largest eigenvalue; an error of the products adds to them.
RESIDUAL = 3e-3
SAMPLES = 16


def trainer_of(tmp_path, model, kind="net", data=None, **args):
    data = make_data(kind, size=SAMPLES) if data is None else data
    args = {"per_device_eval_batch_size": SAMPLES, "gnp_alpha": 0.0} | args
    return make_trainer(tmp_path, kind, model=model, data=data, eval_dataset=data, **args)


def in_double(data):
    return [{k: v.double() if v.is_floating_point() else v for k, v in sample.items()} for sample in data]


def mean_loss(model, data):
    """The model's own mean loss over all labels of the data, as one batch."""
    return model(**collate(data))["loss"]


class Exact:
    """The loss of a float64 copy of `model` over the data, its gradient and products, by differentiating twice."""

    def __init__(self, model, data):
        model = copy.deepcopy(model).double().eval()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        with sdpa_kernel(SDPBackend.MATH):
            loss = mean_loss(model, in_double(data))
            gradients = torch.autograd.grad(loss, self.parameters, create_graph=True)
        self.loss, self.slope = loss.item(), torch.cat([g.flatten() for g in gradients])
        self.gradient, self.size = self.slope.detach(), self.slope.numel()

    def product(self, vector):
        slope = self.slope @ torch.as_tensor(vector, dtype=torch.float64).flatten()
        products = torch.autograd.grad(slope, self.parameters, retain_graph=True, allow_unused=True)
        pairs = zip(products, self.parameters, strict=True)
        return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])

    def hessian(self):
        return torch.stack([self.product(row) for row in torch.eye(self.size, dtype=torch.float64)])

    def top(self, k):
        operator = LinearOperator((self.size, self.size), matvec=lambda v: self.product(v).numpy(), dtype=np.float64)
        return sorted(eigsh(operator, k=k, which="LA", return_eigenvectors=False), reverse=True)


def assert_matches(result, exact, k, eigenvalues=None):
    expected = exact.top(k) if eigenvalues is None else eigenvalues
    assert result["top_eigenvalues"] == pytest.approx(list(expected), rel=RELATIVE)
    assert max(result["residuals"]) < RESIDUAL * abs(expected[0])
    # A mean in fp32 of fp32 losses and gradients.
    assert result["loss"] == pytest.approx(exact.loss, rel=1e-5)
    assert result["grad_norm"] == pytest.approx(exact.gradient.norm().item(), rel=1e-5)


@pytest.mark.parametrize("method", ["exact", "differences"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_spectrum_trace_and_ascent_are_those_of_the_whole_hessian(tmp_path, method, dtype):
    data = make_data("net", size=SAMPLES)
    model = Net().to(dtype)
    trainer = trainer_of(tmp_path, model, data=in_double(data) if dtype == torch.float64 else data)
    exact = Exact(model, data)
    hessian = exact.hessian()
    eigenvalues = torch.linalg.eigvalsh(hessian).flip(0)
    result = trainer.measure_sharpness(k=3, method=method, radii=[0.01, 0.1], probes=40)
    assert_matches(result, exact, 3, eigenvalues[:3].tolist())
    # Four standard errors of a mean of 40: once in some thousand seeds.
    assert abs(result["trace"] - hessian.trace().item()) < 4 * result["trace_standard_error"]
    # To second order a rise is r ‖g‖ + r² gᵀHg/2‖g‖² along g, and at least r² λ/2 along ±v. Third order: r of it.
    g, norm = exact.gradient, exact.gradient.norm()
    curvature = (g @ hessian @ g / norm**2).item()
    for r, rise, top in zip(result["radii"], result["ascent"], result["ascent_top_eigenvector"], strict=True):
        assert rise == pytest.approx(r * norm.item() + r**2 * curvature / 2, rel=r)
        assert top >= r**2 * result["top_eigenvalues"][0] / 2 * (1 - r)
    # The whole spectrum leaves nothing to estimate.
    whole = trainer.measure_sharpness(method=method, k=exact.size, max_products=exact.size, probes=1)
    assert whole["trace"] == pytest.approx(hessian.trace().item(), rel=RELATIVE)


def test_restarts_find_the_same_as_one_long_basis(tmp_path):
    trainer = trainer_of(tmp_path, Net().double(), data=in_double(make_data("net", size=SAMPLES)))
    options = {"method": "exact", "tolerance": 1e-8, "max_products": 500, "probes": 0, "log": False}
    short = trainer.measure_sharpness(k=2, basis=5, **options)
    long = trainer.measure_sharpness(k=2, basis=60, **options)
    assert short["top_eigenvalues"] == pytest.approx(long["top_eigenvalues"], rel=1e-10)
    assert max(short["residuals"]) < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "llama", "bert"])
def test_models_in_several_micro_batches(tmp_path, kind):
    """A ragged Llama (tied embeddings) averages over labels, whatever the micro-batches have of them."""
    data = make_data(kind, size=SAMPLES)
    model = make_model(kind, dropout=0.1)
    trainer = trainer_of(tmp_path, model, kind, per_device_eval_batch_size=3)
    result = trainer.measure_sharpness(k=2, probes=0)
    assert_matches(result, Exact(model, data), 2)


def test_lora_counts_only_the_adapter_and_a_frozen_backbone_only_the_head(tmp_path):
    data = make_data("llama", size=SAMPLES)
    model = make_model("llama-lora")
    result = trainer_of(tmp_path, model, "llama").measure_sharpness(probes=0)
    assert_matches(result, Exact(model, data), 1)

    model = make_model("vit")
    model.vit.requires_grad_(False)
    data = make_data("vit", size=SAMPLES)
    result = trainer_of(tmp_path, model, "vit").measure_sharpness(probes=0)
    exact = Exact(model, data)
    assert exact.size == sum(p.numel() for p in model.classifier.parameters())
    assert_matches(result, exact, 1)


def test_batch_norm_uses_its_statistics_and_does_not_move_them(tmp_path):
    model = Net(lambda: nn.BatchNorm1d(7), nn.Tanh)
    model.layers[1].running_mean += torch.randn(7)
    before = snapshot(model)
    result = trainer_of(tmp_path, model, per_device_eval_batch_size=5).measure_sharpness(probes=0)
    assert_identical(snapshot(model), before)
    assert model.training
    assert_matches(result, Exact(model, make_data("net", size=SAMPLES)), 1)


@pytest.mark.parametrize("seed", range(5))
def test_very_noisy_products_do_not_accept_the_random_start(tmp_path, monkeypatch, seed):
    """A small model's products are exact here. They only claim an error that any residual is below."""
    model, data = make_model("vit"), make_data("vit", size=SAMPLES)
    monkeypatch.setattr(Hessian, "error", math.inf)
    result = trainer_of(tmp_path, model, "vit").measure_sharpness(method="exact", probes=0, seed=seed, log=False)
    # An eigenvalue lies within the residual, which is at most half of the result: the result is at least 2/3 of it.
    assert result["top_eigenvalues"][0] == pytest.approx(Exact(model, data).top(1)[0], rel=1 / 3)


def test_one_product_is_enough_for_a_result(tmp_path):
    result = trainer_of(tmp_path, Net()).measure_sharpness(max_products=1, probes=0, log=False)
    assert np.isfinite(result["top_eigenvalues"][0]) and result["residuals"][0] > 0


@pytest.mark.parametrize("basis", [3, 8])
def test_few_vectors_are_held(tmp_path, monkeypatch, basis):
    """θ's copy, the gradient, the basis, and four more: what docs/sharpness.md says a model needs."""
    model, held = Net(), []
    size = sum(p.numel() for p in model.parameters())
    add_gradient = SampleLoss.add_gradient_

    def counted(self, *args):
        gc.collect()
        held.append(sum(isinstance(o, torch.Tensor) and o.shape == (size,) for o in gc.get_objects()))
        return add_gradient(self, *args)

    monkeypatch.setattr(SampleLoss, "add_gradient_", counted)
    trainer_of(tmp_path, model).measure_sharpness(basis=basis, tolerance=1e-6)
    assert basis < max(held) <= 1 + basis + 4


class Quadratic(nn.Module):
    """½ (θ - x̄)ᵀ A (θ - x̄) + const., of mean x̄, as a mean over samples: its Hessian is A."""

    def __init__(self, eigenvalues):
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2))).Q
        self.register_buffer("a", rotation @ torch.diag(torch.tensor(eigenvalues)) @ rotation.T)
        self.theta = nn.Parameter(torch.ones(5))

    def forward(self, x, labels):
        d = self.theta - x
        return {"loss": 0.5 * torch.einsum("bi,ij,bj->b", d, self.a, d).mean()}


def test_quadratic_with_a_known_spectrum(tmp_path):
    eigenvalues = [7.0, 3.0, 1.0, 0.5, -2.0]
    trainer = trainer_of(tmp_path, Quadratic(eigenvalues), per_device_eval_batch_size=4)
    result = trainer.measure_sharpness(k=5, radii=2.0)
    # fp32 gradients of size 10, and differences of them over a step of 1e-2 or more.
    assert result["top_eigenvalues"] == pytest.approx(eigenvalues, abs=1e-3)
    assert result["trace"] == pytest.approx(sum(eigenvalues), abs=3e-3)
    assert result["trace_standard_error"] < 1e-3  # nothing is left to estimate


def test_a_loss_function_of_the_users(tmp_path):
    def loss_function(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    model, data = Net(), make_data("net", size=SAMPLES)

    own = UnlabelledNet()
    trainer = trainer_of(tmp_path, own, compute_loss_func=loss_function, per_device_eval_batch_size=3)
    assert_matches(trainer.measure_sharpness(probes=0), Exact(model, data), 1)


def test_the_gradient_of_a_parameter_of_the_users_stays(tmp_path):
    class Constrained(GNPTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            outputs = model(**inputs)
            return outputs["loss"] + self.multiplier * outputs["logits"].pow(2).mean()

    trainer = make_trainer(tmp_path, "net", Constrained, model=Net(), eval_dataset=make_data("net", size=SAMPLES))
    trainer.multiplier = nn.Parameter(torch.tensor(0.5))
    trainer.multiplier.grad = gradient = torch.tensor(3.0)
    trainer.measure_sharpness(samples=SAMPLES, probes=1)
    assert trainer.multiplier.grad is gradient
    assert gradient == 3.0


def test_a_sample_is_drawn_by_the_seed(tmp_path):
    model, data = Net(), make_data("net", size=48)
    trainer = trainer_of(tmp_path, model, data=data)
    options = {"samples": SAMPLES, "k": 0, "probes": 2}
    results = [trainer.measure_sharpness(seed=seed, **options) for seed in (3, 3, 4)]
    assert results[0] == results[1]
    assert results[0]["loss"] != results[2]["loss"]
    rows = np.sort(np.random.default_rng(3).permutation(48)[:SAMPLES])
    assert results[0]["loss"] == pytest.approx(Exact(model, [data[row] for row in rows]).loss, rel=1e-5)


def test_stock_trainers_and_iterable_data(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from make_data("net", size=48)

    options = {"k": 1, "probes": 0, "log": False}
    stock = make_trainer(tmp_path, "net", cls=Trainer, model=Net(), per_device_eval_batch_size=SAMPLES)
    first = make_data("net", size=48)[:SAMPLES]
    expected = trainer_of(tmp_path, Net()).measure_sharpness(first, **options)
    assert measure_sharpness(stock, Stream(), samples=SAMPLES, **options) == expected
    assert expected["samples"] == SAMPLES


def test_random_transforms_draw_by_the_seed_and_leave_the_generators(tmp_path):
    def noisy(samples):
        batch = collate(samples)
        return {**batch, "x": batch["x"] + torch.randn_like(batch["x"]) * random.random() * np.random.rand()}

    trainer = trainer_of(tmp_path, Net(), per_device_eval_batch_size=5)
    trainer.data_collator = noisy
    before = generators()
    first = trainer.measure_sharpness(k=0, probes=0)
    assert_identical(generators(), before)
    torch.manual_seed(7)
    assert trainer.measure_sharpness(k=0, probes=0) == first


class Augmented(Dataset):
    """Samples with noise from generators of its own, of which it makes one at the first sample."""

    def __init__(self):
        self.samples, self.generator = make_data("net", size=SAMPLES), np.random.default_rng(0)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, row):
        sample = self.samples[row]
        if not hasattr(self, "late"):
            self.late = np.random.default_rng(1)
        return {**sample, "x": sample["x"] + float(self.generator.normal() + self.late.normal())}


class NoisyCollator:
    """Makes its generator at the first batch, as that of masked language models does."""

    def __init__(self):
        self.generator = None

    def __call__(self, samples):
        self.generator = self.generator or torch.Generator().manual_seed(3)
        batch = collate(samples)
        return {**batch, "x": batch["x"] + torch.randn(1, generator=self.generator)}


MEASUREMENTS = {
    "measure_sharpness": lambda trainer, folder: trainer.measure_sharpness(k=0, probes=0, log=False),
    "find_r": lambda trainer, folder: trainer.find_r(radii=[0.1], batches=1, log=False),
    "plot_loss_surface": lambda trainer, folder: plot_loss_surface(trainer, folder / "slice.png", points=2),
}


@pytest.mark.parametrize("args", [{}, {"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_training_after_a_measurement_is_the_same(tmp_path, name, args):
    results = []
    for is_measured in (True, False):
        data = Augmented()
        trainer = trainer_of(tmp_path, Net(), data=data, max_steps=2, **args)
        trainer.data_collator = NoisyCollator()
        if is_measured:
            MEASUREMENTS[name](trainer, tmp_path)
        results.append(run(trainer))
        assert is_compiled_module(trainer.model_wrapped) == ("torch_compile" in args)
    assert_identical(*results)


@pytest.mark.parametrize("is_trained", [True, False])
def test_model_set_by_the_user_is_measured(tmp_path, is_trained):
    trainer = trainer_of(tmp_path, Net(), bf16=True, max_steps=1, torch_compile_backend="eager")
    if is_trained:
        trainer.train()
    trainer.measure_sharpness(k=0, probes=0)
    trainer.model = Net(nn.Softsign)
    expected = trainer_of(tmp_path, Net(nn.Softsign), bf16=True).measure_sharpness(k=0, probes=0)
    assert trainer.measure_sharpness(k=0, probes=0) == expected


@pytest.mark.parametrize("is_counted", [True, False])
def test_loss_that_counts_its_items(tmp_path, is_counted):
    """`Trainer` gives it the count if the model accepts arguments of the loss."""

    class Counting(GNPTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            assert (num_items_in_batch is not None) == is_counted
            outputs, count = model(**inputs), num_items_in_batch if is_counted else len(inputs["labels"])
            loss = functional.cross_entropy(outputs["logits"], inputs["labels"], reduction="sum") / count
            self.log({"part": loss.item()})
            return (loss, outputs) if return_outputs else loss

    options = {"k": 0, "probes": 0, "samples": SAMPLES, "log": False}
    data = make_data("net", size=SAMPLES)
    trainer = make_trainer(tmp_path, "net", cls=Counting, model=Net(), data=data, eval_dataset=data)
    trainer.model_accepts_loss_kwargs = is_counted
    expected = trainer_of(tmp_path, Net()).measure_sharpness(**options)
    assert trainer.measure_sharpness(**options)["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert trainer.state.log_history == []


def test_metrics_of_training_stay_in_its_log(tmp_path):
    class Merging(GNPTrainer):
        """Adds its metrics to the next log, as TRL's trainers do."""

        metrics = types.MappingProxyType({})

        def compute_loss(self, *args, **kwargs):
            self.metrics = {"own": 1.0}
            return super().compute_loss(*args, **kwargs)

        def log(self, logs, *args, **kwargs):
            logs, self.metrics = {**logs, **self.metrics}, {}
            super().log(logs, *args, **kwargs)

    data = make_data("net", size=SAMPLES)
    options = {"eval_dataset": data, "callbacks": [SharpnessCallback(every=1, k=0, probes=0)], "max_steps": 2}
    trainer = make_trainer(tmp_path, "net", cls=Merging, model=Net(), data=data, logging_steps=1, **options)
    trainer.train()
    assert ["own" in entry for entry in trainer.state.log_history if "loss" in entry] == [True, True]
    assert not any("own" in entry for entry in trainer.state.log_history if "sharpness_loss" in entry)


class Interrupted(Exception):
    pass


def interrupt_everywhere(model, measure, error=Interrupted) -> list[bool]:
    """Let each forward of a measurement fail once: all is as it was. Return whether the forwards were in training."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    calls, fail_at = [], 0

    def fail(*_):
        calls.append(model.training)
        if len(calls) == fail_at:
            raise error

    model.register_forward_hook(fail)

    def state():
        modes = [module.training for module in model.modules()]
        return [snapshot(model), [p.grad.clone() for p in model.parameters()], generators(), modes]

    before = state()
    measure()
    assert_identical(state(), before)
    uninterrupted = list(calls)
    for call in range(1, len(uninterrupted) + 1):
        calls.clear()
        fail_at = call
        with pytest.raises(error):
            measure()
        assert_identical(state(), before)
    return uninterrupted


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_nothing_is_left_moved_wherever_it_is_interrupted(tmp_path, error):
    model = Net(lambda: nn.BatchNorm1d(7), nn.Dropout)
    trainer = trainer_of(tmp_path, model, per_device_eval_batch_size=8)
    assert interrupt_everywhere(model, lambda: trainer.measure_sharpness(max_products=3, probes=2, log=False), error)


def test_the_curves_are_logged_and_training_does_not_notice(tmp_path):
    callback = SharpnessCallback(every=2, max_products=5, probes=2, radii=[0.1])
    options = {"per_device_eval_batch_size": 7, "gnp_alpha": 0.8, "max_steps": 5}
    data = make_data("net", size=SAMPLES)
    results, trainers = [], []
    for callbacks in ([callback], []):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        model = Net(lambda: nn.BatchNorm1d(7), nn.Dropout)
        trainers.append(
            make_trainer(tmp_path, "net", model=model, data=data, eval_dataset=data, callbacks=callbacks, **options)
        )
        results.append(run(trainers[-1]))
    assert_identical(*results)
    logged = [entry for entry in trainers[0].state.log_history if "sharpness_loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 5]
    for name in ("top_eigenvalue_1", "residual_1", "trace", "trace_standard_error", "grad_norm", "ascent_r_0.1"):
        assert all(np.isfinite(entry[f"sharpness_{name}"]) for entry in logged)
    assert callback._trainer is None


def test_bf16_autocast_and_bf16_weights_come_near(tmp_path):
    data = make_data("net", size=SAMPLES)
    exact = Exact(Net(), data).top(1)[0]
    autocast = trainer_of(tmp_path, Net(), bf16=True).measure_sharpness()
    rounded = trainer_of(
        tmp_path,
        Net().bfloat16(),
        data=[{"x": sample["x"].bfloat16(), "labels": sample["labels"]} for sample in data],
    ).measure_sharpness()
    # 8 bits: a product is a difference of gradients that are each off by 1e-2.
    for result in (autocast, rounded):
        assert result["top_eigenvalues"][0] == pytest.approx(exact, rel=0.2)
        assert 1e-4 < result["product_error"] < 0.5


class AddsSharpness(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.add_callback(SharpnessCallback(every=1))


def test_refusals_say_what_to_do(tmp_path):
    data = make_data("net", size=SAMPLES)
    with pytest.raises(ValueError, match=r"fp16.*fp32 or bf16"):
        trainer_of(tmp_path, Net().half()).measure_sharpness()
    with pytest.raises(ValueError, match="trainer an eval_dataset"):
        make_trainer(tmp_path, "net", model=Net(), data=data).measure_sharpness()
    trainer = trainer_of(tmp_path, Net())
    with pytest.raises(ValueError, match="method"):
        trainer.measure_sharpness(method="magic")
    with pytest.raises(ValueError, match="k must be"):
        trainer.measure_sharpness(k=-1)
    with pytest.raises(ValueError, match="label that counts"):
        ragged = [{**sample, "labels": torch.full_like(sample["labels"], -100)} for sample in data]
        trainer.measure_sharpness(ragged)
    stock = make_trainer(tmp_path, "net", cls=Trainer, model=Net(), data=data, callbacks=[SharpnessCallback(every=1)])
    with pytest.raises(RuntimeError, match="use GNPTrainer"):
        stock.train()
    assert stock.state.global_step == 0
    blind = make_trainer(tmp_path, "net", model=Net(), data=data, callbacks=[SharpnessCallback(every=10)])
    with pytest.raises(ValueError, match="trainer an eval_dataset"):
        blind.train()
    assert blind.state.global_step == 0
    adds = AddsSharpness()
    adds.trainer = late = make_trainer(tmp_path, "net", eval_dataset=data, callbacks=[adds])
    with pytest.raises(RuntimeError, match="add the callback before train"):
        late.train()
    trainer.data_collator = list  # as that of GRPO
    with pytest.raises(NotImplementedError, match="not mappings of tensors but list"):
        trainer.measure_sharpness()
