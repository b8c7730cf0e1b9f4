"""
Checkpoints whose weights have other names than the model's: a workaround for transformers 5.17 to 5.23.

Stock `Trainer` leaves such weights of the model as they are when it resumes. This file goes when a release of
transformers loads them.
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


# Before the names of a model that was compiled before `Trainer` got it.
COMPILED = "_orig_mod."


def load_renamed(model: nn.Module, folder: str) -> Any | None:
    """
    Load the checkpoint in `folder` into `model` if it is in the format of the original checkpoints.

    `save_pretrained` writes a model in that format: the weights of a ViT under other names (`vit.encoder.layer…`
    instead of `vit.layers…`), the experts of a Mixtral apart instead of merged. `from_pretrained` converts them back.
    `Trainer` of transformers 5.17 to 5.23, the newest at the time of writing, does not, and leaves such weights of the
    model as they are. This is `from_pretrained`'s conversion, into the model at hand: heads and layers that were
    replaced stay in place, and so do the parameters that an optimizer may hold already.

    Args:
        model: The model itself, or what `torch.compile` made of it; any other wrapper is left to stock.
        folder: What `Trainer` resumes from.

    Returns:
        `None`, with the model untouched, where no weight needs conversion: stock `Trainer` loads that right. Else the
        missing and unexpected keys, as from `load_state_dict`.
    """
    model = getattr(model, COMPILED.removesuffix("."), model)
    if not isinstance(model, PreTrainedModel) or getattr(model, "hf_quantizer", None) is not None:
        return None
    files = _weight_files(folder)
    names = [name for file in files for name in load_state_dict(file, map_location="meta")]
    conversion = _Conversion(model, [name.removeprefix(COMPILED) for name in names])
    if conversion.is_identity():
        return None
    tensors = {name: tensor for file in files for name, tensor in load_state_dict(file).items()}
    tensors = {name.removeprefix(COMPILED): tensor for name, tensor in tensors.items()}
    return model.load_state_dict(conversion.convert(tensors), strict=False)


def _weight_files(folder: str) -> list[str]:
    """The files with weights that `Trainer` would load, empty where it loads an adapter or an engine's own format."""
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if os.path.isfile(os.path.join(folder, name)):
            return [os.path.join(folder, name)]
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if os.path.isfile(os.path.join(folder, name)):
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                return [os.path.join(folder, shard) for shard in sorted(set(json.load(file)["weight_map"].values()))]
    return []


class _Conversion:
    """Which weight of `model` each saved name belongs to, by the rules of `from_pretrained`."""

    def __init__(self, model: PreTrainedModel, names: list[str]):
        self.model, self.own = model, model.state_dict()
        transforms = _weight_transforms(model)
        self.renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self.converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        # In this order: the tensors of a list (experts) are merged as they come, and some renamings look back.
        self.targets = {name: self._target(name) for name in sorted(names, key=dot_natural_key)}

    def _target(self, name: str) -> tuple[str, str | None]:
        """The name in the model and the pattern of the converter that takes the weight; the saved name, if none."""
        for renamings, converters in ((self.renamings, self.converters), ([], [])):
            target, pattern = rename_source_key(name, renamings, converters, self.model.base_model_prefix, self.own)
            if target in self.own:
                return target, pattern
        return name, None

    def is_identity(self) -> bool:
        return all((name, None) == target for name, target in self.targets.items())

    def convert(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Saved tensors under the model's names, merged or split as its parameters are, in their saved dtypes."""
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
    """The transforms that `from_pretrained` applies to a checkpoint of `model`, in its order."""
    transforms = get_model_conversion_mapping(model)
    known = [(transform.source_patterns, transform.target_patterns) for transform in transforms]
    # `from_pretrained` notes here what it used: the user's `key_mapping` too, which `save_pretrained` reverts.
    used = getattr(model, "_weight_conversions", None) or []
    own = [transform for transform in used if (transform.source_patterns, transform.target_patterns) not in known]
    return [*copy.deepcopy(own), *transforms]
