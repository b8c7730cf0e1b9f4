"""
Loads checkpoints whose weights have other names than the model's: a workaround for transformers 5.17 to 5.23.

Stock `Trainer` does not load such weights when it resumes. Remove this file when a release of transformers does.
"""

import copy
import json
import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME


# The prefix of all names where the user compiled the model before `Trainer` got it.
COMPILED = "_orig_mod."


def load_renamed(model: nn.Module, folder: str) -> Any | None:
    """
    Load the checkpoint in `folder` into `model` if it is in the format of the original checkpoints.

    `save_pretrained` writes that format: a ViT's weights have other names (`vit.encoder.layer…` instead of
    `vit.layers…`), and a Mixtral's experts are apart instead of merged. `from_pretrained` converts them back, and
    `Trainer` does not. This is the same conversion, into the parameters that the model and its optimizer have.

    Returns:
        `None`, with the model untouched, where no weight needs conversion or the model is in a wrapper other than
        `torch.compile`'s: stock `Trainer` is right. Otherwise the missing and unexpected keys.
    """
    model = getattr(model, COMPILED.removesuffix("."), model)
    if not isinstance(model, PreTrainedModel) or getattr(model, "hf_quantizer", None) is not None:
        return None
    files = _weight_files(folder)
    names = [name for file in files for name in load_state_dict(file, map_location="meta")]
    conversion = _Conversion(model, [name.removeprefix(COMPILED) for name in names])
    if all(target == (name, None) for name, target in conversion.targets.items()):
        return None
    tensors = {name: tensor for file in files for name, tensor in load_state_dict(file).items()}
    tensors = {name.removeprefix(COMPILED): tensor for name, tensor in tensors.items()}
    return model.load_state_dict(conversion.convert(tensors), strict=False)


def _weight_files(folder: str) -> list[str]:
    """Return the files of a whole model's weights, none where `Trainer` loads an adapter or an engine's format."""
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        if not name.endswith(".json"):
            return [path]
        with open(path, encoding="utf-8") as file:
            return [os.path.join(folder, shard) for shard in sorted(set(json.load(file)["weight_map"].values()))]
    return []


class _Conversion:
    """Finds the weight of `model` for each saved name, by the rules of `from_pretrained`."""

    def __init__(self, model: PreTrainedModel, names: list[str]):
        self.model, self.own = model, model.state_dict()
        transforms = _weight_transforms(model)
        self.renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self.converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        # In this order: the tensors of a list (experts) are merged as they come, and some renamings look back.
        self.targets = {name: self._target(name) for name in sorted(names, key=dot_natural_key)}

    def _target(self, name: str) -> tuple[str, str | None]:
        """Return the name in the model and the pattern of its converter, or the saved name where none is found."""
        for renamings, converters in ((self.renamings, self.converters), ([], [])):
            target, pattern = rename_source_key(name, renamings, converters, self.model.base_model_prefix, self.own)
            if target in self.own:
                return target, pattern
        return name, None

    def convert(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return saved tensors under the model's names, merged or split as its parameters are."""
        by_pattern = {pattern: converter for converter in self.converters for pattern in converter.source_patterns}
        converted: dict[str, torch.Tensor] = {}
        collected: dict[str, Any] = {}
        for name, (target, pattern) in self.targets.items():
            if pattern is None:
                converted[target] = tensors[name]
                continue
            if target not in collected:
                collected[target] = copy.deepcopy(by_pattern[pattern])
            collected[target].add_tensor(target, name, pattern, tensors[name])
        for target, converter in collected.items():
            for name, tensor in converter.convert(target, model=self.model, config=self.model.config).items():
                converted[name] = tensor[0] if isinstance(tensor, list) else tensor
        return converted


def _weight_transforms(model: PreTrainedModel) -> list[WeightTransform]:
    """Return the transforms that `from_pretrained` applies to a checkpoint of `model`, in its order."""
    transforms = get_model_conversion_mapping(model)
    known = [(transform.source_patterns, transform.target_patterns) for transform in transforms]
    # `from_pretrained` notes here the transforms that it used. Those of a user's `key_mapping` are among them.
    used = getattr(model, "_weight_conversions", None) or []
    own = [transform for transform in used if (transform.source_patterns, transform.target_patterns) not in known]
    return [*copy.deepcopy(own), *transforms]
