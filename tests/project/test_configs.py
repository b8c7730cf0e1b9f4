"""Every file of configs/ is what DeepSpeed, accelerate and `Trainer` take, and runs the penalty."""

import json
import os
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from deepspeed.runtime.config import DeepSpeedConfig
from runs import make_args
from tiny import make_model
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_gnp import GNPTrainer


ROOT = Path(__file__).parents[2]
DEEPSPEED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
ACCELERATE = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


@pytest.fixture(autouse=True)
def forget_the_engine(monkeypatch):
    """Accelerate and transformers keep the engine in globals and in the environment."""
    monkeypatch.chdir(ROOT)
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()


def values(config: object) -> list[object]:
    if isinstance(config, dict):
        return [value for item in config.values() for value in values(item)]
    return [config]


def test_all_are_here():
    assert names(DEEPSPEED) == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    single_node = ["ddp", "fsdp2", "single", "zero2", "zero3"]
    assert names(ACCELERATE) == sorted([*single_node, "multi_node_ddp", "multi_node_fsdp2", "multi_node_zero3"])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("path", DEEPSPEED, ids=names(DEEPSPEED))
def test_trainer_fills_a_deepspeed_config(tmp_path, path, bf16):
    settings = {"deepspeed": str(path), "bf16": bf16, "gradient_accumulation_steps": 3, "max_grad_norm": 0.7}
    args = make_args(tmp_path, **settings)
    trainer = GNPTrainer(model=make_model("vit"), args=args)  # refuses what the penalty does not run with
    assert trainer.is_deepspeed_enabled
    args.hf_deepspeed_config.trainer_config_finalize(args, trainer.model, num_training_steps=10)
    filled = args.hf_deepspeed_config.config
    assert "auto" not in values(filled)

    config = DeepSpeedConfig(filled)  # refuses unknown keys in the section of ZeRO
    assert config.zero_config.stage == int(path.stem.removesuffix("_offload")[-1])
    assert config.bfloat16_config.enabled == bf16
    assert not config.float16_config.enabled
    assert config.gradient_clipping == 0.7
    assert config.gradient_accumulation_steps == 3
    offload = config.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == path.stem.endswith("_offload")
    if config.zero_config.stage == 3:
        assert config.zero_config.gather_16bit_weights_on_model_save


@pytest.mark.parametrize("path", DEEPSPEED, ids=names(DEEPSPEED))
def test_configs_leave_the_optimizer_to_trainer(path):
    config = json.loads(path.read_text())
    assert "optimizer" not in config
    assert "scheduler" not in config


@pytest.mark.parametrize("path", ACCELERATE, ids=names(ACCELERATE))
def test_accelerate_loads(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    kind = path.stem.removeprefix("multi_node_")
    is_multi_node = kind != path.stem
    processes = (2, 16) if is_multi_node else (1, 1 if kind == "single" else 8)
    assert (config.num_machines, config.num_processes) == processes
    expected = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type.value == expected[kind]
    # Sections are not checked by the loader: each key is a flag of `accelerate launch`, and a misspelt one is ignored.
    flags = vars(launch_command_parser().parse_args(["script.py"]))
    assert {*config.deepspeed_config, *config.fsdp_config} <= flags.keys()
    if config.deepspeed_config:
        assert config.deepspeed_config["deepspeed_config_file"] == f"configs/deepspeed/{kind}.json"


def test_unknown_keys_are_refused(tmp_path):
    path = tmp_path / "unknown.yaml"
    path.write_text((ROOT / "configs/accelerate/ddp.yaml").read_text() + "num_gpus: 8\n")
    with pytest.raises(ValueError, match="num_gpus"):
        load_config_from_file(str(path))


@pytest.mark.parametrize("name", ["fsdp2", "multi_node_fsdp2"])
def test_fsdp2_reaches_the_plugin(name):
    """Accelerate refuses FSDP without a GPU, so here the plugin is all that can be made of the file."""
    flags = ["--main_process_ip", "10.0.0.1", "--main_process_port", "0"]
    command = ["--config_file", f"configs/accelerate/{name}.yaml", *flags, "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert args.use_fsdp
    with patch_environment(**prepare_multi_gpu_env(args)):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
