"""What a checkpoint needs beyond stock `Trainer`: weights that load under renamed keys, and the run's gnp values."""

import json
import logging
import os
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


logger = logging.getLogger(__name__)

TAG = "gradient-norm-penalty"


def has_renamed_keys(model: nn.Module, folder: str) -> bool:
    """
    Whether the checkpoint in `folder` names weights otherwise than `model` does.

    `save_pretrained` writes a ViT's weights under the names of the original checkpoints (`vit.encoder.layer…`);
    `Trainer` of transformers 5.17 to 5.23 loads them with `strict=False` into a model that has other names
    (`vit.layers…`), which leaves the model as it was.
    """
    return isinstance(model, PreTrainedModel) and not _saved_keys(folder) <= model.state_dict().keys()


def load_renamed(model: PreTrainedModel, folder: str) -> Any:
    """
    Load the weights in `folder` into `model`, through the renaming that `from_pretrained` does.

    Returns:
        The missing and unexpected keys, as `load_state_dict` does.
    """
    # Every 16-bit number is a float32 number, so copying back into the model's own dtypes is exact.
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
    with torch.random.fork_rng():
        loaded, info = type(model).from_pretrained(
            folder, config=model.config, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    state_dict = {key: value for key, value in loaded.state_dict().items() if key not in info["missing_keys"]}
    return model.load_state_dict(state_dict, strict=False)


def _saved_keys(folder: str) -> set[str]:
    index, single = (os.path.join(folder, name) for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
    if os.path.isfile(single):
        with safe_open(single, framework="pt") as file:
            return set(file.keys())
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as file:
            return set(json.load(file)["weight_map"])
    return set()


class GNPStateCallback(TrainerCallback, ExportableState):
    """Writes the gnp values into each checkpoint's trainer_state.json, and warns when a run resumes with others."""

    def __init__(self, **values: Any):
        self.values = values

    def state(self) -> dict:
        return {"args": self.values, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        self.values = args.gnp_values()
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("args")
        if saved and saved != self.values:
            changed = {name for name in saved | self.values if saved.get(name) != self.values.get(name)}
            logger.warning(
                "The checkpoint was trained with other gnp arguments: "
                + ", ".join(f"{n}={saved.get(n)} (now {self.values.get(n)})" for n in sorted(changed))
            )
        state.stateful_callbacks[type(self).__name__] = self.state()


def add_to_model_card(path: str, values: dict[str, Any]) -> None:
    """Add the gnp values to the hyperparameters of the model card at `path`, and the tag."""
    card = ModelCard.load(path)
    lines = "".join(f"- {name}: {value}\n" for name, value in values.items())
    heading = "The following hyperparameters were used during training:\n"
    if heading in card.text:
        card.text = card.text.replace(heading, heading + lines, 1)
    else:
        card.text += f"\n\n### Gradient-norm penalty\n\n{lines}"
    card.data.tags = [*(tag for tag in card.data.tags or [] if tag != TAG), TAG]
    card.save(path)
