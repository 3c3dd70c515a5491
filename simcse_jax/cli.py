"""Train sentence encoders with SimCSE, score them, encode with them, and export them to PyTorch.

Every command takes --help, which lists its options; --debug, which shows the traceback of an error; --quiet,
--verbose, and --no-verify, which trusts what is on disk.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import make_dataclass
from importlib import import_module
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from simcse_jax.commands.names import check_options, usage
from simcse_jax.commands.options import Command, Configured, pairs_of_values
from simcse_jax.errors import InputError, did_you_mean, reason, room
from simcse_jax.reports.progress import discard, telling
from simcse_jax.runtime.open_files import allow_open_files

COMMANDS = {
    "train": ("train:Train", "Train a model, or continue the run in the output folder."),
    "configs": ("configs:Configs", "List the configs that come with the package, or show one with all its settings."),
    "plan": (
        "plan:PlanCommand",
        "Compile a run's train step for devices that are not here: memory, collectives, FLOPs, and what they allow.",
    ),
    "study": (
        "study:StudyCommand",
        "Train over a grid of batch × learning-rate rule × seed, or continue; write table, figures and report.",
    ),
    "ablate": (
        "ablate:Ablate",
        "Train the variants of a config, each with each seed, or continue; print and write the table.",
    ),
    "data inspect": (
        "data:Inspect",
        "Report what a model will see of its training text: counts, lengths, cuts, repetitions, three examples.",
    ),
    "data nli": (
        "data:Nli",
        "Write triplets (premise, entailment, contradiction) from the labelled pairs of SNLI, MultiNLI and the like.",
    ),
    "data mine": (
        "data:Mine",
        "Write pairs of sentences with hard negatives: texts that a model finds near a sentence, and not its positive.",
    ),
    "evaluate": (
        "evaluate:Evaluate",
        "Score models on STS, transfer and retrieval tasks; several in one table.",
    ),
    "encode": ("encode:Encode", "Write the vectors of a file's sentences, one row per line, as float32 .npy."),
    "search": ("search:Search", "Find the sentences of a file that are most similar to a query."),
    "export": (
        "export:Export",
        "Write a model as a folder that transformers, sentence-transformers and this package read.",
    ),
    "analyze": (
        "analyze:Analyze",
        "Measure where models' vectors lie (alignment, uniformity, isotropy, spectrum); write tables, figures, report.",
    ),
    "verify": (
        "verify:Verify",
        "Say what of runs, exports, indexes and token caches is whole, what made it, and whether it can be repeated.",
    ),
    "postprocess": (
        "postprocess:Postprocess",
        "Fit whitening, all-but-the-top or a flow to sentences without labels, and write the model that applies it.",
    ),
    "vocabulary": (
        "vocabulary:VocabularyCommand",
        "Learn a WordPiece vocabulary from text and write a BERT without weights, to be pretrained (pretrain_mlm).",
    ),
    "replace-words": (
        "replace_words:ReplaceWords",
        "Write training pairs: each sentence, and the same with words that a masked language model predicts instead.",
    ),
    "serve": (
        "serve:Serve",
        "Serve search over sentences to browsers and through an HTTP API; it also compares and plots any sentences.",
    ),
}
"""For each command, its class in `simcse_jax.commands` and that class's docstring, so that help imports no command."""

GROUPS = {"data": "Inspect training text, make triplets from labelled pairs, and mine hard negatives."}
"""First words that several commands share."""

_OTHER_NAMES = {
    **dict.fromkeys(("fit", "finetune", "run", "pretrain", "resume"), "train"),
    **dict.fromkeys(("eval", "test", "score", "sts", "benchmark"), "evaluate"),
    **dict.fromkeys(("embed", "embedding", "embeddings", "vectors", "infer", "inference", "predict"), "encode"),
    **dict.fromkeys(("query", "find", "similarity", "index"), "search"),
    **dict.fromkeys(("convert", "save", "push", "tohuggingface"), "export"),
    **dict.fromkeys(("whiten", "whitening", "flow"), "postprocess"),
    **dict.fromkeys(("ablation", "ablations"), "ablate"),
    **dict.fromkeys(("tokenizer", "vocab"), "vocabulary"),
    **dict.fromkeys(("check", "fsck", "checksum", "validate"), "verify"),
    **dict.fromkeys(("list", "show", "ls", "config"), "configs"),
    **{"server": "serve", "help": "--help", "version": "--version"},
}
"""What other programs call a command, as `did_you_mean` compares names."""

_PATIENCE = 5.0  # seconds

_ANYWHERE = ("--debug", "--quiet", "--verbose", "--no-verify")
"""Options of every command, which may stand anywhere."""


def command_class(name: str) -> type[Command]:
    """The class of a command of `COMMANDS`; imports its module."""
    module, _, kind = COMMANDS[name][0].partition(":")
    found: type[Command] = getattr(import_module(f"simcse_jax.commands.{module}"), kind)
    return found


def _chosen(argv: list[str]) -> str | None:
    """The command that the arguments begin with; None where an option stands there, or half of a command's name.

    Raises:
      InputError: an unknown command.
    """
    firsts = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    if not argv or argv[0].startswith("-"):
        return None
    if argv[0] not in GROUPS:
        return _known(argv[0], firsts)
    seconds = [name.split()[1] for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    if len(argv) < 2 or argv[1].startswith("-"):
        return None
    return f"{argv[0]} {_known(argv[1], seconds, argv[0])}"


def _known(word: str, words: Sequence[str], group: str = "") -> str:
    if word in words:
        return word
    others = {} if group else _OTHER_NAMES | {name.split()[-1]: name for name in COMMANDS if " " in name}
    command = f"simcse-jax {group}".strip()
    guess = did_you_mean(word, [*words, *others.values()], others)
    raise InputError(f"'{command}' has no command '{word}': {guess}Its commands are {', '.join(words)}")


def _program(group: str = "", detailed: bool = False) -> Any:
    """What tyro shows where no command is chosen: the program, or a group of commands.

    Args:
      group: the group.
      detailed: whether commands have their options, not a line of help alone.
    """
    members: dict[str, list[Any]] = {}
    for name, (_, about) in COMMANDS.items():
        first, _, last = name.partition(" ")
        kind = command_class(name) if detailed else make_dataclass("Brief", [], namespace={"__doc__": about})
        members.setdefault(first, []).append(Annotated[kind, tyro.conf.subcommand(last or first)])
    if group:
        return _union(members[group])
    for name, about in GROUPS.items():
        members[name] = [Annotated[_union(members[name]), tyro.conf.subcommand(name, description=about)]]
    commands: Any = Annotated[_union([kind for kinds in members.values() for kind in kinds]), tyro.conf.arg(name="")]
    flag: Any = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Print the version, and end.")]
    return make_dataclass("Program", [("command", commands), ("version", flag, False)], bases=(Command,), frozen=True)


def _union(kinds: list[Any]) -> Any:
    union = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    return union


def _end(words: list[str]) -> NoReturn:
    """Prints help, or a shell's script that completes options, or that a command lacks, and ends the program."""
    group = words[0] if words and words[0] in GROUPS else ""
    rest = words[1:] if group else words
    if "tcsh" in rest and rest[0].startswith("--tyro-"):  # which needs one more package
        raise InputError("completion is written for bash, zsh and fish; got tcsh")
    program = _program(group, detailed=bool(rest) and rest[0].startswith("--tyro-"))
    with pairs_of_values():
        tyro.cli(
            program,
            prog=f"simcse-jax {group}".strip(),
            description=GROUPS.get(group, __doc__),
            args=rest or ["--help"],
        )
    raise InputError("name the command first: simcse-jax COMMAND ..., and then its options")


def parse(argv: list[str]) -> Command:
    """The command that the arguments name, with its settings, ready to `run`.

    Raises:
      InputError: an unknown command or option, or a config that cannot be used. (Where tyro refuses the arguments, it
        ends the program with a message of its own, as it does after help.)
    """
    words = [word for word in argv if word not in _ANYWHERE]
    chosen = _chosen(words)
    if chosen is None:
        _end(words)
    kind, rest = command_class(chosen), words[len(chosen.split()) :]
    preset: dict[str, Any] = {}
    check_options(chosen, kind, rest)
    if issubclass(kind, Configured) and rest and not rest[0].startswith("-"):
        preset = {"default": kind.from_file(rest[0])}
    anywhere = [word for word in _ANYWHERE if word in argv]
    with pairs_of_values():
        parsed: tuple[Command, list[str]] = tyro.cli(
            kind, prog=f"simcse-jax {chosen}", args=anywhere + rest, return_unknown_args=True, **preset
        )
    command, left = parsed
    if left:
        raise InputError(
            f"{chosen} takes no argument '{left[0]}': {usage(chosen, kind)} [OPTIONS], where options begin with --"
        )
    if isinstance(command, Configured) and not preset:
        raise InputError(f"give the config file right after {chosen}: simcse-jax {chosen} {command.config_file} ...")
    return command


def _telling(quiet: bool, verbose: bool) -> AbstractContextManager[None]:
    """The block of a command, which tells what it does.

    Raises:
      InputError: both were asked for.
    """
    if quiet and verbose:
        raise InputError("--quiet and --verbose were both given: leave one out")
    if quiet:
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    if verbose:
        os.environ["JAX_LOG_COMPILES"] = "1"
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    return telling(quiet)


def program(argv: list[str] | None = None) -> None:
    """`simcse-jax`: `main`, and after an error an end within seconds.

    Where a disk fails, orbax leaves threads that wait five minutes for each other, and Python would wait for them.
    """
    try:
        main(argv)
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        if status:
            threading.Thread(target=_leave, args=(status,), daemon=True).start()
        raise


def _leave(status: int) -> None:
    time.sleep(_PATIENCE)
    for file in (sys.stdout, sys.stderr):
        with suppress(Exception):
            file.flush()
    os._exit(status)


def main(argv: list[str] | None = None) -> None:
    """Runs a command. Bad input gives an error on stderr and exit status 2; with --debug, a traceback.

    No text ends a command because the terminal cannot print it: `?` stands for each character that it lacks.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed (`>&-`); the next file to be opened must not take its number
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        if "--version" in argv[:2] or argv[:1] == ["-V"]:
            print(f"simcse-jax {version('simcse-jax')}", flush=True)
            return
        command = parse(argv)
        allow_open_files()
        with _telling("--quiet" in argv, "--verbose" in argv):
            if "--no-verify" in argv:
                from simcse_jax.storage.manifest import VERIFY

                os.environ[VERIFY] = "0"
            if command.keeps_programs:
                from simcse_jax.runtime.compilation_cache import keep_programs

                keep_programs()
            command.run()
        sys.stdout.flush()
    except InputError as error:
        if debug:
            raise
        print(f"simcse-jax: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader, `head` say, has closed the pipe
        discard(sys.stdout)  # Python still flushes it at exit
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:  # of a file that nothing has checked
        if debug or not (error.filename or room(error)):
            raise
        advice = "check that it exists, that you may read it and, where it is an output, that you may write there"
        if error.filename is None:  # of a file that is open: the system does not say which
            with suppress(OSError):
                sys.stdout.flush()
            discard(sys.stdout)  # Python still flushes it at exit
        file, advice = (error.filename, advice) if error.filename else ("stdout, or another output,", room(error))
        print(
            f"simcse-jax: error: {file} cannot be used ({reason(error)}): {advice}; --debug shows more", file=sys.stderr
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if debug:
            raise
        print("simcse-jax: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
