"""What to say of a key that no config has: names that people bring from elsewhere come first."""

from dataclasses import is_dataclass

from dylora.config import ends_with
from dylora.fields import closest, field_types, join
from dylora.run_config import RunConfig

NO_CHOICE = "there is no such setting"
_NAMES = {
    "train.learning_rate": "lr",
    "train.epochs": "num_train_epochs num_epochs",
    "train.batch_size": "per_device_train_batch_size train_batch_size micro_batch_size",
    "eval.batch_size": "per_device_eval_batch_size eval_batch_size",
    "train.gradient_accumulation_steps": "gradient_accumulation",
    "train.max_grad_norm": "gradient_clipping",
    "train.lr_scheduler_type": "lr_scheduler",
    "train.save_steps": "save_every",
    "train.optim": "optimizer",
    "eval.load_best_at_end": "load_best_model_at_end",
    "moe.adapter_type": "adapter peft_type",
    "moe.r": "lora_r rank",
    "moe.lora_alpha": "alpha",
    "moe.lora_dropout": "dropout",
    "moe.target_modules": "lora_target_modules",
    "moe.num_experts": "num_local_experts",
    "moe.top_k_experts": "num_experts_per_tok top_k",
    "moe.router_aux_loss_coef": "balance_coefficient",
    "model.base": "base_model model_name_or_path pretrained_model_name_or_path",
    "model.dtype": "torch_dtype",
    "data.max_length": "sequence_len max_seq_length max_seq_len model_max_length cutoff_len",
    "data.packing": "sample_packing",
    "data.cache": "dataset_prepared_path tokenized_path cache_dir",
    "data.template": "chat_template prompt_template prompt_style",
    "data.sources": "dataset datasets dataset_name train_file",
    "name": "run_name",
}
ELSEWHERE = {name: key for key, names in _NAMES.items() for name in names.split()}
"""Names of transformers, trl, peft, axolotl and others, and the key that they are here."""
_INSTEAD = {
    "bf16": "set model.dtype to bfloat16, the precision of the base (it is the default)",
    "fp16": "set model.dtype to float16, the precision of the base",
    "load_in_4bit": "set model.quantization to bnb-4bit",
    "load_in_8bit": "set model.quantization to bnb-8bit",
    "flash_attention": "set model.attn_implementation to flash_attention_2",
    "eval_strategy evaluation_strategy": "set eval.eval_steps; none evaluates at the end alone",
    "save_strategy": "set train.save_steps; without it a run saves at its end",
    "logging_strategy": "set log.logging_steps",
    "warmup_ratio": "set train.warmup_steps, a number of steps",
    "streaming": "set stream_rows, beside a validation_path, of an item of data.sources",
    "val_set_size": "set split (such as 95/5) or validation_path of each item of data.sources",
    "resume_from_checkpoint": "give --resume_from_checkpoint on the command line",
    "modules_to_save": "experts, routers and, with moe.bias, biases are what is trained",
    "deepspeed fsdp": "set train.parallel to ddp or fsdp2, and start the run with torchrun",
}
WITHOUT = {name: text for names, text in _INSTEAD.items() for name in names.split()}
"""Names of elsewhere that have no key here, and what to do instead."""
OLD_FLAGS: dict[str, tuple[str, str | None]] = {
    "--bf16": ("model.dtype", "bfloat16"),
    "--fp16": ("model.dtype", "float16"),
    "--num_experts": ("moe.num_experts", None),
    "--lora_r": ("moe.r", None),
    "--lora_alpha": ("moe.lora_alpha", None),
    "--lora_dropout": ("moe.lora_dropout", None),
    "--balance_coefficient": ("moe.router_aux_loss_coef", None),
    "--interleaved_sampling": ("data.interleaved_sampling", "true"),
    "--num_epochs": ("train.epochs", None),
    "--train_batch_size": ("train.batch_size", None),
    "--gradient_accumulation_steps": ("train.gradient_accumulation_steps", None),
    "--learning_rate": ("train.learning_rate", None),
    "--cosine_restarts": ("train.lr_scheduler_type", "cosine_with_restarts"),
    "--training_subset": ("train.training_subset", None),
    "--eval_batch_size": ("eval.batch_size", None),
    "--eval_subset": ("eval.eval_subset", None),
}
"""Options of earlier training scripts, which `train` takes: the key that each sets, and to what
where it has no value of its own."""


def all_keys(cls: type = RunConfig, path: str = "") -> list[str]:
    """Every key of a config, sections included, as on the command line."""
    keys = []
    for name, kind in field_types(cls).items():
        keys.append(join(path, name))
        if is_dataclass(kind):
            keys += all_keys(kind, keys[-1])  # type: ignore[arg-type]
    return keys


def unknown_key(key: str, siblings: list[str]) -> str:
    """What to say about a key that does not exist.

    In this order: what it is here, the key of that name in another section, the nearest name.
    """
    path, _, name = key.rpartition(".")
    name = name.replace("-", "_")
    here, known = [join(path, word) for word in siblings], all_keys()
    same = [other for other in known if ends_with(other, name)]
    if not same and name in ELSEWHERE:
        return f"unknown key {key}; it is {ELSEWHERE[name]} here"
    if not same and name in WITHOUT:
        return f"unknown key {key}; {NO_CHOICE}: {WITHOUT[name]}"
    for group in (here, known):
        if not same:
            near = closest(name, [other.rpartition(".")[2] for other in group], cutoff=0.6)
            same = [other for other in group if near and ends_with(other, near)][:1]
    hint = f"did you mean {' or '.join(same)}?" if same else f"valid are {', '.join(here)}"
    return f"unknown key {key}; {hint}"
