"""The register of the kinds of fault, and the outcomes of a case.

A kind is a function in one of the modules of `PLACES`:

    @kind("SIGKILL")
    def killed(case: Case) -> str:
        case.fill("inputs")                     # a template of `make_world`
        process = case.start()                  # the training command, in a child
        process.wait(lambda: process.seconds > case.rng.random())
        process.send(signal.SIGKILL)
        case.finish(process)                    # no traceback, no hang
        return case.judge(case.do())            # the same command to its end, and its outcome
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.torture.case import Case

IDENTICAL = "identical"
"""The run ended with the bits of the run that no fault has hit: parameters, optimizer, log, scores, settings."""
NAMED = "identical, loss named"
"""The same, but for what the fault destroyed (a best checkpoint, lines of the log), which the command named."""
REFUSED = "one clear error"
"""One error in the package's form, nothing lost; the same command ended identically once the fault was mended."""
FAULT = "FAULT"
"""Anything else: a silent difference, a loss, a hang, a traceback."""
SKIPPED = "skipped"
"""The fault cannot be made on this machine."""
OUTCOMES = (IDENTICAL, NAMED, REFUSED, FAULT, SKIPPED)

PLACES = ("stops", "damages", "changes", "disks", "surroundings", "together")
"""The modules that hold kinds."""


class Fault(Exception):
    """What a fault led to that must not happen."""


class Skipped(Exception):
    """Why a fault cannot be made here."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    """As in the table."""
    apply: Callable[["Case"], str]
    """Runs a case and returns its outcome, or raises `Fault`."""
    weight: float
    """How often the kind is drawn, beside the others."""


KINDS: dict[str, Kind] = {}


def kind(name: str, weight: float = 1) -> Callable[[Callable[["Case"], str]], Callable[["Case"], str]]:
    """Enters a function into the register."""

    def enter(apply: Callable[["Case"], str]) -> Callable[["Case"], str]:
        assert name not in KINDS
        KINDS[name] = Kind(name, apply, weight)
        return apply

    return enter


def load_kinds() -> dict[str, Kind]:
    """All kinds by name, in the order of their modules, whichever was imported first."""
    modules = [import_module(f"tests.torture.{place}").__name__ for place in PLACES]
    return dict(sorted(KINDS.items(), key=lambda item: modules.index(item[1].apply.__module__)))
