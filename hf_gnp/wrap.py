"""Makes the trainers and arguments of other libraries with the penalty."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from transformers import Trainer, TrainingArguments

from .arguments import GNPArguments
from .trainer import GNPMixin


PREFIX = "GNP"


def classes_of(library: ModuleType, module: str) -> Callable[[str], type]:
    """
    Return a `__getattr__` for a module: it has `GNPXTrainer` for each `XTrainer` of `library`, and its arguments.

    It makes a class at the first use of the name, as libraries import their trainers late. Later uses, such as
    unpickling, find the same class, in the module called `module`.
    """
    made: dict[str, type] = {}

    def class_named(name: str) -> type:
        if name in made:
            return made[name]
        base = getattr(library, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
        doc = f"[`{library.__name__}.{name.removeprefix(PREFIX)}`] with "
        if isinstance(base, type) and issubclass(base, Trainer):
            cls = type(name, (GNPMixin, base), {"__module__": module, "__doc__": f"{doc}a penalised gradient norm."})
        elif isinstance(base, type) and issubclass(base, TrainingArguments):
            body = {"__module__": module, "__doc__": f"{doc}the arguments of the gradient-norm penalty."}
            cls = dataclass(type(name, (GNPArguments, base), body))
        else:
            raise AttributeError(
                f"{module} has no {name!r}: it has {PREFIX}X for each trainer X of {library.__name__}."
            )
        return made.setdefault(name, cls)

    return class_named
