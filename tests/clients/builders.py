"""The trainers that users have, each over a tiny model and data made on the spot: `CLIENTS`."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from runs import QUIET
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_gnp import GNPArguments, GNPMixin


WORDS = "a red blue green cat dog bird fish sees likes eats finds the small big old what who where now".split()  # noqa: SIM905
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<eos>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
DROPOUT = 0.1
SIZES = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
SAMPLES = 32
PAIRED = {"max_length": 24, "disable_dropout": False}
GENERATING = {"num_generations": 4, "max_completion_length": 6}
# Two micro-batches a step, and dropout: what a replay must get right shows on every client.
BASE = {
    **QUIET,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 1e-2,
}


class Built(NamedTuple):
    """A client as its library has it: `options` are what its trainer takes beside `args`."""

    trainer_class: type[Trainer]
    args_class: type[TrainingArguments]
    args: dict[str, Any]
    options: dict[str, Any]


class Client(NamedTuple):
    """The library that a client comes from, and what builds it anew in a folder that all builds share."""

    library: str
    build: Callable[[Path], Built]


def with_penalty(built: Built) -> Built:
    """The client's classes with the mixins, as users write them."""

    class GNPClientTrainer(GNPMixin, built.trainer_class):
        pass

    @dataclass
    class GNPClientConfig(GNPArguments, built.args_class):
        pass

    GNPClientTrainer.__name__ = f"GNP{built.trainer_class.__name__}"
    GNPClientConfig.__name__ = f"GNP{built.args_class.__name__}"
    return built._replace(trainer_class=GNPClientTrainer, args_class=GNPClientConfig)


def make_client(name: str, folder: Path, **args: Any) -> Trainer:
    """The trainer of a client: its library's own, or the penalised one if `args` has any of the gnp arguments."""
    built = CLIENTS[name].build(folder)
    if any(argument.startswith("gnp_") for argument in args):
        built = with_penalty(built)
    config = built.args_class(output_dir=str(folder / "out"), **{**BASE, **built.args, **args})
    return built.trainer_class(args=config, **built.options)


def tokenizer(special_around: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; BERT's puts [CLS] and [SEP] around a text, or a pair of texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "<eos>"}
    if special_around:
        ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        names["mask_token"] = "[MASK]"
    made = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **names)
    made.chat_template = CHAT_TEMPLATE
    return made


def sentences(seed: int, shortest: int = 3, longest: int = 8) -> list[str]:
    generator = torch.Generator().manual_seed(seed)

    def sentence() -> str:
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    return [sentence() for _ in range(SAMPLES)]


def dataset(**columns: list[Any]):
    from datasets import Dataset

    return Dataset.from_dict(columns)


def saved(folder: Path, name: str, make: Callable[[], Any], special_around: bool = False) -> str:
    """
    The path of a model with seeded weights and its tokenizer. TRL loads a reference model from where the trained one
    came from, and sentence-transformers its modules.
    """
    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        make().save_pretrained(path)
        tokenizer(special_around).save_pretrained(path)
    return str(path)


def llama(folder: Path, cls: type = LlamaForCausalLM):
    ids = {"pad_token_id": SPECIAL.index("[PAD]"), "bos_token_id": None, "eos_token_id": SPECIAL.index("<eos>")}
    size = {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 64, "num_labels": 1}
    config = LlamaConfig(**SIZES, **size, **ids, num_key_value_heads=3, attention_dropout=DROPOUT)
    return cls.from_pretrained(saved(folder, cls.__name__, lambda: cls(config)))


def bert_path(folder: Path, cls: type, **config: Any) -> str:
    dropouts = {"hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": DROPOUT}
    size = {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 48}
    made = BertConfig(**SIZES, **size, **dropouts, **config)
    return saved(folder, cls.__name__, lambda: cls(made), special_around=True)


def distinct_words(completions: list[str], **_: Any) -> list[float]:
    """A reward: how many different words a completion has."""
    return [float(len(set(completion.split()))) for completion in completions]


def of_trl(name: str, folder: Path, data: Any, args: dict[str, Any], where: str = "trl", **options: Any) -> Built:
    """A trainer of TRL and its config, by the name that both begin with."""
    module = importlib.import_module(where)
    trainer_class, args_class = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    options = {"model": llama(folder), "processing_class": tokenizer(), "train_dataset": data, **options}
    return Built(trainer_class, args_class, args, options)


def prompts():
    return dataset(prompt=sentences(1))


def answers():
    return dataset(prompt=sentences(1), completion=[f" {text}" for text in sentences(2)])


def preferences():
    return dataset(
        prompt=sentences(1), chosen=[f" {t}" for t in sentences(2)], rejected=[f" {t}" for t in sentences(3)]
    )


def sft_packed(folder: Path) -> Built:
    args = {"max_length": 16, "packing": True, "packing_strategy": "wrapped"}
    return of_trl("SFT", folder, dataset(text=sentences(1)), args)


def sft_completion_only(folder: Path) -> Built:
    return of_trl("SFT", folder, answers(), {"max_length": 16, "completion_only_loss": True})


def sft_lora(folder: Path) -> Built:
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=DROPOUT, task_type="CAUSAL_LM")
    return of_trl("SFT", folder, dataset(text=sentences(1)), {"max_length": 16}, peft_config=adapter)


def dpo(folder: Path) -> Built:
    return of_trl("DPO", folder, preferences(), PAIRED)


def reward(folder: Path) -> Built:
    return of_trl("Reward", folder, preferences(), PAIRED, model=llama(folder, LlamaForSequenceClassification))


def kto(folder: Path) -> Built:
    labels = [index % 3 != 0 for index in range(SAMPLES)]
    return of_trl("KTO", folder, answers().add_column("label", labels), PAIRED)


def grpo(folder: Path, **args: Any) -> Built:
    return of_trl("GRPO", folder, prompts(), {**GENERATING, **args}, reward_funcs=distinct_words)


def grpo_iterations(folder: Path) -> Built:
    return grpo(folder, num_iterations=2, beta=0.05, max_steps=4)


def grpo_steps_per_generation(folder: Path) -> Built:
    return grpo(folder, steps_per_generation=4, max_steps=4)


def rloo(folder: Path) -> Built:
    return of_trl("RLOO", folder, prompts(), GENERATING, reward_funcs=distinct_words)


def gkd_on_policy(folder: Path) -> Built:
    turns = zip(sentences(1), sentences(2), strict=True)
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    torch.manual_seed(7)
    teacher = LlamaForCausalLM(llama(folder).config)  # other weights than the student's: a loss of 0 has no gradient
    args = {"lmbda": 1.0, "max_new_tokens": 6, "max_length": 32, "disable_dropout": False}
    where = "trl.experimental.gkd"
    return of_trl("GKD", folder, dataset(messages=messages), args, where, teacher_model=teacher)


def online_dpo(folder: Path) -> Built:
    args, where = {"max_new_tokens": 6, "max_length": 32}, "trl.experimental.online_dpo"
    return of_trl("OnlineDPO", folder, prompts(), args, where, reward_funcs=distinct_words)


def sentence_transformer(folder: Path, cached: bool = False) -> Built:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Pooling

    words = Transformer(bert_path(folder, BertModel))
    model = SentenceTransformer(modules=[words, Pooling(SIZES["hidden_size"])], device="cpu")
    if cached:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    else:
        loss = losses.MultipleNegativesRankingLoss(model)
    data = dataset(anchor=sentences(1), positive=sentences(2))
    options = {"model": model, "loss": loss, "train_dataset": data}
    return Built(SentenceTransformerTrainer, SentenceTransformerTrainingArguments, {}, options)


def sentence_transformer_cached(folder: Path) -> Built:
    return sentence_transformer(folder, cached=True)


def cross_encoder(folder: Path) -> Built:
    from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments

    model = CrossEncoder(bert_path(folder, BertForSequenceClassification, num_labels=1), num_labels=1, device="cpu")
    labels = [float(index % 2) for index in range(SAMPLES)]
    data = dataset(query=sentences(1), answer=sentences(2), label=labels)
    options = {"model": model, "train_dataset": data}  # the loss is the default one, binary cross-entropy
    return Built(CrossEncoderTrainer, CrossEncoderTrainingArguments, {}, options)


def sparse_encoder(folder: Path) -> Built:
    from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
    from sentence_transformers.sparse_encoder import losses
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

    words = MLMTransformer(bert_path(folder, BertForMaskedLM))
    model = SparseEncoder(modules=[words, SpladePooling(pooling_strategy="max")], device="cpu")
    # Three components, summed and logged one by one by the trainer, whose callback raises the weights.
    loss = losses.SpladeLoss(
        model,
        loss=losses.SparseMultipleNegativesRankingLoss(model),
        document_regularizer_weight=0.1,
        query_regularizer_weight=0.1,
    )
    options = {"model": model, "loss": loss, "train_dataset": dataset(query=sentences(1), answer=sentences(2))}
    return Built(SparseEncoderTrainer, SparseEncoderTrainingArguments, {}, options)


def seq2seq(folder: Path) -> Built:
    torch.manual_seed(0)
    sizes = {"d_model": 12, "d_kv": 4, "d_ff": 14, "num_layers": 1, "num_heads": 3}
    ids = {"vocab_size": len(SPECIAL) + len(WORDS), "decoder_start_token_id": 0, "pad_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**sizes, **ids, dropout_rate=DROPOUT))
    words = tokenizer()
    data = [
        {"input_ids": words(source)["input_ids"], "labels": words(target)["input_ids"]}
        for source, target in zip(sentences(1), sentences(2), strict=True)
    ]
    options = {"model": model, "train_dataset": data, "data_collator": DataCollatorForSeq2Seq(words, model)}
    # Label smoothing takes the labels out of the inputs; the tokens that were seen are counted by `Trainer`.
    args = {"label_smoothing_factor": 0.1, "include_num_input_tokens_seen": "all"}
    return Built(Seq2SeqTrainer, Seq2SeqTrainingArguments, args, options)


CLIENTS = {
    "sft-packed": Client("trl", sft_packed),
    "sft-completion-only": Client("trl", sft_completion_only),
    "sft-lora": Client("trl", sft_lora),
    "dpo": Client("trl", dpo),
    "reward": Client("trl", reward),
    "kto": Client("trl", kto),
    "grpo": Client("trl", grpo),
    "grpo-iterations": Client("trl", grpo_iterations),
    "grpo-steps-per-generation": Client("trl", grpo_steps_per_generation),
    "rloo": Client("trl", rloo),
    "gkd-on-policy": Client("trl", gkd_on_policy),
    "online-dpo": Client("trl", online_dpo),
    "sentence-transformer": Client("sentence_transformers", sentence_transformer),
    "sentence-transformer-cached": Client("sentence_transformers", sentence_transformer_cached),
    "cross-encoder": Client("sentence_transformers", cross_encoder),
    "sparse-encoder": Client("sentence_transformers", sparse_encoder),
    "seq2seq": Client("transformers", seq2seq),
}
# Their `training_step` runs a loss of its own, which `Trainer.training_step` never sees.
REFUSED = ("online-dpo",)
