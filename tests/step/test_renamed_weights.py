"""Checkpoints in the format of the original ones: every weight of the model at hand comes back, bit for bit."""

import itertools
import json
import logging

import pytest
import torch
from runs import (
    BOTH,
    WeightsAtSaves,
    assert_identical,
    assert_loads,
    generators,
    make_args,
    make_trainer,
    randomized,
    run,
    snapshot,
)
from safetensors.torch import load_file
from tiny import LABELS, VOCABULARY, make_data, make_model, save_tokenizer
from torch import nn
from transformers import (
    AutoModel,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_gnp import GNPTrainer
from hf_gnp.renamed_weights import load_renamed
from hf_gnp.trainer import GNPMixin


SETTINGS = {
    "max_steps": 4,
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 2,
    "optim": "adamw_torch",
    "train_sampling_strategy": "random",
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
}
WIDTH = 5  # of the new head, where the config says LABELS
MOE_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,  # multiples of 4: torch multiplies the experts in rows of 16 bytes
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class Scaled(ViTForImageClassification):
    """Cannot be made from a config alone."""

    def __init__(self, config, scale):
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, pixel_values, labels):
        logits = super().forward(pixel_values).logits * self.scale
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class UserModel(PreTrainedModel):
    """A ViT under another name inside a user's class, with a head that the config does not know."""

    config_class = ViTConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.backbone = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, LABELS)
        self.post_init()

    def forward(self, pixel_values, labels):
        logits = self.head(self.backbone(pixel_values).last_hidden_state[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Around(nn.Module):
    """A plain module around a ViT: `Trainer` saves its `state_dict` as it is."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values, labels):
        return self.vit(pixel_values, labels=labels)


def make_changed(change: str) -> nn.Module:
    """A ViT that its config does not describe, with all weights drawn at random."""
    vit = make_model("vit", dropout=0.1)
    if change == "head of two layers":
        vit.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(33, LABELS))
    elif change == "width":
        vit.classifier = nn.Linear(33, WIDTH)
    elif change == "channels":
        patches = vit.vit.embeddings.patch_embeddings
        patches.projection, patches.num_channels = nn.Conv2d(1, 33, 4, 4), 1
    elif change == "constructor":
        vit = Scaled(vit.config, scale=2.0)
    elif change == "user's class":
        vit = UserModel(vit.config)
    elif change == "module around":
        vit = Around(vit)
    elif change == "compiled":
        vit = torch.compile(vit, backend="eager")
    return vit


def loss_of_width(outputs, labels, num_items_in_batch=None):
    """Stock's own loss would reshape the logits to the width that the config names."""
    return nn.functional.cross_entropy(outputs["logits"], labels)


def order():
    """A metric that makes the first evaluation the best."""
    evaluations = itertools.count()
    return lambda prediction: {"order": float(next(evaluations))}


def make_changed_trainer(output_dir, change: str, model=None, cls=GNPTrainer, **kwargs) -> Trainer:
    rows = make_data("vit", 24)
    if change == "channels":
        rows = [{**row, "pixel_values": row["pixel_values"][:1]} for row in rows]
    if change == "width":
        kwargs["compute_loss_func"] = loss_of_width
    if change == "compiled":  # its forward names no arguments
        kwargs.update(remove_unused_columns=False, label_names=["labels"])
    settings = {**SETTINGS, "eval_dataset": rows, **kwargs}
    return make_trainer(output_dir, "vit", cls, make_changed(change) if model is None else model, rows, **settings)


CHANGES = ["head of two layers", "width", "channels", "constructor", "user's class", "module around", "compiled"]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_model_resumes(tmp_path, change):
    """The run that is resumed is the run that never stopped; at its end both load the best weights, not the last."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "order", "greater_is_better": False}
    saves = WeightsAtSaves()
    trainer = make_changed_trainer(tmp_path / "whole", change, callbacks=[saves], compute_metrics=order(), **best)
    expected = run(trainer)
    assert trainer.state.best_global_step == 1
    assert_identical(expected["weights"], saves.weights[1])

    model = randomized(make_changed(change))
    parameters = list(model.parameters())
    resumed = make_changed_trainer(tmp_path / "resumed", change, model, compute_metrics=order(), **best)
    result = run(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_identical(result, expected)
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True)), "loaded in place"


def make_moe(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "mixtral":  # twelve experts: as text, "10" comes before "2"
        return MixtralForCausalLM(MixtralConfig(**MOE_SIZES, num_local_experts=12))
    experts = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 6}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE_SIZES, **experts))


@pytest.mark.parametrize("shard_size", ["5GB", "6KB"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_merged_again(tmp_path, kind, shard_size):
    """Also where the experts of one layer lie in several shards."""
    source = make_moe(kind)
    source.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 4) == (shard_size == "6KB")
    assert_loads(tmp_path, source, make_moe(kind))


def test_moe_run_is_resumed(tmp_path):
    settings = {**SETTINGS, "eval_strategy": "no"}
    expected = run(make_trainer(tmp_path, "llama", model=make_moe("mixtral"), **settings))
    trainer = make_trainer(tmp_path / "out", "llama", model=randomized(make_moe("mixtral")), **settings)
    assert_identical(run(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_files_are_loaded(tmp_path, sharded):
    """As older versions of transformers wrote them, and stock `Trainer` still reads them."""
    source = make_model("vit")
    source.save_pretrained(tmp_path / "safe")
    tensors = load_file(tmp_path / "safe" / "model.safetensors")
    names = {name: f"part-{i % 3}.bin" if sharded else "pytorch_model.bin" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        torch.save({name: tensors[name] for name in names if names[name] == file}, tmp_path / file)
    if sharded:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert_loads(tmp_path, source, make_model("vit"))


def test_key_mapping(tmp_path):
    """`save_pretrained` reverts the `key_mapping` that `from_pretrained` was given."""
    start = make_model("bert")
    others = {name.replace("bert.", "other.", 1): value for name, value in start.state_dict().items()}
    start._weight_conversions = []
    start.save_pretrained(tmp_path / "start", state_dict=others)

    def load():
        return make_model("bert", loaded_from=tmp_path / "start", key_mapping={r"^other\.": "bert."})

    source = load()
    assert_identical(snapshot(source), snapshot(start))
    randomized(source).save_pretrained(tmp_path)
    assert "other.embeddings.LayerNorm.weight" in load_file(tmp_path / "model.safetensors")
    assert_loads(tmp_path, source, load())


# --- Where stock is right, or has to be matched ---


@pytest.mark.parametrize("kind", ["bert", "llama", "llama-lora", "net"])
def test_own_names_are_left_to_stock(tmp_path, kind):
    source = make_model(kind)
    make_trainer(tmp_path, kind.partition("-")[0], Trainer, model=source).save_model(tmp_path)
    model = randomized(make_model(kind))
    before = snapshot(model)
    assert load_renamed(model, str(tmp_path)) is None
    assert_identical(snapshot(model), before)


def save_without_head(source: PreTrainedModel, folder, **more: torch.Tensor) -> None:
    weights = {name: value for name, value in source.state_dict().items() if not name.startswith("classifier")}
    source.save_pretrained(folder, state_dict={**weights, **more})


def test_missing_head_is_left_to_stock(tmp_path):
    save_without_head(make_model("bert"), tmp_path)
    assert load_renamed(randomized(make_model("bert")), str(tmp_path)) is None


def test_missing_weights_are_logged(tmp_path, caplog):
    source, model = make_model("vit"), randomized(make_model("vit"))
    save_without_head(source, tmp_path, stray=torch.ones(1))
    trainer = make_trainer(tmp_path / "out", "vit", model=model)
    head = model.classifier.weight.clone()
    with caplog.at_level(logging.WARNING):
        trainer._load_from_checkpoint(str(tmp_path))
    assert_identical(snapshot(model.vit), snapshot(source.vit))
    assert torch.equal(model.classifier.weight, head)
    messages = [record.getMessage() for record in caplog.records if "keys in the checkpoint" in record.getMessage()]
    assert messages == [
        "There were missing keys in the checkpoint model loaded: ['classifier.weight', 'classifier.bias'].",
        "There were unexpected keys in the checkpoint model loaded: ['stray'].",
    ]


def test_base_model_is_loaded(tmp_path):
    """Under the prefix that the model has and the checkpoint has not."""
    source = AutoModel.from_config(make_model("bert").config)
    assert isinstance(source, BertModel)
    source.save_pretrained(tmp_path)
    model = randomized(make_model("bert"))
    result = load_renamed(model, str(tmp_path))
    assert result.missing_keys == ["classifier.weight", "classifier.bias"]
    assert_identical(snapshot(model.bert), snapshot(source))


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_without_a_penalty_stock_loads(tmp_path, caplog, kind):
    make_model(kind).save_pretrained(tmp_path)
    results = []
    for cls in BOTH:
        torch.manual_seed(5)
        trainer = make_trainer(tmp_path / "out", kind, cls, model=randomized(make_model(kind)), gnp_alpha=0.0)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer._load_from_checkpoint(str(tmp_path))
            resumed = snapshot(trainer.model)
            randomized(trainer.model)
            trainer.state.best_model_checkpoint = str(tmp_path)
            trainer._load_best_model()
        results.append((resumed, snapshot(trainer.model), [r.getMessage() for r in caplog.records], generators()))
    assert_identical(*results)


def test_sentence_transformer_is_resumed(tmp_path):
    """Its trainers load by the folder alone."""
    st = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    class GNPSentenceTransformerTrainer(GNPMixin, st.SentenceTransformerTrainer):
        pass

    words = [f"w{i}" for i in range(VOCABULARY - 2)]
    make_model("bert", dropout=0.1).bert.save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert", words)
    pairs = list(itertools.pairwise(words))[:24]
    data = Dataset.from_dict({"anchor": words[:24], "positive": [f"{a} {b}" for a, b in pairs]})

    def make(folder):
        body = Transformer(str(tmp_path / "bert"))
        model = st.SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension())], device="cpu")
        args = make_args(folder, st.SentenceTransformerTrainingArguments, save_strategy="steps", save_steps=2)
        loss = MultipleNegativesRankingLoss(model)
        return GNPSentenceTransformerTrainer(model, args, train_dataset=data, loss=loss)

    expected = run(make(tmp_path))
    trainer = make(tmp_path / "resumed")
    randomized(trainer.model)
    result = run(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(expected["logs"]) == 6
    assert_identical(result, expected)
