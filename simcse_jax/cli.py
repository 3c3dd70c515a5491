"""Train sentence encoders with SimCSE, score them, encode with them, and export them to PyTorch."""

import os
import signal
import sys
from typing import Annotated, Any

import tyro

from simcse_jax.ablation import Ablation
from simcse_jax.commands.ablate import Ablate
from simcse_jax.commands.analyze import Analyze
from simcse_jax.commands.data import Inspect, Nli
from simcse_jax.commands.encode import Encode
from simcse_jax.commands.evaluate import Evaluate
from simcse_jax.commands.export import Export
from simcse_jax.commands.options import pairs_of_values
from simcse_jax.commands.plan import Plan, PlanConfig
from simcse_jax.commands.postprocess import Postprocess
from simcse_jax.commands.replace_words import ReplaceWords
from simcse_jax.commands.search import Search
from simcse_jax.commands.serve import Serve
from simcse_jax.commands.study import Study
from simcse_jax.commands.train import Train
from simcse_jax.commands.vocabulary import Vocabulary
from simcse_jax.config import load_config_file, load_variable
from simcse_jax.errors import InputError
from simcse_jax.programs import keep_programs
from simcse_jax.study import Study as StudySettings

Configured = Train | Plan | Study | Ablate | Inspect
"""The commands that a config file comes right after."""


def _command(preset: Configured | None) -> Any:
    """The commands as one type, for tyro; the settings of a named config are the defaults that options override."""

    def command(kind: type, name: str) -> Any:
        return tyro.conf.subcommand(name, default=preset) if isinstance(preset, kind) else tyro.conf.subcommand(name)

    return (
        Annotated[Train, command(Train, "train")]
        | Annotated[Plan, command(Plan, "plan")]
        | Annotated[Study, command(Study, "study")]
        | Annotated[Ablate, command(Ablate, "ablate")]
        | Annotated[
            Annotated[Inspect, command(Inspect, "inspect")] | Annotated[Nli, tyro.conf.subcommand("nli")],
            tyro.conf.subcommand("data", description="Look at training text, and make some."),
        ]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Encode, tyro.conf.subcommand("encode")]
        | Annotated[Search, tyro.conf.subcommand("search")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Analyze, tyro.conf.subcommand("analyze")]
        | Annotated[Postprocess, tyro.conf.subcommand("postprocess")]
        | Annotated[Vocabulary, tyro.conf.subcommand("vocabulary")]
        | Annotated[ReplaceWords, tyro.conf.subcommand("replace-words")]
        | Annotated[Serve, tyro.conf.subcommand("serve")]
    )


def _preset(argv: list[str]) -> Configured | None:
    """The command with the settings of the config file that stands right after its name, if one does."""
    if argv[:2] == ["data", "inspect"]:
        argv = argv[1:]
    if len(argv) < 2 or argv[1].startswith("-"):
        return None
    name, file = argv[:2]
    if name == "train":
        return Train(file, load_config_file(file))
    if name == "inspect":
        return Inspect(file, config=load_config_file(file))
    if name == "plan":
        return Plan(file, config=PlanConfig.of(load_config_file(file)))
    if name == "study":
        return Study(file, load_variable(file, "study", StudySettings))
    return Ablate(file, load_variable(file, "ablation", Ablation)) if name == "ablate" else None


def parse(argv: list[str]) -> Any:
    """The command that arguments name, with its settings, ready to `run`.

    Raises:
      InputError: a config that cannot be used. (What tyro refuses ends the program, with its own message.)
    """
    preset = _preset(argv)
    with pairs_of_values():
        command = tyro.cli(_command(preset), prog="simcse-jax", description=__doc__, args=argv)
    if isinstance(command, Configured) and preset is None:
        name = "data inspect" if isinstance(command, Inspect) else type(command).__name__.lower()
        raise InputError(f"give the config file right after {name}: simcse-jax {name} {command.config_file} ...")
    return command


def main(argv: list[str] | None = None) -> None:
    """Runs a command; bad input is one line on stderr and exit status 2."""
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
        if not isinstance(command, Plan):  # which says how long compiling takes
            keep_programs()
        command.run()
    except InputError as error:
        print(f"simcse-jax: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # whoever reads, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        print("simcse-jax: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
