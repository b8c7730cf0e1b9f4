"""Models, parameters and optimizers of every sort, each against the reference loop or against its plainer self."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import (
    BASE,
    CHECKPOINTING,
    MICRO_BATCH,
    assert_identical,
    assert_matches_reference,
    assert_unmoved_is_plain,
    make_trainer,
    make_unmoved,
    record_forwards,
    reference_run,
    run,
    snapshot,
    trained,
    windows,
)
from tiny import KINDS, LABELS, Net, flat_weights, make_data, make_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def freeze(model: nn.Module, *names: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter.requires_grad_(False)
    return model


FROZEN = {"vit": ("embeddings",), "bert": ("layer.0", "word_embeddings"), "llama": ("layers.0", "norm")}


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters(tmp_path, kind):
    """They are neither moved nor part of the norm."""
    model = freeze(make_model(kind), *FROZEN[kind])
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    trainer = make_trainer(tmp_path, kind, model=model, gradient_accumulation_steps=2)
    passes = record_forwards(model, lambda m: {name: m.get_parameter(name).clone() for name in frozen})
    trainer.train()
    assert_matches_reference(trainer, reference_run(kind, 2, model=freeze(make_model(kind), *FROZEN[kind])))
    for weights in passes:
        assert_identical(weights, frozen)


class BranchingNet(Net):
    """`rare` is only used in batches whose first label is 0, and `unused` never."""

    def __init__(self):
        super().__init__()
        self.rare, self.unused = nn.Linear(5, LABELS), nn.Linear(5, LABELS)

    def forward(self, x, labels):
        logits = self.layers(x)
        if labels[0] == 0:
            logits = logits + self.rare(x)
        return {"loss": nn.functional.cross_entropy(logits, labels)}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_parameters_without_gradient(tmp_path, alpha, accumulation):
    model = BranchingNet()
    unused = snapshot(model.unused)
    trainer = trained(tmp_path, "net", model=model, gnp_alpha=alpha, gradient_accumulation_steps=accumulation)
    steps = windows("net", accumulation)
    branches = {any(batch["labels"][0] == 0 for batch in window) for window in steps}
    assert branches == {True, False}
    assert_matches_reference(trainer, reference_run("net", accumulation, alpha=alpha, model=BranchingNet()))
    assert_identical(snapshot(model.unused), unused)


def lora(kind: str) -> nn.Module:
    targets = {"vit": ["q_proj", "query"], "llama": ["q_proj", "v_proj"]}[kind]
    model = get_peft_model(make_model(kind), LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B starts at zero, where A has no gradient
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_lora(tmp_path, kind):
    model = lora(kind)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    adapter = {name for name, p in model.named_parameters() if p.requires_grad}
    assert base
    assert all("lora_" in name for name in adapter)
    trainer = make_trainer(tmp_path, kind, model=model, gradient_accumulation_steps=2)
    passes = record_forwards(model, snapshot)
    trainer.train()
    assert_matches_reference(trainer, reference_run(kind, 2, model=lora(kind)))
    first, second = passes[1], passes[3]  # between them the probe
    for weights in passes:
        assert_identical({name: weights[name] for name in base}, base)
    assert all(not torch.equal(first[name], second[name]) for name in adapter)


def test_lora_resumes(tmp_path):
    """A checkpoint has the adapter only, which must not be taken for one whose keys were renamed."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    expected = run(make_trainer(tmp_path, "llama", model=lora("llama"), **settings))
    model = lora("llama")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.zeros_(parameter)
    trainer = make_trainer(tmp_path, "llama", model=model, **settings)
    assert_identical(run(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), expected)


# --- Precision, compilation, checkpointing ---


@pytest.mark.parametrize(("kind", "backend"), [("vit", "aot_eager"), ("bert", "eager"), ("llama", "eager")])
def test_compiled_model_matches(tmp_path, kind, backend):
    settings = {"torch_compile": True, "torch_compile_backend": backend, "max_steps": 3}
    trainer = trained(tmp_path, kind, gradient_accumulation_steps=2, **settings)
    assert hasattr(trainer.model_wrapped, "_orig_mod")
    assert_matches_reference(trainer, reference_run(kind, 2, steps=windows(kind, 2)[:3]))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing(tmp_path, kind):
    """With dropout: what is computed again in a backward draws the same masks, in both passes."""
    without, with_ = (
        run(
            make_trainer(tmp_path, kind, model=make_model(kind, 0.1), gradient_accumulation_steps=2, max_steps=3, **on)
        )
        for on in ({}, {CHECKPOINTING: True})
    )
    assert_identical(with_, without)


# --- Plain modules and the user's optimizers ---


def momentum(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True)


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)


@pytest.mark.parametrize("make", [momentum, adamw])
@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_of_the_user(tmp_path, kind, make):
    model = make_model(kind)
    optimizer = make(model.parameters(), BASE["learning_rate"])
    trainer = trained(tmp_path, kind, model=model, optimizers=(optimizer, None), gradient_accumulation_steps=2)
    assert trainer.optimizer.optimizer is optimizer
    assert_matches_reference(trainer, reference_run(kind, 2, optimizer=make))


def test_scheduler_of_the_user(tmp_path):
    rates = [1.0, 0.5, 0.0, 0.25]

    def make(parameters, lr):
        optimizer = momentum(parameters, lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[step % len(rates)])
        return optimizer, scheduler

    def make_scheduled(parameters, lr):
        optimizer, scheduler = make(parameters, lr)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    model = make_model("vit")
    trainer = trained(tmp_path, "vit", model=model, optimizers=make(model.parameters(), BASE["learning_rate"]))
    assert_matches_reference(trainer, reference_run("vit", 1, optimizer=make_scheduled))
    learning_rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert learning_rates[:3] == [BASE["learning_rate"] * rate for rate in rates[:3]]


class SparseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(61, LABELS, sparse=True)

    def forward(self, input_ids, labels):
        return {"loss": nn.functional.cross_entropy(self.embedding(input_ids).mean(1), labels)}


def test_sparse_gradients_are_refused(tmp_path):
    data = [{"input_ids": sample["input_ids"], "labels": sample["labels"]} for sample in make_data("bert")]
    trainer = make_trainer(tmp_path, "bert", model=SparseNet(), data=data)
    start = flat_weights(trainer.model)
    with pytest.raises(NotImplementedError, match=r"dense gradients.*sparse=False"):
        trainer.train()
    assert_identical(flat_weights(trainer.model), start)


def test_dynamic_rope_has_the_frequencies_of_the_first_pass(tmp_path):
    """They are a buffer, and the length that they are for is an attribute of a module of transformers."""

    def make(cls):
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10.0}
        small = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 8}
        config = LlamaConfig(**sizes, **small, initializer_range=0.3, rope_parameters=rope)
        settings = {"gradient_accumulation_steps": 1, "max_steps": len(lengths)}
        return make_unmoved(tmp_path, cls, "llama", model=LlamaForCausalLM(config), data=data, **settings)

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
    lengths, generator = (6, 6, 6, 24, 6, 30), torch.Generator().manual_seed(1)
    rows = [torch.randint(61, (length,), generator=generator) for length in lengths for _ in range(MICRO_BATCH)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    assert_unmoved_is_plain(make)


class Spectral(nn.Module):
    """A layer with complex weights, or with the same weights as pairs of real ones."""

    def __init__(self, is_complex: bool):
        super().__init__()
        torch.manual_seed(0)
        pairs = torch.randn(5, LABELS, 2)
        self.is_complex = is_complex
        self.weight = nn.Parameter(torch.view_as_complex(pairs) if is_complex else pairs)

    def forward(self, x, labels):
        weight = self.weight if self.is_complex else torch.view_as_complex(self.weight)
        return {"loss": nn.functional.cross_entropy((torch.fft.fft(x) @ weight).abs(), labels)}


@pytest.mark.parametrize("metric", ["l2", "layer", "element"])
def test_complex_weights_are_pairs_of_real_ones(tmp_path, metric):
    results = []
    for is_complex in (True, False):
        settings = {"gnp_metric": metric, "gnp_alpha": 0.8, "gradient_accumulation_steps": 2}
        trainer = trained(tmp_path, "net", model=Spectral(is_complex), **settings)
        weight = trainer.model.weight.detach()
        results.append((torch.view_as_real(weight) if is_complex else weight, trainer.state.log_history[:-1]))
    (weight, logs), (expected, expected_logs) = results
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    for log, of_pairs in zip(logs, expected_logs, strict=True):
        assert log == pytest.approx(of_pairs, rel=1e-4)
    with pytest.raises(NotImplementedError, match="complex weights"):
        make_trainer(tmp_path, "net", model=Spectral(True)).find_r()
