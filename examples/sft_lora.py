"""
Fine-tune a causal language model with LoRA and the gradient-norm penalty, by TRL's `SFTTrainer`.

    python examples/sft_lora.py
        Train a tiny Llama on the docstrings of Python's standard library. It takes about two minutes on two CPU cores.
    python examples/sft_lora.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara
        Train any causal language model on your own texts, prompts with completions, or conversations.
    accelerate launch --config_file configs/accelerate/zero3.yaml examples/sft_lora.py --model_name_or_path ...
        Train on several GPUs.

The flags are those of TRL's own script, `trl sft`, and the `gnp_*` arguments. `--config run.yaml` reads them from a
file. The output directory gets the adapter, and its folder merged/ gets the model with the merged adapter.
"""

import sys
from pathlib import Path

import datasets
import torch
from peft import AutoPeftModelForCausalLM
from text_classification import load_docstrings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from hf_gnp.trl import GNPSFTConfig, GNPSFTTrainer


DEFAULTS = {
    "output_dir": "outputs/sft_lora",
    "use_peft": True,
    "lora_target_modules": "all-linear",
    "packing": True,
    # This strategy cuts texts at the end of a block. The others need an attention that separates packed texts.
    "packing_strategy": "wrapped",
    "learning_rate": 2e-4,
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "dataloader_pin_memory": torch.accelerator.is_available(),
    "use_cpu": not torch.accelerator.is_available(),  # TRL's default, bf16, needs a GPU or `use_cpu`
}
# The small model has untrained embeddings, so they are trained together with the adapter.
EMBEDDED_DEFAULTS = {
    "lora_modules_to_save": ["embed_tokens", "lm_head"],
    "learning_rate": 3e-3,
    "max_length": 128,
    "num_train_epochs": 1,
}


def save_small_model(folder: Path, texts: list[str]) -> None:
    """Save a tiny Llama with random weights, and a tokenizer that is trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_merged(trainer: GNPSFTTrainer, folder: Path) -> None:
    """Save the model with the adapter merged into its weights, so that it runs without PEFT."""
    if trainer.is_world_process_zero():
        unset_hf_deepspeed_config()  # otherwise loading waits for the other ranks to take their shards
        model = AutoPeftModelForCausalLM.from_pretrained(trainer.args.output_dir, dtype="auto")
        model.merge_and_unload().save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()


def main() -> None:
    parser = TrlParser((ScriptArguments, GNPSFTConfig, ModelConfig))
    flags, _ = parser.parse_known_args()
    is_own = flags.model_name_or_path or flags.dataset_name or "--config" in sys.argv
    parser.set_defaults(**(DEFAULTS if is_own else DEFAULTS | EMBEDDED_DEFAULTS))
    script_args, args, model_args = parser.parse_args_and_config()
    if script_args.dataset_name is None:
        data = load_docstrings().select_columns("text")
    else:
        data = datasets.load_dataset(script_args.dataset_name, script_args.dataset_config)
    if model_args.model_name_or_path is None:
        model_args.model_name_or_path = str(Path(args.output_dir) / "start")
        set_seed(args.seed)
        with args.main_process_first(local=False, desc="making a small model"):
            if args.process_index == 0:
                save_small_model(Path(model_args.model_name_or_path), data["train"]["text"])
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    trainer = GNPSFTTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=data[script_args.dataset_train_split],
        eval_dataset=data.get(script_args.dataset_test_split),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics, combined=False)
    trainer.save_state()
    trainer.save_model()
    if model_args.use_peft:
        save_merged(trainer, Path(args.output_dir) / "merged")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
