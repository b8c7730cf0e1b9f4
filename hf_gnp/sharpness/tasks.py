"""Checkpoints of classifiers and causal language models with data to measure them on, for the command line."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
)


FILE_FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
TASKS = {
    "ForImageClassification": AutoModelForImageClassification,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForCausalLM": AutoModelForCausalLM,
    "LMHeadModel": AutoModelForCausalLM,
}


def load_model(checkpoint: str) -> PreTrainedModel:
    """
    Raises:
        ValueError: for a model that is neither a classifier of images or texts nor a causal language model.
    """
    architecture = (AutoConfig.from_pretrained(checkpoint).architectures or ["none"])[0]
    for ending, auto_class in TASKS.items():
        if architecture.endswith(ending):
            return auto_class.from_pretrained(checkpoint)
    raise ValueError(
        f"{checkpoint} is a {architecture}: the command measures classifiers of images and texts and causal language "
        "models. Call trainer.measure_sharpness for others."
    )


def load_data(args: Namespace, model: PreTrainedModel, checkpoint: str) -> tuple[Any, Callable[..., Any]]:
    """The dataset as the model takes it, and its collator."""
    data = _read(args.data, args.split)
    if model.main_input_name == "pixel_values":
        return _images(args, data, checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = _column(data, args.text_column, ("text", "sentence", "content"), "--text_column")
    is_language_model = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        return tokenizer(batch[text], truncation=True, max_length=args.max_length)

    if is_language_model:
        data = data.filter(lambda row: len(row[text]) > 0).map(
            tokenize, batched=True, remove_columns=data.column_names
        )
        return data.filter(lambda row: len(row["input_ids"]) > 1), DataCollatorForLanguageModeling(
            tokenizer, mlm=False
        )
    label = _column(data, args.label_column, ("label", "labels"), "--label_column")
    others = [name for name in data.column_names if name != label]
    return data.map(tokenize, batched=True, remove_columns=others), DataCollatorWithPadding(tokenizer)


def _read(source: str, split: str) -> Any:
    import datasets

    path = Path(source)
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(f"{path} is none of the known formats: {', '.join(FILE_FORMATS)}.")
        return datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=source, split="train")
    if (path / "state.json").is_file():
        return datasets.load_from_disk(source)
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(source)[split]
    return datasets.load_dataset(source, split=split)


def _column(data: Any, wanted: str | None, names: Sequence[str], flag: str) -> str:
    found = [name for name in ([wanted] if wanted else names) if name in data.column_names]
    if not found:
        raise ValueError(f"The columns are {data.column_names}: name one with {flag}.")
    return found[0]


def _images(args: Namespace, data: Any, checkpoint: str) -> tuple[Any, Callable[..., Any]]:
    from datasets import Image

    image = _column(data, args.image_column, ("image", "img"), "--image_column")
    label = _column(data, args.label_column, ("label", "labels", "fine_label"), "--label_column")
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = processor([row[image] for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row[label] for row in rows])}

    return data.select_columns([image, label]).cast_column(image, Image(mode="RGB")), collate
