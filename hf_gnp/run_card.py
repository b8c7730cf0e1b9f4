"""The gnp values of a run, in its checkpoints and in its model card."""

from typing import Any

from huggingface_hub import ModelCard
from transformers import TrainerState

from .arguments import UNNAMED


TAG = "gradient-norm-penalty"
PAPER = "https://arxiv.org/abs/2202.03599"
# The place of the gnp values in trainer_state.json, among the states of callbacks.
STATE_KEY = "GNPStateCallback"


def remember_values(state: TrainerState, values: dict[str, Any]) -> str | None:
    """Put the gnp values into `state`, which checkpoints save. Return a warning if it came with other values."""
    states: Any = state.stateful_callbacks  # a dict, once a run has begun
    saved = states.get(STATE_KEY, {}).get("args")
    states[STATE_KEY] = {"args": values, "attributes": {}}
    if not saved or saved == values:
        return None
    before, now = (UNNAMED | named for named in (saved, values))
    changed = sorted(name for name in before | now if before.get(name) != now.get(name))
    return "The checkpoint was trained with other gnp arguments: " + ", ".join(
        f"{name}={before.get(name)} (now {now.get(name)})" for name in changed
    )


def add_to_model_card(path: str, values: dict[str, Any]) -> None:
    """Add the method, the gnp values and the tag to the model card at `path`. α = 0, plain training, adds nothing."""
    if values["gnp_alpha"] == 0:
        return
    card = ModelCard.load(path)
    moved = f"at the weights moved by r = {values['gnp_r']:g}"
    if values.get("gnp_direction") == "momentum":
        step = f"takes the gradient {moved} against the optimizer's momentum"
    else:
        step = f"mixes the gradient at the weights with α = {values['gnp_alpha']:g} of that {moved} along it"
    sentence = f"The gradient norm of the loss was penalised ([Zhao et al., 2022]({PAPER})): a penalised step {step}."
    lines = "".join(f"- {name}: {value}\n" for name, value in values.items())
    heading = "The following hyperparameters were used during training:\n"
    if heading in card.text:
        card.text = card.text.replace(heading, f"{sentence}\n\n{heading}{lines}", 1)
    else:
        card.text += f"\n\n### Gradient-norm penalty\n\n{sentence}\n\n{lines}"
    card.data.tags = [*(tag for tag in card.data.tags or [] if tag != TAG), TAG]
    card.save(path)
