"""The options of a command by name, and the guess at what a name that is not among them stands for."""

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain
from typing import Any

import tyro

from simcse_jax.errors import InputError, did_you_mean, plain

_OTHER_NAMES = {
    **dict.fromkeys(
        ("model.path", "model", "models"),
        "m model model_name model_name_or_path model_path base_model checkpoint pretrained backbone",
    ),
    "pooler": "pooler_type pooling pooling_mode pooling_strategy",
    "dtype": "fp16 bf16 fp32 precision mixed_precision torch_dtype amp",
    "model.dropout": "dropout_rate dropout_prob hidden_dropout_prob attention_probs_dropout_prob",
    "model.remat": "gradient_checkpointing activation_checkpointing",
    "data.train": "data train_file train_data train_path training_data dataset dataset_name data.path data.file text "
    "corpus input",
    **dict.fromkeys(("input", "sentences"), "input_file text_file file corpus text"),
    "queries": "query q",
    "top_k": "k n num_results limit",
    "size": "vocab_size vocabulary_size",
    "layers": "num_layers num_hidden_layers",
    "heads": "num_heads num_attention_heads",
    "positions": "max_position_embeddings",
    "dim": "dims dimension dimensions n_components",
    "method": "whiten whitening flow",
    "data.delimiter": "sep separator seperator delim",
    "data.subset": "dataset_config_name config_name",
    "data.columns": "text_column text_columns text_field column_names",
    "max_length": "max_seq_length max_seq_len max_sequence_length max_len seq_len seq_length",
    "data.cache": "cache_dir",
    "objective.temperature": "temp tau",
    "objective.hard_negative_log_weight": "hard_negative_weight",
    "objective.mlm.weight": "do_mlm mlm_weight mlm",
    "objective.mlm.probability": "mlm_probability",
    "optimizer.name": "optim optimizer",
    "optimizer.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "optimizer.learning_rate": "lr peak_lr",
    "optimizer.warmup_steps": "warmup warmup_ratio num_warmup_steps",
    "optimizer.weight_decay": "wd",
    "optimizer.clip_norm": "max_grad_norm clip_grad_norm gradient_clip_val grad_clip",
    "optimizer.b1": "adam_beta1 beta1",
    "optimizer.b2": "adam_beta2 beta2",
    "optimizer.eps": "adam_epsilon epsilon adam_eps",
    "mesh.fsdp": "deepspeed sharded_ddp",
    "mesh.dcn": "num_slices slices replicas dcn_parallelism",
    "mesh.data": "devices n_gpu num_gpus gpus",
    "multi_host": "local_rank num_nodes nnodes",
    "heartbeat": "heartbeat_timeout heartbeat_timeout_seconds ddp_timeout",
    "join_timeout": "initialization_timeout init_timeout",
    "evaluation.data": "senteval senteval_path path_to_data",
    "evaluation.dev": "metric_for_best_model eval_file validation_file dev_file eval_data eval_dataset validation",
    "evaluation.test": "task tasks task_set",
    "evaluation.every": "eval_steps evaluation_strategy eval_strategy eval_every eval_interval",
    "evaluation.patience": "early_stopping early_stopping_patience",
    "checkpoint.every": "save_steps save_strategy save_every save_interval",
    "checkpoint.keep": "save_total_limit",
    "output": "o output_dir output_path out out_dir save_dir run_dir overwrite_output_dir resume "
    "resume_from_checkpoint",
    "seeds": "seed",
    "epochs": "num_train_epochs num_epochs n_epochs",
    "max_steps": "steps num_steps train_steps total_steps",
    "batch_size": "per_device_train_batch_size per_device_eval_batch_size per_gpu_train_batch_size train_batch_size "
    "eval_batch_size global_batch_size bs",
    "micro_batch": "gradient_accumulation_steps mini_batch_size chunk_size",
    "log_every": "logging_steps log_interval",
    "tracking": "report_to logging_dir wandb tensorboard",
    "profile": "profiler profile_steps trace",
    "tasks": "task task_set task_name",
    "normalize": "normalize_embeddings normalize_to_unit",
    "config_file": "config",
}
"""For a setting, or an argument of a command, the names that the Hugging Face trainer, the SimCSE authors' code and
other programs of the kind give it."""

_OPTION = re.compile(r"--?[A-Za-z][\w.-]*")


def check_options(command: str, kind: type, words: Sequence[str]) -> None:
    """Raises `InputError` for options that a command does not have, and values that are not among an option's choices.

    tyro does so, too, but it knows no other names, and says nothing of either where an argument is missing.

    Args:
      command: the name of the command.
      kind: its class.
      words: the words after its name.
    """
    arguments = list(arguments_of(kind))
    known = {spelling: argument for argument in arguments for spelling in argument.spellings}
    messages: dict[str, None] = {}
    for place, word in enumerate(words):
        option, given, value = word.partition("=")
        if word == "--":
            break
        if not _OPTION.fullmatch(option) or option in ("-h", "--help"):
            continue
        argument = known.get(option.replace("_", "-"))
        if argument is None:
            messages[f"{command} has no option {option}: {_advice(option, command, kind, arguments)}"] = None
        elif argument.choices and (given or place + 1 < len(words)):
            value = value if given else words[place + 1]
            if value not in argument.choices:
                from simcse_jax.config.values import OTHER_VALUES  # imports NumPy, which help has no use for

                guess = did_you_mean(value, argument.choices, OTHER_VALUES)
                choices = ", ".join(argument.choices)
                messages[f"{option} is '{value}': {guess}expected one of {choices}"] = None
    if messages:
        raise InputError(*messages)


def usage(command: str, kind: type) -> str:
    """How a command is called, without its options."""
    return " ".join([f"simcse-jax {command}", *(a.shown for a in arguments_of(kind) if a.positional)])


def _advice(option: str, command: str, kind: type, arguments: Sequence["_Argument"]) -> str:
    meant = sorted(_meant(option, arguments), key=lambda argument: (argument.positional, argument.name.count(".")))
    if not meant:
        return f"{usage(command, kind)} --help lists its options"
    if meant[0].positional:
        return f"give {meant[0].shown} without an option: {usage(command, kind)}"
    return f"did you mean {' or '.join(argument.shown for argument in meant if not argument.positional)}?"


@dataclass(frozen=True)
class _Argument:
    name: str
    """Dotted name of the field."""
    shown: str
    spellings: tuple[str, ...] = ()
    """Its options; () for a positional argument."""
    choices: tuple[str, ...] = ()
    """Its values, where it takes one of a few."""

    @property
    def positional(self) -> bool:
        return not self.spellings

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]


def arguments_of(kind: type, prefix: str = "") -> Iterator[_Argument]:
    """The arguments that tyro makes of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for f in fields(kind):
        name, marks = prefix + f.name, getattr(hints[f.name], "__metadata__", ())
        inner = typing.get_args(hints[f.name])[0] if marks else hints[f.name]
        if tyro.conf.Suppress in marks:
            continue
        if is_dataclass(inner):
            merged = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from arguments_of(typing.cast(type, inner), prefix if merged else f"{name}.")
        elif tyro.conf.Positional in marks:
            yield _Argument(name, next(mark.metavar for mark in marks if getattr(mark, "metavar", None)))
        else:
            pair = inner is bool and tyro.conf.FlagCreatePairsOff not in marks
            spellings = [name, f"{prefix}no_{f.name}"] if pair else [name]
            options = tuple(f"--{spelling.replace('_', '-')}" for spelling in spellings)
            yield _Argument(name, options[0], options, _choices(inner))


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a type that has a few; () for another."""
    if typing.get_origin(hint) is typing.Literal:
        return tuple(map(str, typing.get_args(hint)))
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    choices = [("None",) if part is type(None) else _choices(part) for part in parts]
    return tuple(chain(*choices)) if choices and all(choices) else ()


def _meant(word: str, arguments: Sequence[_Argument]) -> list[_Argument]:
    """The arguments that an unknown option may stand for."""
    bare, last = plain(word), plain(word.rpartition(".")[2])
    for asked in (bare, last):
        ours = [name for name, others in _OTHER_NAMES.items() if asked in map(plain, others.split())]
        if found := [a for a in arguments if any(f".{a.name}".endswith(f".{name}") for name in ours)]:
            return found
    if found := [a for a in arguments if plain(a.last) == last or plain(a.name) == bare]:
        return found
    near = {plain(key): a for a in arguments for key in (a.last, a.name)}
    found = [near[key] for key in difflib.get_close_matches(bare, near, 3, 0.7)]
    # That they are of one section says nothing of the names in it.
    return list(dict.fromkeys(a for a in found if difflib.get_close_matches(last, [plain(a.last)], 1)))
