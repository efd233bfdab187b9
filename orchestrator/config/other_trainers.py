"""The names of settings in TRL, LLaMA-Factory, Axolotl, OpenRLHF and NeMo-RL, and what they are here."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Counterpart:
    """What a setting of other trainers is here.

    Attributes:
        names: its names there.
        fields: our fields for it; none where there is nothing to set.
        remark: what to know about it; may be empty where there are fields.
    """

    names: tuple[str, ...]
    fields: tuple[str, ...]
    remark: str

    @property
    def remedy(self) -> str:
        """What to do, as messages say it after a name that is unknown."""
        setting = f"set {' and '.join(self.fields)}" if self.fields else ""
        return ": ".join(part for part in (setting, self.remark) if part)


# Names there, fields here, and a remark.
_TABLE: tuple[tuple[str, str, str], ...] = (
    # The step
    (
        "per_device_train_batch_size train_batch_size train_global_batch_size batch_size",
        "training.pairs_per_step",
        "the pairs of a whole step, over all workers",
    ),
    (
        "gradient_accumulation_steps",
        "training.pairs_per_step",
        "the pairs of a whole step, accumulation included; training.tokens_per_microbatch is what a worker "
        "takes at a time",
    ),
    (
        "micro_batch_size micro_train_batch_size train_micro_batch_size per_device_eval_batch_size "
        "eval_batch_size",
        "training.tokens_per_microbatch",
        "tokens that a worker takes at a time; the step stays the same",
    ),
    ("precompute_ref_batch_size", "", "leave it out: references batch by tokens themselves"),
    # Length and rate of training
    ("num_train_epochs num_epochs max_epochs max_num_epochs", "training.epochs", ""),
    ("max_steps max_num_steps", "training.max_steps", ""),
    ("learning_rate lr", "training.learning_rate", ""),
    ("lr_scheduler_type lr_scheduler", "training.schedule", "cosine, linear or constant, after the warmup"),
    ("warmup_ratio lr_warmup_ratio", "training.warmup", ""),
    ("warmup_steps", "training.warmup", "a share of all steps, not their number"),
    ("weight_decay l2", "training.weight_decay", ""),
    ("max_grad_norm max_norm", "training.clip_norm", ""),
    ("optim", "", "leave it out: the optimizer is AdamW, with float32 masters"),
    ("optimizer", "training.learning_rate", "the optimizer is AdamW, with float32 masters"),
    ("seed", "training.seed", ""),
    ("data_seed", "training.seed", "the order of pairs is drawn by it too"),
    # Precision and memory
    ("bf16", "training.precision", "bfloat16, or auto, which is that on a GPU"),
    ("pure_bf16", "training.precision", "bfloat16; AdamW steps float32 masters"),
    (
        "fp16",
        "training.precision",
        "policies do not train in float16; bfloat16, or auto, which is that on a GPU",
    ),
    ("param_dtype", "training.precision", "bfloat16 or float32"),
    ("torch_dtype dtype", "policy.dtype", "of each reference its own dtype"),
    ("tf32", "", "leave it out: products are computed in the dtype of the weights"),
    (
        "gradient_checkpointing activation_checkpointing gradient_checkpointing_kwargs",
        "training.gradient_checkpointing",
        "",
    ),
    ("disable_gradient_checkpointing", "training.gradient_checkpointing", "false by default"),
    ("activation_offloading", "training.gradient_checkpointing", "true saves the memory of activations"),
    ("load_in_4bit", "policy.quantization", "4bit"),
    ("load_in_8bit", "policy.quantization", "8bit"),
    ("quantization_bit", "policy.quantization", "4bit or 8bit"),
    ("flash_attn flash_attention attn_implementation", "policy.attention", "auto, sdpa, eager or flex"),
    (
        "padding_free packing sample_packing packing_samples",
        "",
        "leave it out: micro-batches are filled by tokens, and a prompt is computed once for its responses",
    ),
    # Strategies
    (
        "deepspeed",
        "parallel.strategy",
        "deepspeed, with parallel.zero_stage 1, 2 or 3, instead of a file of its settings",
    ),
    ("fsdp fsdp_config dtensor_cfg", "parallel.strategy", "fsdp, which is FSDP2"),
    ("zero_stage", "parallel.zero_stage", "with strategy: deepspeed"),
    ("adam_offload cpu_offload", "parallel.offload", ""),
    ("num_nodes gpus_per_node cluster", "parallel.workers", "workers of the whole cluster"),
    # The policy and its adapter
    (
        "model_name_or_path base_model pretrain model_name",
        "policy.model",
        "a hub id, a folder, or models:/name@alias",
    ),
    ("model_revision", "policy.revision", ""),
    ("adapter_name_or_path", "policy.model", "the adapter's folder"),
    ("trust_remote_code", "policy.trust_remote_code", "of each reference its own"),
    ("use_peft peft_config", "policy.adapter", "such as {r: 16, alpha: 32}"),
    ("finetuning_type", "policy.adapter", "such as {r: 16, alpha: 32}; without it all weights"),
    ("lora_r lora_rank", "policy.adapter.r", ""),
    ("lora_alpha", "policy.adapter.alpha", ""),
    ("lora_dropout", "policy.adapter.dropout", ""),
    ("lora_target", "policy.adapter.target_modules", "all is all-linear here"),
    ("lora_target_modules target_modules", "policy.adapter.target_modules", ""),
    ("lora_target_linear", "policy.adapter.target_modules", "all-linear, the default"),
    ("use_rslora peft_use_rslora", "policy.adapter.rslora", ""),
    ("use_dora peft_use_dora", "policy.adapter.dora", ""),
    ("disable_dropout", "", "leave it out: a model's own dropout is always off"),
    ("router_aux_loss_coef aux_loss_coef", "", "leave it out: a router's auxiliary loss is not trained"),
    # References
    ("ref_model ref_pretrain", "references.models", "by name, as many as you like, with references.primary"),
    ("ref_model_adapters", "references.models", "an adapter's folder is a model too"),
    ("precompute_ref_log_probs", "references.mode", "precompute"),
    ("reference_free", "loss.references.combine", "none"),
    ("ref_offload", "references.mode", "precompute frees the devices before training"),
    ("sync_ref_model ref_model_mixup_alpha ref_model_sync_steps", "", "leave it out: references are frozen"),
    # The loss
    ("beta pref_beta rl_beta reference_policy_kl_penalty", "loss.beta", ""),
    ("orpo_alpha", "loss.beta", "with preset orpo"),
    ("loss_type", "loss.preset", "TRL's names do too, but its ipo is ipo_length_normalized"),
    (
        "pref_loss",
        "loss.preset",
        "sigmoid is dpo; its ipo is ipo_length_normalized; hinge, orpo and simpo have their names",
    ),
    ("preference_loss", "loss.preset", ""),
    ("rl", "loss.preset", "dpo, ipo, orpo, simpo and others"),
    ("stage", "loss.preset", "dpo and others, sft for supervised fine-tuning"),
    ("dpo", "loss training", "loss.preset: dpo with loss.beta; training.epochs and training.max_steps"),
    ("ipo", "loss.preset", "ipo"),
    (
        "label_smoothing label_smoothing_factor",
        "loss.link.flip_probability",
        "with preset robust_dpo, or loss.link.label_smoothing with preset exo; preset cdpo reads a label per "
        "pair instead",
    ),
    ("dpo_label_smoothing", "", "use preset cdpo, which reads a label per pair instead of one number"),
    (
        "rpo_alpha pref_ftx sft_loss_weight nll_loss_coef",
        "loss.sft_weight",
        "it weighs the chosen response's negative log-likelihood per token, as in preset rpo",
    ),
    ("cpo_alpha", "loss.sft_weight", "with preset cpo"),
    ("loss_weights", "loss.sft_weight", "for supervised fine-tuning beside a loss, as in preset rpo"),
    ("simpo_gamma", "loss.margin", "gamma / beta"),
    ("discopop_tau", "loss.link.temperature", "with preset discopop"),
    ("preference_average_log_probs", "loss.length_normalized", ""),
    # Data
    (
        "dataset dataset_name dataset_path data_path train_file",
        "data.train",
        "a file, a folder, a URI or a hub id",
    ),
    ("datasets", "data.train", "a source, or a list of them"),
    ("dataset_dir", "data.train", "the path with its folder; no dataset_info.json is read"),
    ("dataset_config", "data.subset", ""),
    ("dataset_train_split train_split", "data.split", ""),
    ("dataset_test_split", "data.eval_split", ""),
    ("eval_dataset", "data.eval", ""),
    ("test_datasets", "data.eval", "several sets by name"),
    ("val_size val_set_size test_split_size", "data.eval_fraction", ""),
    ("max_samples", "data.train.N.cap", "of each source"),
    ("interleave_probs dataset_probs mix_strategy", "data.train.N.share", "of each source"),
    ("prompt_key", "data.columns", "{prompt: ...}"),
    ("chosen_key", "data.columns", "{chosen: ...}"),
    ("rejected_key", "data.columns", "{rejected: ...}"),
    (
        "max_length max_len cutoff_len sequence_len max_seq_length max_total_sequence_length",
        "data.max_length",
        "for prompt and response together",
    ),
    ("max_prompt_length", "data.max_prompt_length", "for the prompt"),
    (
        "max_completion_length",
        "data.max_length",
        "for prompt and response together, with data.max_prompt_length",
    ),
    ("truncation_mode", "data.on_long_row", "skip, stop or truncate"),
    ("template chat_template", "policy.chat_template", "the tokenizer's own is the default"),
    ("chat_template_path", "policy.chat_template", "a file, or the template itself"),
    ("apply_chat_template", "", "leave it out: messages are rendered by the template, texts are not"),
    ("dataset_num_proc preprocessing_num_workers", "", "leave it out: rows are tokenised in all cores, once"),
    ("overwrite_cache", "", "leave it out: tokens are kept by what they depend on"),
    ("remove_unused_columns", "", "leave it out: columns that carry no preference are passed over"),
    # Evaluation, checkpoints, tracking
    ("do_train do_eval", "", "leave it out: polyref train does both"),
    (
        "eval_on_start val_at_start val_at_end",
        "",
        "leave it out: held-out pairs are evaluated before the first step and after the last",
    ),
    ("greater_is_better higher_is_better", "", "leave it out: the direction of each metric is known"),
    ("eval_strategy eval_steps val_period", "evaluation.every_steps", ""),
    ("metric_for_best_model metric_name", "evaluation.metric", ""),
    ("load_best_model_at_end", "evaluation.keep", "best"),
    ("generate_during_eval", "evaluation.sampling", ""),
    ("save_strategy", "training.save_every", "steps"),
    ("save_steps save_period", "training.save_every", ""),
    ("save_total_limit max_ckpt_num", "training.keep_last", ""),
    ("keep_top_k", "training.keep_last", "the last ones; evaluation.keep: best keeps the best"),
    ("checkpointing", "training.save_every training.keep_last", ""),
    ("resume_from_checkpoint load_checkpoint", "", "leave it out: the same command resumes"),
    (
        "output_dir save_path ckpt_path checkpoint_dir",
        "name storage_path",
        "a run's files are in <storage_path>/<name>",
    ),
    ("overwrite_output_dir", "", "leave it out: --fresh starts over"),
    ("run_name", "name", "at the top of the file"),
    (
        "logging_steps logging_strategy logging_first_step logging_dir",
        "",
        "leave it out: every step is logged",
    ),
    (
        "report_to use_wandb logger",
        "tracking.uri",
        "MLflow is what runs are recorded in; metrics.jsonl has the same numbers",
    ),
    (
        "wandb_project",
        "tracking.experiment",
        "MLflow is what runs are recorded in; metrics.jsonl has the same numbers",
    ),
    ("hub_token", "", "leave it out: the token is read from the variable HF_TOKEN"),
    (
        "push_to_hub hub_model_id",
        "tracking.registered_model",
        "versions are in the MLflow registry; polyref models push uploads one to a hub",
    ),
)

COUNTERPARTS: tuple[Counterpart, ...] = tuple(
    Counterpart(tuple(names.split()), tuple(fields.split()), remark) for names, fields, remark in _TABLE
)
"""The table, a row for each thing."""
BY_NAME: Mapping[str, Counterpart] = MappingProxyType(
    {name: counterpart for counterpart in COUNTERPARTS for name in counterpart.names}
)
"""The rows by their names in other trainers."""
