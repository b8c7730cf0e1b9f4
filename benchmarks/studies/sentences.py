"""Sentences of SST-2 for a pretrained encoder, and sentences of other kinds to test on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from .labels import with_wrong_labels
from .task import Data, Task, first, load_splits


def sentence_task(settings: dict[str, Any], folder: str, model_path: str | None) -> Task:
    """Fine-tunes the encoder at `model_path`; a seed draws its sentences, and those that hold wrong labels."""
    splits = load_splits(folder, "sst2", train="train", test="validation")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenize = tokenizer_of(tokenizer, settings["max_length"])
    # Drawn once: no seed trains on them.
    everything = splits["train"].shuffle(seed=0)
    validation = by_length(tokenize(first(everything, settings["validation_size"])))
    rest = everything.select(range(settings["validation_size"], len(everything)))
    test = by_length(tokenize(first(splits["test"], settings["test_size"])))
    shift = load_splits(folder, "sentiment_shift", test="test")["test"].shuffle(seed=0)
    shift = by_length(tokenize(first(shift.select_columns(["sentence", "label"]), settings["test_size"])))

    def data(seed: int) -> Data:
        rows = np.random.default_rng(seed).permutation(len(rest))[: settings["train_size"]]
        train = tokenize(rest.select(rows))
        labels = with_wrong_labels(np.array(train["label"]), settings["wrong"], 2, seed)
        train = train.remove_columns("label").add_column("label", labels.tolist())
        return Data(train, validation, test)

    arguments = {
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "train_sampling_strategy": "group_by_length",
    }

    def make_model() -> torch.nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2)
        return with_adapters(model, settings["lora"]) if "lora" in settings else model

    return Task(
        make_model=make_model,
        data=data,
        collate=DataCollatorWithPadding(tokenizer),
        arguments=arguments,
        other_tests={"shift_accuracy": shift},
        second=topics(settings, folder, tokenize) if "second" in settings else None,
    )


def with_adapters(model: torch.nn.Module, rank: int) -> torch.nn.Module:
    """The encoder frozen, with LoRA on each of its linear layers; the head is trained whole."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig("SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def topics(settings: dict[str, Any], folder: str, tokenize: Callable[[Dataset], Dataset]) -> Data:
    """AG News: four topics."""
    news = load_splits(folder, "agnews", train="train", test="test").rename_column("text", "sentence")
    steps, batch = settings["second"]["steps"], settings["second"]["batch_size"]
    train = tokenize(first(news["train"].shuffle(seed=0), steps * batch))
    validation = by_length(tokenize(first(news["test"].shuffle(seed=0), settings["validation_size"])))
    return Data(train, validation, None)


def tokenizer_of(tokenizer: Any, max_length: int) -> Callable[[Dataset], Dataset]:
    """Maps sentences to tokens, in memory."""

    def tokenize(split: Dataset) -> Dataset:
        tokens = tokenizer(list(split["sentence"]), truncation=True, max_length=max_length)
        return Dataset.from_dict({"label": list(split["label"]), **tokens})

    return tokenize


def by_length(split: Dataset) -> Dataset:
    """Sorted, so that batches hold little padding."""
    return split.select(np.argsort([len(tokens) for tokens in split["input_ids"]], kind="stable"))
