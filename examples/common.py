"""Share code between the example scripts: arguments, the user's data, training, evaluation and publishing."""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import yaml
from datasets import ClassLabel, DatasetDict, Value
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainingArguments

from hf_gnp import GNPTrainingArguments


# With these defaults a script needs no flag but the model and the data.
SCRIPT_DEFAULTS = {
    "do_train": True,
    "do_eval": True,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 10,
    "dataloader_pin_memory": torch.accelerator.is_available(),
    "output_dir": f"outputs/{Path(sys.argv[0]).stem}",
}


@dataclass
class ModelArguments:
    """Name the model to fine-tune."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A model of the hub or a local folder. Default: a small model, trained from scratch."},
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "The configuration of a model to train from scratch: a hub name, or a local folder."},
    )
    model_revision: str = field(default="main", metadata={"help": "The branch, tag or commit of the hub's model."})
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Initialise layers whose shape differs from the checkpoint's, such as the classifier."},
    )


@dataclass
class DataArguments:
    """Name the data to fine-tune on."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A dataset of the hub, a local folder or a file. Default: the data embedded in the script."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of the hub's dataset."})
    train_val_split: float | None = field(
        default=None,
        metadata={"help": "Evaluate on this fraction of the training data, not on a validation or test split."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "The number of samples to train on."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "The number of samples to evaluate on."})
    label_column_name: str | None = field(default=None, metadata={"help": "Default: label or labels."})


def parse_args(data_arguments: type[DataArguments], embedded_defaults: dict[str, Any], *others: type) -> list[Any]:
    """
    Return the model, data, training and other arguments, from the flags and from the YAML file after `--config`.

    A flag overrides the file, and the file overrides `embedded_defaults`. These suit the embedded model and data, so
    they are left out if the user names another model or other data.
    """
    parser = HfArgumentParser((ModelArguments, data_arguments, GNPTrainingArguments, *others))
    parser.add_argument("--config", help="A YAML file of arguments, which the flags override.")
    parser.set_defaults(**SCRIPT_DEFAULTS)
    flags, _ = parser.parse_known_args()
    config = yaml.safe_load(Path(flags.config).read_text(encoding="utf-8")) if flags.config else {}
    is_own = any(getattr(flags, name) or name in config for name in ("model_name_or_path", "dataset_name"))
    parser.set_defaults(**(({} if is_own else embedded_defaults) | config))
    *parsed, rest = parser.parse_args_into_dataclasses(look_for_args_file=False)
    if unknown := vars(rest).keys() - {"config"}:
        raise ValueError(f"{rest.config} has keys that are no arguments of this script: {sorted(unknown)}")
    return parsed


def setup_logging(args: TrainingArguments) -> None:
    """Set the log level of each process to that of `args`."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for library in (transformers, datasets):
        library.utils.logging.set_verbosity(args.get_process_log_level())


def load_own_data(args: DataArguments, seed: int, *names: str) -> DatasetDict:
    """
    Load the user's data for a classifier: the splits "train" and "test" with the columns "label" and `names[0]`.

    Args:
        args: The name of a dataset of the hub, a folder of images or files, or a parquet, csv or json file.
        seed: The seed of the split. It is used if the data has no validation or test split, or the user asks for one.
        names: Possible names of the input column, if the user does not name it.
    """
    suffix = Path(args.dataset_name).suffix.removeprefix(".").replace("jsonl", "json")
    if suffix in ("parquet", "csv", "json"):
        splits = datasets.load_dataset(suffix, data_files=args.dataset_name)
    else:
        splits = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    test = next((splits[name] for name in ("validation", "test") if name in splits), None)
    if test is None or args.train_val_split is not None:
        splits = splits["train"].train_test_split(args.train_val_split or 0.15, seed=seed)
    else:
        splits = DatasetDict(train=splits["train"], test=test)
    found = {}
    for column, customary in ((names[0], names), ("label", ("label", "labels"))):
        wanted = getattr(args, f"{column}_column_name")
        possible = [wanted] if wanted else [name for name in customary if name in splits["train"].features]
        if not {*possible} & {*splits["train"].features}:
            raise ValueError(f"Which of {splits['train'].column_names} is the {column}? Set --{column}_column_name.")
        found[possible[0]] = column
    splits = splits.select_columns(list(found)).rename_columns(found)
    if not isinstance(splits["train"].features["label"], ClassLabel):
        splits = splits.cast_column("label", Value("string"))
        names = sorted({label for split in splits.values() for label in split.unique("label")})
        splits = splits.cast_column("label", ClassLabel(names=names))
    return splits


def limit_samples(splits: DatasetDict, args: DataArguments, seed: int) -> DatasetDict:
    """Keep `max_train_samples` and `max_eval_samples` random samples of the splits."""
    for name, count in (("train", args.max_train_samples), ("test", args.max_eval_samples)):
        if count is not None:
            splits[name] = splits[name].shuffle(seed=seed).select(range(min(count, len(splits[name]))))
    return splits


def label_kwargs(splits: DatasetDict) -> dict[str, Any]:
    """Return the label names for the configuration of a classifier."""
    names = splits["train"].features["label"].names
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of correct predictions."""
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def run(trainer: Trainer, **card: Any) -> None:
    """Train, evaluate, and save or push the model. `card` has the arguments of `Trainer.create_model_card`."""
    args = trainer.args
    if args.do_train:
        # A flag is text. "True" means the last checkpoint of the output directory.
        checkpoint = {"True": True, "False": False}.get(args.resume_from_checkpoint, args.resume_from_checkpoint)
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if card["finetuned_from"] is None:
        # A model without a name would get a card that says "fine-tuned". One that is named after a folder does not.
        trainer.model.config.name_or_path = args.output_dir
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    trainer.accelerator.end_training()  # else torch warns of a process group that nobody has destroyed
