"""Tiny models and data that every test shares: a ViT, a BERT, and decoders with ragged labels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)


KINDS = ("vit", "bert", "llama")
VOCABULARY, LENGTH, LABELS = 61, 12, 3
QUANTISED = {
    "llama-qlora": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "llama-8bit": {"load_in_8bit": True},
}


def make_model(kind: str, dropout: float = 0.0, loaded_from: Any = None, adapter: bool = True, **kwargs: Any):
    """
    A model with seeded weights, or one that `from_pretrained` loads. The sizes divide by neither 2 nor 3, so that
    shards come out uneven. "llama" has tied embeddings, "llama-untied" has not, "llama-lora" and "llama-dora" have an
    adapter, "llama-qlora" has one on layers of 4 bit and "llama-8bit" on layers of 8. "mixtral" has five experts, and
    "vit-deep" so many layers that a batch is small beside them. "net" is a plain module.
    """
    if kind == "net":
        return Net()
    torch.manual_seed(0)
    model_class, config = _model_config(kind, dropout)
    model = model_class(config) if loaded_from is None else model_class.from_pretrained(loaded_from, **kwargs)
    if kind in QUANTISED:
        model = _quantised(model, **QUANTISED[kind])
    if kind in ("llama-lora", "llama-dora", *QUANTISED) and adapter:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        modules, is_dora = ["q_proj", "v_proj"], kind == "llama-dora"
        config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False, use_dora=is_dora)
        model = get_peft_model(model, config)
    return model


def _model_config(kind: str, dropout: float) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    small = {"num_hidden_layers": 2, "num_attention_heads": 3, "num_labels": LABELS}
    if kind in ("vit", "vit-deep"):
        small["num_hidden_layers"] = 30 if kind == "vit-deep" else 2
        sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 33, "intermediate_size": 35}
        return ViTForImageClassification, ViTConfig(**sizes, **small, **dropouts)
    if kind == "bert":
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 33, "intermediate_size": 35, "max_position_embeddings": 16}
        return BertForSequenceClassification, BertConfig(**sizes, **small, **dropouts)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 36, "intermediate_size": 35, "num_key_value_heads": 3}
    tied = {"attention_dropout": dropout, "tie_word_embeddings": kind == "llama"}
    if kind == "mixtral":
        sizes |= {"intermediate_size": 36, "num_local_experts": 5}  # torch multiplies experts of rows of 16 bytes
        return MixtralForCausalLM, MixtralConfig(**sizes, **small, **tied, num_experts_per_tok=2)
    return LlamaForCausalLM, LlamaConfig(**sizes, **small, **tied)


def _quantised(model: PreTrainedModel, **how: Any) -> PreTrainedModel:
    """The model as `from_pretrained` quantises it: all linear layers but the head."""
    quantisation = BitsAndBytesConfig(**how)
    state_dict = model.state_dict()
    return type(model).from_pretrained(
        None, config=model.config, state_dict=state_dict, quantization_config=quantisation
    )


class Net(nn.Module):
    """A plain module without a config: `layers`, made after seeding, between two linear ones. Data: kind "net"."""

    def __init__(self, *layers: Callable[[], nn.Module]):
        super().__init__()
        torch.manual_seed(0)
        layers = layers or (nn.Tanh,)
        self.layers = nn.Sequential(nn.Linear(5, 7), *(make() for make in layers), nn.Linear(7, LABELS))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class UnlabelledNet(Net):
    """Its loss is computed outside."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"logits": self.layers(x)}


def make_data(kind: str, size: int = 48, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Random samples; the Llama's have 3 to 11 labelled tokens each, the others are ignored (-100)."""
    generator = torch.Generator().manual_seed(seed)
    if kind in ("vit", "vit-deep"):
        images = torch.randn(size, 3, 8, 8, generator=generator)
        labels = torch.randint(LABELS, (size,), generator=generator)
        return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    if kind == "net":
        x, labels = torch.randn(size, 5, generator=generator), torch.randint(LABELS, (size,), generator=generator)
        return [{"x": row, "labels": label} for row, label in zip(x, labels, strict=True)]
    tokens = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
    if kind == "bert":
        labels = torch.randint(LABELS, (size,), generator=generator)
        mask = torch.ones(LENGTH, dtype=torch.long)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": label}
            for ids, label in zip(tokens, labels, strict=True)
        ]
    samples = []
    for index, ids in enumerate(tokens):
        labels = ids.clone()
        labels[: index * 7 % 9 + 1] = -100
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def adversarial(loss: Callable[[dict[str, torch.Tensor]], torch.Tensor], inputs: Any) -> dict[str, torch.Tensor]:
    """`inputs` with each image moved by 1 along its gradient, of a mean over samples."""
    images = inputs["pixel_values"].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss({**inputs, "pixel_values": images}), images)
    lengths = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return {**inputs, "pixel_values": (images + gradient / lengths).detach()}


def flat_weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def relative_distance(result: torch.Tensor, expected: torch.Tensor, start: torch.Tensor) -> float:
    """The distance between two end points, as a share of the distance travelled."""
    return ((result - expected).norm() / (expected - start).norm()).item()


def save_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """Saves a tokenizer that knows these words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
