"""The ready-made classes of `hf_gnp.trl`, `hf_gnp.sentence_transformers` and Seq2Seq are the mixins', and pickle."""

import dataclasses
import importlib
import inspect
import pickle
from typing import Any

import pytest
import torch
from builders import BASE, CLIENTS, make_client
from fork import fork_script
from runs import assert_identical, snapshot
from test_clients import logs_without

from hf_gnp import GNPArguments, GNPMixin


# client: where its ready-made classes are
READY_MADE = {
    "sft-lora": "hf_gnp.trl",
    "dpo": "hf_gnp.trl",
    "cross-encoder": "hf_gnp.sentence_transformers",
    "seq2seq": "hf_gnp",
}
PENALTY = {"gnp_r": 0.02, "gnp_alpha": 1.0}
# In a process of its own: a class that only the process that made it knows cannot be found again.
LOAD = """
import sys, torch
args = torch.load(sys.argv[1], weights_only=False)
print(type(args).__module__, type(args).__name__, args.gnp_r)
"""


@pytest.fixture(params=READY_MADE)
def client(request) -> str:
    pytest.importorskip(CLIENTS[request.param].library, reason="a client of the dev extra")
    return request.param


def ready_made(client: str, built: Any) -> tuple[type, type]:
    module = importlib.import_module(READY_MADE[client])
    return tuple(getattr(module, f"GNP{base.__name__}") for base in (built.trainer_class, built.args_class))


def test_classes_are_the_mixins(client, tmp_path):
    built = CLIENTS[client].build(tmp_path)
    trainer_class, args_class = ready_made(client, built)
    assert trainer_class.__mro__[1:3] == (GNPMixin, built.trainer_class)
    assert args_class.__mro__[1:3] == (GNPArguments, built.args_class)
    assert inspect.signature(trainer_class) == inspect.signature(built.trainer_class)
    fields = {field.name for field in dataclasses.fields(args_class)}
    assert fields == {field.name for cls in (GNPArguments, built.args_class) for field in dataclasses.fields(cls)}
    for cls in (trainer_class, args_class):
        assert cls.__doc__ and cls.__qualname__ == cls.__name__
        assert pickle.loads(pickle.dumps(cls)) is cls
    assert ready_made(client, built) == (trainer_class, args_class)


def test_training_and_saved_arguments(client, tmp_path):
    built = CLIENTS[client].build(tmp_path)
    trainer_class, args_class = ready_made(client, built)
    args = args_class(output_dir=str(tmp_path / "out"), **{**BASE, **built.args, **PENALTY})
    trainer = trainer_class(args=args, **built.options)
    assert isinstance(trainer, built.trainer_class)
    trainer.train()
    expected = make_client(client, tmp_path, **PENALTY)
    expected.train()
    assert "gnp_sharpness" in trainer.state.log_history[0]
    assert_identical(logs_without(trainer.state.log_history), logs_without(expected.state.log_history))
    assert_identical(snapshot(trainer.model), snapshot(expected.model))

    path = tmp_path / "training_args.bin"
    torch.save(trainer.args, path)
    (tmp_path / "load.py").write_text(LOAD)
    printed = fork_script(tmp_path / "load.py", path, timeout=600)
    assert printed.split()[-3:] == [args_class.__module__, args_class.__name__, "0.02"]


@pytest.mark.parametrize("name", ["SFTTrainer", "GNPNoSuchTrainer", "GNPModelConfig", "GNPget_peft_config"])
def test_other_names_are_no_attributes(name):
    pytest.importorskip("trl", reason="a client of the dev extra")
    module = importlib.import_module("hf_gnp.trl")
    assert not hasattr(module, name)
    with pytest.raises(ImportError, match=name):
        exec(f"from hf_gnp.trl import {name}")
