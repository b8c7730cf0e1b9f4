"""
Fine-tune a text classifier with the gradient-norm penalty.

    python examples/text_classification.py
        Train a small BERT to find the package of Python's standard library that a docstring comes from. It takes about
        a minute on two CPU cores, without a network.
    python examples/text_classification.py --model_name_or_path bert-base-uncased --dataset_name stanfordnlp/sst2
        Train any text classifier on your own data: a hub name, a local folder, or a parquet, csv or json file.
    python examples/text_classification.py --config configs/recipes/text_finetune.yaml --learning_rate 5e-5
        Read arguments from a file. Flags override them.

The script also runs under `torchrun` and `accelerate launch`. `--gnp_alpha 0` is plain training.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import (
    DataArguments,
    ModelArguments,
    compute_accuracy,
    label_kwargs,
    limit_samples,
    load_own_data,
    parse_args,
    run,
    setup_logging,
)
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_gnp import GNPTrainer, GNPTrainingArguments


# CPython 3.10 to 3.13 have all of these packages, with 140 to 350 docstrings each.
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
MIN_CHARACTERS = 20

EMBEDDED_DEFAULTS = {
    "max_seq_length": 64,
    "num_train_epochs": 6,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.05,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
}


@dataclass
class TextDataArguments(DataArguments):
    """Name the texts to fine-tune on, and their length."""

    text_column_name: str | None = field(
        default=None, metadata={"help": "The column of the texts. Default: text or sentence."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "The number of tokens to which longer texts are cut."})


def docstrings(package: Path) -> Iterator[str]:
    """Yield the docstrings of a package's modules, classes and functions. Nothing is imported."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and len(text) >= MIN_CHARACTERS:
                yield " ".join(text.split())


def load_docstrings() -> DatasetDict:
    """
    Return about 1,900 docstrings of `PACKAGES`, labelled with their package. A quarter is for the test.

    The hash of a text decides its split, so all processes and all runs agree. Texts that occur in several packages are
    left out.
    """
    packages_of: dict[str, set[str]] = {}
    for name in PACKAGES:
        for text in docstrings(Path(sysconfig.get_path("stdlib")) / name):
            packages_of.setdefault(text, set()).add(name)
    splits = {"train": {"text": [], "label": []}, "test": {"text": [], "label": []}}
    for text, packages in packages_of.items():
        if len(packages) == 1:
            split = splits["test" if hashlib.sha256(text.encode()).digest()[0] < 64 else "train"]
            split["text"].append(text)
            split["label"].append(PACKAGES.index(*packages))
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(PACKAGES))})
    return DatasetDict({name: Dataset.from_dict(split, features) for name, split in splits.items()})


def load_texts(args: TextDataArguments, seed: int) -> DatasetDict:
    """Load the splits "train" and "test" with the columns "text" and "label" (`ClassLabel`)."""
    splits = load_docstrings() if args.dataset_name is None else load_own_data(args, seed, "text", "sentence")
    return limit_samples(splits, args, seed)


def train_tokenizer(texts: list[str], max_seq_length: int) -> PreTrainedTokenizerBase:
    """
    Train a lower-case byte-level BPE tokenizer.

    Every rank and every resumed run trains its own tokenizer, and all must be equal. WordPiece does not give this,
    because its trainer numbers the pieces differently in each process.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["[PAD]", "[CLS]", "[SEP]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(
        *((token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]"))
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_seq_length,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def load_model(
    args: ModelArguments, labels: dict[str, Any], texts: list[str], max_seq_length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the user's model and tokenizer, or make a small BERT and train a tokenizer on `texts`."""
    if args.model_name_or_path is None:
        tokenizer = train_tokenizer(texts, max_seq_length)
        vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **labels}
        if args.config_name is not None:
            config = AutoConfig.from_pretrained(args.config_name, **vocabulary)
        else:
            config = BertConfig(
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=max_seq_length,
                **vocabulary,
            )
        return AutoModelForSequenceClassification.from_config(config), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, revision=args.model_revision)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path,
        **labels,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        revision=args.model_revision,
    )
    return model, tokenizer


def build_trainer(
    model_args: ModelArguments, data_args: TextDataArguments, training_args: GNPTrainingArguments
) -> GNPTrainer:
    """Build a trainer from data, model and arguments. The same arguments give the same initial weights."""
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="loading the data"):
        splits = load_texts(data_args, training_args.seed)
    model, tokenizer = load_model(model_args, label_kwargs(splits), splits["train"]["text"], data_args.max_seq_length)

    # BERT's loss is a mean over the batch. `Trainer` assumes that a forward with **kwargs divides by the items of the
    # whole step. Then the loss would grow with the processes and the accumulation steps.
    model.accepts_loss_kwargs = False

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        return tokenizer(batch["text"], truncation=True, max_length=data_args.max_seq_length)

    with training_args.main_process_first(desc="tokenizing the data"):
        splits = splits.map(tokenize, batched=True, remove_columns="text")
    return GNPTrainer(
        model=model,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_accuracy,
        processing_class=tokenizer,
    )


def main() -> None:
    model_args, data_args, training_args = parse_args(TextDataArguments, EMBEDDED_DEFAULTS)
    setup_logging(training_args)
    run(
        build_trainer(model_args, data_args, training_args),
        finetuned_from=model_args.model_name_or_path,
        tasks="text-classification",
        dataset=data_args.dataset_name or "docstrings of Python's standard library",
    )


if __name__ == "__main__":
    main()
