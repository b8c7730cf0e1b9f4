"""The models that cost.py times: configuration, batch and, under "-small" and "-tiny", versions for a CPU."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from contenders import Batch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput


class Case(NamedTuple):
    """
    A model and its batch.

    Args:
        kind: "vit", "bert", "llama", or "modules": linear and tanh layers with next to no work, so that what is timed
            is Python.
        batch_size: Examples a micro-batch.
        length: Pixels along a side, tokens, or features.
        config: What differs from the defaults of the kind, which are those of the base models.
    """

    kind: str
    batch_size: int
    length: int
    config: dict[str, Any]


def _sizes(hidden: int, layers: int, heads: int, factor: int = 4, **kwargs: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": factor * hidden,
        **kwargs,
    }


CASES = {
    "vit-s16": Case("vit", 128, 224, _sizes(384, 12, 6)),
    "vit-b16": Case("vit", 64, 224, _sizes(768, 12, 12)),
    "bert-base": Case("bert", 64, 128, _sizes(768, 12, 12)),
    "llama-1b": Case("llama", 4, 1024, _sizes(2048, 16, 32, num_key_value_heads=8, vocab_size=32000)),
    "vit-s16-small": Case("vit", 8, 96, _sizes(192, 6, 3)),
    "vit-b16-small": Case("vit", 8, 96, _sizes(384, 6, 6)),
    "bert-base-small": Case("bert", 8, 128, _sizes(256, 4, 4, vocab_size=8192)),
    "llama-1b-small": Case("llama", 2, 256, _sizes(256, 4, 4, vocab_size=4096)),
    "vit-tiny": Case("vit", 2, 32, _sizes(24, 2, 2)),
    "bert-tiny": Case("bert", 2, 16, _sizes(24, 2, 2, vocab_size=64)),
    "many-modules": Case("modules", 4, 8, {"modules": 200}),
    "many-modules-2000": Case("modules", 4, 8, {"modules": 2000}),
}

# Names by their millions of parameters.
SWEEP = {
    "1M": Case("bert", 8, 128, _sizes(128, 5, 2, vocab_size=256)),
    "3M": Case("bert", 8, 128, _sizes(224, 5, 4, vocab_size=256)),
    "10M": Case("bert", 8, 128, _sizes(384, 6, 6, vocab_size=256)),
    "30M": Case("bert", 8, 128, _sizes(576, 8, 8, vocab_size=256)),
    "100M": Case("bert", 8, 128, _sizes(1024, 8, 16, vocab_size=256)),
    "300M": Case("bert", 8, 128, _sizes(1472, 12, 23, vocab_size=256)),
    "1000M": Case("bert", 8, 128, _sizes(2048, 20, 32, vocab_size=256)),
}


class ManyModules(nn.Module):
    """A chain of small modules."""

    def __init__(self, features: int, modules: int):
        super().__init__()
        self.layers = nn.Sequential(
            *(module for _ in range(modules // 2) for module in (nn.Linear(features, features), nn.Tanh()))
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SequenceClassifierOutput:
        logits = self.layers(x)
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def make_case(
    case: Case, device: torch.device, batch_size: int | None = None
) -> tuple[Callable[[], nn.Module], Batch]:
    """A function that makes the model, always with the same weights, and a batch on `device`."""
    size = (batch_size or case.batch_size, case.length)
    generator = torch.Generator().manual_seed(0)
    if case.kind == "modules":
        batch = {
            "x": torch.randn(size, generator=generator),
            "labels": torch.randint(case.length, size[:1], generator=generator),
        }

        def make_chain() -> nn.Module:
            torch.manual_seed(0)
            return ManyModules(case.length, **case.config)

        return make_chain, {name: value.to(device) for name, value in batch.items()}
    if case.kind == "vit":
        model_class = ViTForImageClassification
        config = ViTConfig(image_size=case.length, patch_size=16, num_labels=1000, **case.config)
        batch = {
            "pixel_values": torch.randn(size[0], 3, case.length, case.length, generator=generator),
            "labels": torch.randint(1000, size[:1], generator=generator),
        }
    elif case.kind == "bert":
        model_class = BertForSequenceClassification
        config = BertConfig(max_position_embeddings=max(512, case.length), num_labels=2, **case.config)
        batch = {
            "input_ids": torch.randint(config.vocab_size, size, generator=generator),
            "attention_mask": torch.ones(size, dtype=torch.long),
            "labels": torch.randint(2, size[:1], generator=generator),
        }
    else:
        model_class = LlamaForCausalLM
        config = LlamaConfig(max_position_embeddings=case.length, use_cache=False, **case.config)
        tokens = torch.randint(config.vocab_size, size, generator=generator)
        batch = {"input_ids": tokens, "labels": tokens}

    def make_model() -> nn.Module:
        torch.manual_seed(0)
        return model_class(config)

    return make_model, {name: value.to(device) for name, value in batch.items()}


def items_per_step(case: Case, batch: Batch, accumulation: int) -> tuple[str, int]:
    """What a step works through: images of a vision model, tokens of a language model."""
    units = {"vit": ("images", 1), "modules": ("rows", 1)}
    unit, per_example = units.get(case.kind, ("tokens", case.length))
    return unit, len(batch["labels"]) * per_example * accumulation
