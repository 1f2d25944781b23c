"""What to say of a key that no config has: names that people bring from elsewhere come first."""

from collections.abc import Iterator
from dataclasses import is_dataclass

from dylora.fields import closest, field_types, join
from dylora.run_config import RunConfig

NO_CHOICE = "there is no such setting"
ELSEWHERE = {
    "lr": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "eval_batch_size": "eval.batch_size",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "lr_scheduler": "train.lr_scheduler_type",
    "save_every": "train.save_steps",
    "lora_r": "moe.r",
    "rank": "moe.r",
    "alpha": "moe.lora_alpha",
    "dropout": "moe.lora_dropout",
    "lora_target_modules": "moe.target_modules",
    "num_local_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k_experts",
    "top_k": "moe.top_k_experts",
    "balance_coefficient": "moe.router_aux_loss_coef",
    "base_model": "model.base",
    "model_name_or_path": "model.base",
    "pretrained_model_name_or_path": "model.base",
    "torch_dtype": "model.dtype",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "dataset": "data.sources",
    "datasets": "data.sources",
    "dataset_name": "data.sources",
    "train_file": "data.sources",
    "run_name": "name",
}
"""Names of transformers, trl, peft, axolotl and others, and the key that they are here."""
WITHOUT = {
    "bf16": "set model.dtype to bfloat16, the precision of the base (it is the default)",
    "fp16": "set model.dtype to float16, the precision of the base",
    "load_in_4bit": "set model.quantization to bnb-4bit",
    "load_in_8bit": "set model.quantization to bnb-8bit",
    "flash_attention": "set model.attn_implementation to flash_attention_2",
    "optim": "AdamW is the optimizer; train.adam_beta1, adam_beta2 and adam_epsilon set it",
    "optimizer": "AdamW is the optimizer; train.adam_beta1, adam_beta2 and adam_epsilon set it",
    "report_to": "set log.wandb to true for Weights & Biases; metrics.jsonl is always written",
    "chat_template": "rows are put into the instruction template of dylora/data/prompts.py",
    "eval_strategy": "set eval.eval_steps; without it a run evaluates at its end",
    "evaluation_strategy": "set eval.eval_steps; without it a run evaluates at its end",
    "save_strategy": "set train.save_steps; without it a run saves at its end",
    "logging_strategy": "set log.logging_steps",
    "load_best_model_at_end": "the best checkpoint is kept beside the last one",
    "warmup_ratio": "set train.warmup_steps, a number of steps",
    "val_set_size": "set split_scheme of each item of data.sources",
    "sample_packing": "rows are not packed; a step holds as many tokens as batch_size long rows",
    "packing": "rows are not packed; a step holds as many tokens as batch_size long rows",
    "train_on_inputs": "the loss is of the answers alone",
    "resume_from_checkpoint": "give --resume_from_checkpoint on the command line",
    "modules_to_save": "experts, routers and, with moe.bias, biases are what is trained",
    "adapter": "experts are LoRA always; moe.use_dora and moe.use_rslora vary it",
    "peft_type": "experts are LoRA always; moe.use_dora and moe.use_rslora vary it",
    "deepspeed": "training runs on one device",
    "fsdp": "training runs on one device",
}
"""Names of elsewhere that have no key here, and what to do instead."""


def all_keys() -> list[str]:
    """Every key of a config, sections included, as on the command line."""
    return list(_keys(RunConfig, ""))


def unknown_key(key: str, siblings: list[str]) -> str:
    """What to say about a key that does not exist.

    In this order: what it is here, the key of that name in another section, the nearest name.
    """
    path, _, name = key.rpartition(".")
    name = name.replace("-", "_")
    here, known = [join(path, word) for word in siblings], all_keys()
    same = [other for other in known if _last(other) == name]
    if not same and name in ELSEWHERE:
        return f"unknown key {key}; it is {ELSEWHERE[name]} here"
    if not same and name in WITHOUT:
        return f"unknown key {key}; {NO_CHOICE}: {WITHOUT[name]}"
    for group in (here, known):
        if not same:
            near = closest(name, [_last(other) for other in group], cutoff=0.6)
            same = [other for other in group if _last(other) == near][:1]
    hint = f"did you mean {' or '.join(same)}?" if same else f"valid are {', '.join(here)}"
    return f"unknown key {key}; {hint}"


def _keys(cls: type, path: str) -> Iterator[str]:
    for name, hint in field_types(cls).items():
        yield join(path, name)
        if is_dataclass(hint):
            yield from _keys(hint, join(path, name))  # type: ignore[arg-type]


def _last(key: str) -> str:
    return key.rpartition(".")[2]
