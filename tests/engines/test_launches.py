"""The files of configs/ through the launchers that docs/multi_node.md names: 2 processes, gloo, CPU."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_matches_reference, gnp
from fork import fork_script
from launch import ROOT, free_port, launch, launch_together
from memory import estimate_memory
from runs import LOG_TOLERANCE, WEIGHTS_TOLERANCE
from safetensors.torch import load_file
from tiny import make_model, relative_distance
from transformers import ViTConfig, ViTForImageClassification, set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TIMEOUT = 1200  # a launch takes 15 to 30 s on two free cores, nearly all of it imports
SCRIPT = "examples/vit_finetune.py"
# A thread of gloo that is late to free a tensor aborts a process at its very end (pytorch/pytorch#190489).
GLOO_ABORT = "terminate called without an active exception"
METRICS = ("loss", "grad_norm", "gnp_grad_norm", "gnp_perturbed_loss", "gnp_sharpness")
STEPS, GLOBAL_BATCH = 4, 16
RECIPE = {
    "crop_padding": 0,  # one process and two draw other random numbers: nothing random is left
    "horizontal_flip": "false",
    "max_train_samples": STEPS * GLOBAL_BATCH,
    "max_eval_samples": 32,
    "max_steps": STEPS,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "gnp_r": 0.05,
    "gnp_alpha": 0.8,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
}
# ZeRO-3 draws the weights of a new model in another order, so all start from a saved one. One real torchrun is enough.
LAUNCHERS = {
    **dict.fromkeys(("ddp", "zero2", "zero3"), "accelerate"),
    "zero1": "torchrun",
    **dict.fromkeys(("zero2_offload", "zero3_offload"), "fork"),
}


def accelerate_launch(config: str, *flags: str) -> list[str]:
    return ["accelerate", "launch", "--config_file", f"configs/accelerate/{config}.yaml", *flags]


def launch_example(command: list[str]) -> None:
    """Launch an example, and once more if gloo aborts it after its last line."""
    try:
        launch(command, TIMEOUT)
    except AssertionError as error:
        if GLOO_ABORT not in str(error):
            raise
        launch(command, TIMEOUT)


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A model to start from, of sizes that 2 does not divide, with its image processor."""
    folder = tmp_path_factory.mktemp("start")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 33, "intermediate_size": 35}
    set_seed(0)
    config = ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=3, num_labels=10)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finetune(start, tmp_path_factory):
    """Runs the example as a launcher does, once for each configuration, and returns its output folder."""

    @functools.cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        ranks = 1 if name == "single" else 2
        arguments = RECIPE | {
            "model_name_or_path": start,
            "output_dir": folder,
            "per_device_train_batch_size": GLOBAL_BATCH // ranks,
        }
        launcher = LAUNCHERS.get(name, "single")
        if ranks > 1:
            arguments["ddp_backend"] = "gloo"
        if launcher in ("torchrun", "fork"):
            arguments["deepspeed"] = f"configs/deepspeed/{name}.json"
        flags = ["--use_cpu", *(text for key, value in arguments.items() for text in (f"--{key}", str(value)))]
        port = str(free_port())
        commands = {
            "single": accelerate_launch("single"),
            "accelerate": accelerate_launch(name, "--num_processes", "2", "--main_process_port", port),
            "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", port],
        }
        if launcher == "fork":
            fork_script(SCRIPT, *flags, ranks=2, timeout=TIMEOUT)
        else:
            launch_example([*commands[launcher], SCRIPT, *flags])
        return folder

    return run


def logged(folder: Path) -> dict[str, list[float]]:
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in entries if "loss" in entry]
    return {name: [entry[name] for entry in steps] for name in METRICS}


def saved_weights(folder: Path) -> torch.Tensor:
    return torch.cat(
        [value.double().flatten() for _, value in sorted(load_file(folder / "model.safetensors").items())]
    )


def test_single_trains_with_the_penalty(finetune):
    logs = logged(finetune("single"))
    results = json.loads((finetune("single") / "all_results.json").read_text())
    assert len(logs["loss"]) == STEPS
    assert results["train_loss"] == pytest.approx(sum(logs["loss"]) / STEPS)
    assert all(sharpness > 0 for sharpness in logs["gnp_sharpness"])
    assert results["train_samples_per_second"] > 0
    assert 0 <= results["eval_accuracy"] <= 1


@pytest.mark.parametrize("name", LAUNCHERS)
def test_all_launches_train_alike(finetune, start, name):
    """The same global batches from the same weights in fp32: they differ in the order of roundings only."""
    expected, result = finetune("single"), finetune(name)
    expected_logs, logs = logged(expected), logged(result)
    for metric in ("loss", "grad_norm", "gnp_grad_norm", "gnp_perturbed_loss"):
        assert logs[metric] == pytest.approx(expected_logs[metric], rel=LOG_TOLERANCE), metric
    # A difference of two losses.
    assert logs["gnp_sharpness"] == pytest.approx(expected_logs["gnp_sharpness"], abs=LOG_TOLERANCE * logs["loss"][0])
    distance = relative_distance(saved_weights(result), saved_weights(expected), saved_weights(start))
    assert distance < WEIGHTS_TOLERANCE
    expected_loss, loss = (json.loads((f / "all_results.json").read_text())["eval_loss"] for f in (expected, result))
    assert loss == pytest.approx(expected_loss, rel=LOG_TOLERANCE)


CASE: dict[str, Any] = {"engine": "ddp", "kind": "vit", "args": gnp(0.8, gradient_accumulation_steps=2)}
MACHINES = {
    # configuration: flags, the engine that it must give, the name of that engine in the estimate of memory
    "multi_node_ddp": ([], "NativeEngine", "ddp"),
    "zero2": (["--num_machines", "2", "--deepspeed_multinode_launcher", "standard"], "Zero12Engine", "zero2"),
    "multi_node_zero3": ([], "Zero3Engine", "zero3"),
}
# ZeRO-2 pads each of Trainer's two parameter groups to a multiple of 4 elements, of 4 bytes each.
PADDING = 2 * 3 * 4


@pytest.mark.parametrize("config", MACHINES)
def test_two_machines(tmp_path, config):
    """Two launchers, each the only one on its "machine", that find each other by address; then the reference loop."""
    flags, engine, estimated_as = MACHINES[config]
    (tmp_path / "case.json").write_text(json.dumps(CASE))
    meeting_point = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    script = [str(ROOT / "tests/engines/train_once.py"), str(tmp_path / "case.json"), str(tmp_path)]
    machines = [
        accelerate_launch(config, *flags, "--num_processes", "2", "--machine_rank", rank, *meeting_point) + script
        for rank in ("0", "1")
    ]
    launch_together(machines, TIMEOUT)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert result["engine"] == engine  # `CASE` says nothing of DeepSpeed: it comes from the launcher
    assert_matches_reference(result, CASE)

    sizes = [p.numel() for p in make_model("vit").parameters()]
    penalty = estimate_memory(estimated_as, sum(sizes), ranks=2, precision="fp32")[0].penalty
    assert sum(result["held_bytes"]) == pytest.approx(2 * penalty, abs=PADDING)
    assert max(result["held_bytes"]) == pytest.approx(penalty, rel=0.01)


def test_language_model_with_lora_on_zero3(tmp_path):
    """The adapter is gathered from the ranks, and merged on one of them."""
    pytest.importorskip("trl", reason="TRL needs Python 3.11")
    flags = ["--output_dir", tmp_path, "--max_steps", 3, "--max_length", 64, "--logging_steps", 1, "--warmup_steps", 0]
    flags += ["--ddp_backend", "gloo", "--report_to", "none", "--deepspeed", "configs/deepspeed/zero3.json"]
    fork_script("examples/sft_lora.py", *flags, ranks=2, timeout=TIMEOUT)
    losses = [entry["loss"] for entry in json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][:3]]
    assert losses[-1] < losses[0]
    start, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("start", "merged"))
    assert merged.keys() == start.keys()
    changed = {name for name in start if not torch.equal(start[name], merged[name])}
    assert changed == {name for name in start if "norm" not in name}  # all linear layers, embeddings and the head
