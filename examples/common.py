"""What the example scripts share: arguments, the user's own data, and the train-evaluate-publish sequence."""

import json
import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import yaml
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import EvalPrediction, HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments

from hf_gnp import GNPTrainingArguments


logger = logging.getLogger(__name__)

FILE_FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
EVAL_SPLITS = ("validation", "test")

# With these a script needs no flag but the model and the data: it trains, and keeps the best epoch.
SCRIPT_DEFAULTS = {
    "do_train": True,
    "do_eval": True,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "metric_for_best_model": "accuracy",
    "logging_steps": 10,
    "dataloader_pin_memory": torch.accelerator.is_available(),
    "output_dir": f"outputs/{Path(sys.argv[0]).stem}",
}


@dataclass
class ModelArguments:
    """Which model to fine-tune."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A model of the hub or a local folder. Default: a small model, trained from scratch."},
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "The configuration of the model to train from scratch: of the hub, or a local folder."},
    )
    model_revision: str = field(default="main", metadata={"help": "The branch, tag or commit of the hub's model."})
    token: str | None = field(default=None, metadata={"help": "The token for private models and data of the hub."})
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Start layers of another shape than the checkpoint's afresh, such as the classifier."},
    )

    def hub_kwargs(self) -> dict[str, Any]:
        """What every `from_pretrained` of this model gets."""
        return {"revision": self.model_revision, "token": self.token}


@dataclass
class DataArguments:
    """Which data to fine-tune on."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A dataset of the hub, a local folder or a file. Default: the data embedded in the script."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of the hub's dataset."})
    train_file: str | None = field(
        default=None, metadata={"help": "A parquet, csv or json file to train on, instead of a dataset's name."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "A file of the same format to evaluate on."})
    train_val_split: float | None = field(
        default=None,
        metadata={
            "help": "The fraction of the training data to evaluate on. Default: the data's own validation or test "
            "split, or 0.15 where there is none."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on that many samples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on that many samples only."})
    label_column_name: str | None = field(
        default=None, metadata={"help": "The column of the labels, where its name does not tell."}
    )

    @property
    def embedded(self) -> bool:
        """Whether the user named no data, so that the script's own is used."""
        return self.dataset_name is None and self.train_file is None


def parse_args(
    data_arguments: type[DataArguments], embedded_defaults: dict[str, Any]
) -> tuple[ModelArguments, DataArguments, GNPTrainingArguments]:
    """
    Reads flags, one yaml or json path, or `--config path` followed by flags.

    A flag wins over the file, the file over the script's defaults.

    Args:
        data_arguments: The script's kind of `DataArguments`.
        embedded_defaults: Arguments that suit the embedded model and data, used with these only.
    """
    parser = HfArgumentParser((ModelArguments, data_arguments, GNPTrainingArguments))
    parser.add_argument("--config", help="A yaml or json file of arguments, which the flags override.")
    argv = sys.argv[1:]
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = ["--config", argv[0]]

    def parse(defaults: dict[str, Any]) -> Namespace:
        """Some defaults depend on other arguments: looks at these before a dataclass validates all of them."""
        parser.set_defaults(**defaults)
        return parser.parse_known_args(argv)[0]

    given = parse(SCRIPT_DEFAULTS)
    config = _read_config(given.config, vars(given)) if given.config else {}
    given = parse(config)
    if not (given.dataset_name or given.train_file or given.model_name_or_path):
        given = parse(embedded_defaults | config)
    parse({"load_best_model_at_end": given.save_strategy == given.eval_strategy != "no"} | config)
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[:3]


def _read_config(path: str, known: dict[str, Any]) -> dict[str, Any]:
    text = Path(path).read_text(encoding="utf-8")
    config = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    unknown = sorted(config.keys() - known.keys())
    if unknown:
        raise ValueError(f"{path} has keys that are no arguments of this script: {unknown}")
    return config


def setup_logging(args: TrainingArguments) -> None:
    """Logs on each process at the level that `args` asks for."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    level = args.get_process_log_level()
    logging.getLogger().setLevel(level)
    transformers.utils.logging.set_verbosity(level)
    datasets.utils.logging.set_verbosity(level)
    logger.info(f"Training arguments: {args}")


def load_own_data(args: DataArguments, seed: int, token: str | None = None) -> DatasetDict:
    """
    Loads the data that the user named.

    Args:
        args: Names a dataset of the hub, a folder (of `save_to_disk`, of images, of files), or files.
        seed: Of the split, where the data has no validation or test split or the user asked for one.
        token: For private datasets of the hub.

    Returns:
        The splits "train" and "test", with all their columns.
    """
    splits = _read_splits(args, token)
    if "train" not in splits:
        raise ValueError(f"The data has no split named train, only {list(splits)}.")
    eval_split = next((name for name in EVAL_SPLITS if name in splits), None)
    if eval_split is None or args.train_val_split is not None:
        return splits["train"].train_test_split(
            0.15 if args.train_val_split is None else args.train_val_split, seed=seed
        )
    return DatasetDict(train=splits["train"], test=splits[eval_split])


def _read_splits(args: DataArguments, token: str | None) -> DatasetDict:
    source = Path(args.train_file or args.dataset_name)
    if source.is_file() or args.train_file:
        if source.suffix not in FILE_FORMATS:
            raise ValueError(f"{source} is none of the known formats: {', '.join(FILE_FORMATS)}.")
        files = {"train": args.train_file or args.dataset_name, "validation": args.validation_file}
        return datasets.load_dataset(
            FILE_FORMATS[source.suffix], data_files={split: file for split, file in files.items() if file}
        )
    if (source / "state.json").is_file() or (source / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(args.dataset_name)
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    return datasets.load_dataset(args.dataset_name, args.dataset_config_name, token=token)


def find_column(
    splits: DatasetDict, wanted: str | None, names: Sequence[str], kind: Callable[[Any], bool], flag: str
) -> str:
    """
    Finds a column by the user's word, by a customary name, or by what it holds, in this order.

    Args:
        splits: The data.
        wanted: The name that the user gave, if any.
        names: Customary names.
        kind: Whether a feature is what the column should hold.
        flag: The flag with which the user names the column, for the error message.
    """
    features = splits["train"].features
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"{flag} is {wanted!r}, but the columns are {list(features)}.")
        return wanted
    found = [name for name in names if name in features]
    found += [name for name, feature in features.items() if kind(feature)]
    if not found:
        raise ValueError(f"None of the columns {list(features)} looks right: name one with {flag}.")
    return found[0]


def find_label_column(splits: DatasetDict, args: DataArguments) -> str:
    """The column of the labels, see `find_column`."""
    return find_column(
        splits, args.label_column_name, ("label", "labels"), lambda f: isinstance(f, ClassLabel), "--label_column_name"
    )


def select_columns(splits: DatasetDict, names: dict[str, str]) -> DatasetDict:
    """Keeps the columns that `names` maps to new names, under these."""
    splits = splits.select_columns(list(names))
    return splits.rename_columns({old: new for old, new in names.items() if old != new})


def encode_labels(splits: DatasetDict) -> DatasetDict:
    """Makes "label" a `ClassLabel` with the same classes in both splits, if it is not one yet."""
    if isinstance(splits["train"].features["label"], ClassLabel):
        return splits
    values = sorted(set().union(*(split.unique("label") for split in splits.values())))
    index = {value: i for i, value in enumerate(values)}
    # The old column goes before the new one comes: its type may not hold numbers.
    encoded = {
        name: split.remove_columns("label").add_column("label", [index[value] for value in split["label"]])
        for name, split in splits.items()
    }
    return DatasetDict(encoded).cast_column("label", ClassLabel(names=[str(value) for value in values]))


def limit_samples(splits: DatasetDict, args: DataArguments, seed: int) -> DatasetDict:
    """Keeps a random `max_train_samples` and `max_eval_samples` of the splits."""

    def limit(split: Dataset, count: int | None) -> Dataset:
        return split if count is None else split.shuffle(seed=seed).select(range(min(count, len(split))))

    return DatasetDict(
        train=limit(splits["train"], args.max_train_samples), test=limit(splits["test"], args.max_eval_samples)
    )


def label_kwargs(splits: DatasetDict) -> dict[str, Any]:
    """What a classifier's configuration has to know of the data's "label" column."""
    names = splits["train"].features["label"].names
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def with_mean_loss(model: PreTrainedModel) -> PreTrainedModel:
    """
    Tells `Trainer` that the model's loss is the mean over its batch.

    It takes a `forward` with `**kwargs` for one that divides by the number of items of the whole step. Many
    classifiers, BERT's among them, do not, and their loss would grow with the processes and the accumulation steps.
    """
    model.accepts_loss_kwargs = False
    return model


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of right answers."""
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def majority_rate(labels: Sequence[int]) -> float:
    """The accuracy of always answering with the most frequent class."""
    counts = np.bincount(np.asarray(labels))
    return float(counts.max() / counts.sum())


def run(trainer: Trainer, labels: Sequence[int], card: dict[str, Any]) -> None:
    """
    Trains, evaluates, and saves or pushes all of it, as the trainer's arguments say.

    Args:
        trainer: With the arguments, the model and the data.
        labels: Of the evaluation data, to say what a model without any skill reaches.
        card: Keyword arguments of `Trainer.create_model_card`.
    """
    args = trainer.args
    if args.do_train:
        # As a flag, "True" comes as text; it asks for the last checkpoint of the output directory.
        checkpoint = {"True": True, "False": False}.get(args.resume_from_checkpoint, args.resume_from_checkpoint)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if args.do_eval:
        metrics = trainer.evaluate() | {"eval_majority_class_rate": majority_rate(labels)}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if card["finetuned_from"] is None:
        # The card says "trained from scratch" of a model that is named after a folder; of a nameless one it says
        # "fine-tuned from" nothing.
        trainer.model.config.name_or_path = args.output_dir
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
