"""`GNPTrainer` where it must be `Trainer`: at α = 0 bit for bit, and in what plain arguments and subclasses carry."""

import pickle
from dataclasses import dataclass, fields

import pytest
import reference
import torch
from runs import (
    CHECKPOINTING,
    assert_identical,
    assert_matches_reference,
    make_args,
    make_trainer,
    reference_run,
    run,
    windows,
)
from tiny import KINDS, collate, make_data, make_model
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_gnp import GNPArguments, GNPMixin, GNPTrainer, GNPTrainingArguments


def assert_plain_training(tmp_path, kind: str, **kwargs) -> None:
    kwargs = {"max_steps": 4, "train_sampling_strategy": "random", "weight_decay": 0.1, **kwargs}
    result = run(make_trainer(tmp_path, kind, model=make_model(kind, dropout=0.1), gnp_alpha=0.0, **kwargs))
    expected = run(make_trainer(tmp_path, kind, Trainer, model=make_model(kind, dropout=0.1), **kwargs))
    assert len(expected["logs"]) == 4
    assert_identical(result, expected)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_alpha_zero(tmp_path, accumulation, bf16, checkpointing, optim):
    settings = {
        "gradient_accumulation_steps": accumulation,
        "bf16": bf16,
        "optim": optim,
        CHECKPOINTING: checkpointing,
    }
    assert_plain_training(tmp_path, "bert", **settings)


@pytest.mark.parametrize("max_grad_norm", [0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_alpha_zero_for_each_model(tmp_path, kind, max_grad_norm):
    assert_plain_training(tmp_path, kind, gradient_accumulation_steps=2, max_grad_norm=max_grad_norm)


def test_alpha_zero_needs_no_engine(tmp_path, monkeypatch):
    """Engines that the penalty refuses can still train without it, as the message of the refusal says."""

    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr("hf_gnp.step.make_engine", refuse)
    assert_plain_training(tmp_path, "vit")


def plain_values(args: TrainingArguments) -> dict:
    return {field.name: getattr(args, field.name) for field in fields(TrainingArguments)}


def test_plain_arguments_keep_every_field(tmp_path):
    args = make_args(tmp_path, TrainingArguments, hub_token="hf_secret", hub_model_id="me/model", warmup_steps=3)
    values, device = plain_values(args), args.device
    trainer = GNPTrainer(model=make_model("vit"), args=args, train_dataset=make_data("vit"))
    assert trainer.args is args
    assert trainer.gnp_args.gnp_values() == {"gnp_r": 0.05, "gnp_alpha": 0.8, "gnp_metric": "layer"}
    assert plain_values(args) == values
    assert args.hub_token == "hf_secret"
    assert args.device == device
    assert not isinstance(args, GNPArguments)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_plain_arguments_train(tmp_path, accumulation):
    data, settings = make_data("vit"), {"gradient_accumulation_steps": accumulation, "max_steps": 2}
    plain_args = make_args(tmp_path, TrainingArguments, **settings)
    gnp_args = make_args(tmp_path, gnp_metric="layer", gnp_r=0.05, gnp_alpha=0.8, **settings)
    by_plain, by_gnp = (
        run(GNPTrainer(model=make_model("vit"), args=args, train_dataset=data)) for args in (plain_args, gnp_args)
    )
    assert_identical(by_plain, by_gnp)
    assert "gnp_sharpness" in by_plain["logs"][0]


@dataclass
class GNPSeq2SeqTrainingArguments(GNPArguments, Seq2SeqTrainingArguments):
    pass


class GNPSeq2SeqTrainer(GNPMixin, Seq2SeqTrainer):
    pass


ARGUMENTS = (TrainingArguments, Seq2SeqTrainingArguments, GNPTrainingArguments, GNPSeq2SeqTrainingArguments)


@pytest.mark.parametrize("cls", ARGUMENTS)
def test_saved_arguments_are_the_users(tmp_path, cls):
    """Of plain arguments, training_args.bin can be read where hf_gnp is not installed."""
    trainer = GNPTrainer(model=make_model("vit"), args=make_args(tmp_path, cls, label_smoothing_factor=0.1))
    trainer.save_model()
    saved = torch.load(tmp_path / "training_args.bin", weights_only=False)
    for args in (saved, pickle.loads(pickle.dumps(trainer.args))):
        assert type(args) is cls
        assert args.to_dict() == trainer.args.to_dict()
        assert args.label_smoothing_factor == 0.1
        assert getattr(args, "gnp_alpha", None) == (0.8 if issubclass(cls, GNPArguments) else None)


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 12, "d_kv": 4, "d_ff": 14, "num_layers": 1, "num_heads": 3, "vocab_size": 61}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0))


@pytest.mark.parametrize("cls", [Seq2SeqTrainingArguments, GNPSeq2SeqTrainingArguments])
def test_mixin_with_seq2seq(tmp_path, cls):
    args = make_args(tmp_path, cls, predict_with_generate=True)
    data = make_data("llama", 12)
    trainer = GNPSeq2SeqTrainer(model=tiny_t5(), args=args, train_dataset=data, data_collator=collate)
    trainer.train()

    def loss(model, window):
        return model(**window[0]).loss

    by_default = {"direction": reference.in_proportion_to_each_tensor} if cls is Seq2SeqTrainingArguments else {}
    expected = reference_run("t5", 1, model=tiny_t5(), steps=windows("llama", 1, data), loss=loss, **by_default)
    assert_matches_reference(trainer, expected)
    assert (
        trainer.predict(data, max_new_tokens=2).predictions.ndim == 2
    )  # tokens, which only Seq2SeqTrainer generates; else logits
