"""Inputs that a loss or a model changes: both passes see them as the data loader and `_prepare_inputs` gave them."""

import random
from collections import UserDict
from collections.abc import MutableMapping
from dataclasses import dataclass

import pytest
import torch
import transformers
from runs import (
    BOTH,
    assert_identical,
    assert_unmoved_is_plain,
    make_trainer,
    make_unmoved,
    run,
    with_loss,
)
from tiny import Net, collate, make_data
from torch import nn
from transformers import PreTrainedModel, default_data_collator

from hf_gnp import GNPTrainer


def masking(clones: bool):
    """A loss that masks and mixes its inputs, as masked language modelling and mixup do, or copies of them."""

    def loss(trainer, model, inputs):
        x = inputs["x"].clone() if clones else inputs["x"]
        share = random.random()
        x.masked_fill_(torch.rand_like(x) < 0.3, 0.0)
        x.mul_(share).add_((1 - share) * x.flip(0))
        return model(**{**inputs, "x": x})["loss"]

    return loss


class InPlaceNet(Net):
    def forward(self, x, labels):
        return super().forward(x.mul_(2), labels)


class CloningNet(Net):
    def forward(self, x, labels):
        return super().forward(x * 2, labels)


@pytest.mark.parametrize("alpha", [0.8, 1.0])
@pytest.mark.parametrize("where", ["loss", "model"])
def test_inputs_written_in_place(tmp_path, where, alpha):
    """They train as copies that are written."""
    if where == "loss":
        runs = [{"cls": with_loss(GNPTrainer, masking(clones))} for clones in (False, True)]
    else:
        runs = [{"model": InPlaceNet()}, {"model": CloningNet()}]
    settings = {"gnp_alpha": alpha, "gradient_accumulation_steps": 2}
    assert_identical(*(run(make_trainer(tmp_path, "net", **each, **settings)) for each in runs))


def test_samples_are_left_alone(tmp_path):
    """The collator hands out a sample itself, as one of whole documents may. Stock writes into it once."""

    def train(cls):
        data = make_data("net", 6)
        batches = [{key: value[None] for key, value in sample.items()} for sample in data]  # views of the samples
        settings = {"per_device_train_batch_size": 1, "model": InPlaceNet(), "data": batches}
        make_unmoved(tmp_path, cls, data_collator=lambda samples: samples[0], **settings).train()
        return data

    assert_identical(*map(train, BOTH))


class PoppingTrainer(GNPTrainer):
    """Takes a key out of the very dict that the data loader gave, puts another in, and changes a nested one."""

    def _prepare_inputs(self, inputs):
        x, nested = inputs.pop("wrapped"), inputs.pop("nested")
        return super()._prepare_inputs({"x": x * nested.pop("factor"), "labels": inputs["labels"]})


def test_inputs_lose_and_gain_keys(tmp_path):
    def collate_wrapped(samples):
        batch = collate(samples)
        return {"wrapped": batch["x"], "labels": batch["labels"], "nested": {"factor": torch.tensor(2.0)}}

    settings = {"remove_unused_columns": False, "data_collator": collate_wrapped}
    result = run(make_trainer(tmp_path, "net", PoppingTrainer, **settings))
    doubled = [{"x": 2 * sample["x"], "labels": sample["labels"]} for sample in make_data("net")]
    assert_identical(result, run(make_trainer(tmp_path, "net", data=doubled)))


class Batch(MutableMapping):
    """A mapping of the user's own, whose shallow copy shares what is in it."""

    def __init__(self, items=()):
        self.items_ = dict(items)

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, value):
        self.items_[key] = value

    def __delitem__(self, key):
        del self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


@dataclass
class Sample:
    x: torch.Tensor


class EditsInputs(Net):
    """Writes into whatever it is given."""

    def __init__(self):
        super().__init__()

    def forward(self, x, labels):
        if isinstance(x, Sample):
            x.x = x.x * 1.5
            x = x.x
        if isinstance(x, list | tuple):
            (x,) = x
        x *= 1.5
        return super().forward(torch.as_tensor(x).clone(), labels)


WRAPS = {
    "tensor": lambda x: x,
    "list": lambda x: [x],
    "tuple": lambda x: (x,),
    "dataclass": Sample,
    "array": lambda x: x.numpy(),  # contract? Arrays in inputs.
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("kind", [dict, Batch, UserDict])  # BatchEncoding is a UserDict
def test_inputs_are_copied(tmp_path, kind, wrap):
    def editing(cls):
        class Editing(cls):
            def _prepare_inputs(self, inputs):
                return kind({**inputs, "x": WRAPS[wrap](inputs["x"])})

            def compute_loss(self, model, inputs, *args, **kwargs):
                return model(inputs.pop("x"), inputs.pop("labels"))["loss"]

        return Editing

    assert_unmoved_is_plain(lambda cls: make_unmoved(tmp_path, editing(cls), model=EditsInputs()))


class Prompted(Net):
    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(5))

    def forward(self, x, labels, prompt):
        return super().forward(x + prompt, labels)


def test_parameter_in_the_inputs(tmp_path):
    """A copy of it would have no gradient."""

    def prompting(cls):
        class Prompting(cls):
            def _prepare_inputs(self, inputs):
                return {**super()._prepare_inputs(inputs), "prompt": self.model.prompt}

        return Prompting

    assert_unmoved_is_plain(lambda cls: make_unmoved(tmp_path, prompting(cls), model=Prompted()))


class Reader:
    """An object of the user's that owns a file, and closes it when it goes."""

    def __init__(self, path):
        self.file = path.open()

    def factor(self) -> float:
        self.file.seek(0)
        return float(self.file.read())

    def __del__(self):
        self.file.close()


class Link:
    """One of a chain, too long to be copied by recursion."""

    def __init__(self, length: int):
        self.factor, self.next = lambda: 1.5, Link(length - 1) if length > 1 else None


class Example:
    """It refers to something large, which copies would double."""

    def __init__(self, shared):
        self.index = shared

    def factor(self) -> float:
        return len(self.index["rows"]) / 1e5

    def __deepcopy__(self, memo):
        raise AssertionError("copied")

    __copy__ = __reduce__ = __deepcopy__


SHARED = {"rows": [{"number": number} for number in range(50_000)]}
OBJECTS = {"file": Reader, "chain": lambda path: Link(400), "large": lambda path: Example(SHARED)}


@pytest.mark.parametrize("place", ["", "list", "dict"])
@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_in_the_inputs_are_passed_on(tmp_path, kind, place):
    """Both passes get the very object."""
    (tmp_path / "factor.txt").write_text("0.5")
    wrap = {"": lambda item: item, "list": lambda item: [item], "dict": lambda item: {"it": item}}[place]
    unwrap = {"": lambda value: value, "list": lambda value: value[0], "dict": lambda value: value["it"]}[place]
    made, seen = [], []

    def uses(trainer, model, inputs):
        item = unwrap(inputs.pop("item"))
        seen.append(item)
        return model(**inputs)["loss"] * item.factor()

    def collate_with(samples):
        made.append(OBJECTS[kind](tmp_path / "factor.txt"))
        return {**collate(samples), "item": wrap(made[-1])}

    def make(cls):
        made.clear()
        seen.clear()
        return make_unmoved(tmp_path, with_loss(cls, uses), data_collator=collate_with)

    assert_unmoved_is_plain(make)
    places = [next(number for number, item in enumerate(made) if item is each) for each in seen]
    assert places == [0, 1, 0, 0, 1, *[2, 3] * 2, *[4, 5] * 2]  # the third is the probe's


# --- Stock models that write into their inputs ---

SMALL = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}


def answers() -> list[dict[str, torch.Tensor]]:
    tokens, ones = torch.randint(3, 40, (16, 12), generator=torch.Generator().manual_seed(1)), torch.ones(12)
    # Some ends lie behind the text: the models clamp them in place.
    spans = [{"start_positions": torch.tensor(i % 5), "end_positions": torch.tensor(i % 5 + 9)} for i in range(16)]
    return [{"input_ids": t, "attention_mask": ones.long(), **s} for t, s in zip(tokens, spans, strict=True)]


def translations() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randint(3, 40, (16, 2, 8), generator=generator)
    return [{"input_ids": source, "labels": target} for source, target in pairs]


def recordings() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sounds = torch.randn(16, 8, 40, generator=generator)
    labels = torch.randint(3, 40, (16, 6), generator=generator)
    return [{"input_features": s, "labels": label} for s, label in zip(sounds, labels, strict=True)]


def whisper() -> PreTrainedModel:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 50, "num_mel_bins": 8}
    ids = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    masks = {"apply_spec_augment": True, "mask_time_prob": 0.5, "mask_time_length": 2, "mask_feature_prob": 0.3}
    config = transformers.WhisperConfig(
        **layers, **sizes, **ids, **masks, mask_feature_length=2, max_source_positions=20
    )
    return transformers.WhisperForConditionalGeneration(config)


def fsmt() -> PreTrainedModel:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 3, "decoder_attention_heads": 3}
    sizes = {"d_model": 24, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "src_vocab_size": 50, "tgt_vocab_size": 50}
    return transformers.FSMTForConditionalGeneration(transformers.FSMTConfig(langs=["a", "b"], **layers, **sizes))


def canine() -> PreTrainedModel:
    strides = {"num_hash_buckets": 64, "downsampling_rate": 2, "local_transformer_stride": 4}
    return transformers.CanineForQuestionAnswering(transformers.CanineConfig(**strides, **SMALL))


def luke() -> PreTrainedModel:
    entities = {"entity_vocab_size": 10, "entity_emb_size": 8}
    return transformers.LukeForQuestionAnswering(transformers.LukeConfig(vocab_size=50, **entities, **SMALL))


def markup() -> PreTrainedModel:
    config = transformers.MarkupLMConfig(vocab_size=50, xpath_unit_hidden_size=8, max_depth=4, **SMALL)
    return transformers.MarkupLMForQuestionAnswering(config)


EDITING = {
    "canine": (canine, answers),
    "luke": (luke, answers),
    "markuplm": (markup, answers),
    "fsmt": (fsmt, translations),
    "whisper": (whisper, recordings),
}


@pytest.mark.parametrize("name", EDITING)
def test_stock_model_that_edits_its_inputs(tmp_path, name):
    make_stock, data = EDITING[name]

    def make(cls):
        options = {"model": make_stock(), "data": data(), "data_collator": default_data_collator}
        return make_unmoved(tmp_path, cls, learning_rate=1e-3, **options)

    assert_unmoved_is_plain(make)
