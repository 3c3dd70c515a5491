"""One case: a folder, a fault, and the judgement of what follows."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.torture.kinds import IDENTICAL, NAMED, REFUSED, Fault
from tests.torture.process import Done, Process
from tests.torture.world import OUTPUTS, TRAIN, World, digests, read_result

_NAMES = {
    "best": r"the best checkpoint, of step",
    "before": r"scores before training are lost",
    "log": r"metrics\.jsonl is damaged: its lines up to step .* were changed",
    "lines": r"metrics\.jsonl(: lines that cannot be read| is damaged)",
    "reading": r"is not whole|is damaged|results\.json has none yet",
}
"""What a command must have said where its result differs in this."""
_TRACES = re.compile(
    r"Traceback \(most recent|Exception ignored|Fatal Python error|terminate called|core dumped|Check failed"
)
_ERROR = re.compile(r"^simcse-jax: (?:error|training diverged): \S", re.MULTILINE)


class Case:
    """A folder that a kind of fault works in."""

    def __init__(self, world: World, folder: Path, seed: str) -> None:
        self.world, self.folder, self.rng = world, folder, random.Random(seed)
        self.run = "run"
        """The run folder below `folder`."""
        self.place = ""
        """Where or when the fault hits, for the record."""
        self.commands: list[str] = []
        """Each command with its exit status, for the record."""
        self.figures = self.rng.random() < 0.2
        self.processes: list[Process] = []

    def fill(self, template: str) -> None:
        """Begins with the copy of a template, see `make_world`."""
        shutil.copytree(self.world.folder / template, self.folder, symlinks=True, dirs_exist_ok=True)

    def start(self, words: tuple[str, ...] = TRAIN, **settings: Any) -> Process:
        """Starts a command, see `World.process`."""
        if words[0] == "train" and self.run != "run":
            words = (*words, "--output", self.run)
        process = self.world.process(words, self.folder, **{"figures": self.figures, **settings})
        self.processes.append(process)
        return process

    def finish(self, process: Process) -> Done:
        """Waits for a command, and looks for what no command may leave.

        Raises:
          Fault: a hang, or a traceback.
        """
        done = process.finish()
        self.commands.append(f"{done.words[0]} → {done.code}")
        if _TRACES.search(done.text):
            raise Fault(f"traceback from {done.words[0]} (status {done.code}): {done.text[-2500:]}")
        if done.code < 0 and -done.code not in (1, 2, 9, 15):
            raise Fault(f"{done.words[0]} was ended by signal {-done.code}: {done.text[-1500:]}")
        return done

    def do(self, words: tuple[str, ...] = TRAIN, **settings: Any) -> Done:
        """Runs a command to its end."""
        return self.finish(self.start(words, **settings))

    def differences(self, done: Done, words: tuple[str, ...], template: str) -> dict[str, str]:
        """In what the result of a command differs from that of an undisturbed one."""
        if words[0] == "train" and template != "whole":
            found = self.world.outcome(self.folder, self.run)
            final = self.world.final
            differing = {x: _first_difference(found[x], final[x]) for x in final if found[x] != final[x]}
            if "log" in differing and _is_part(found["log"], final["log"]):
                differing["lines"] = differing.pop("log")
            if "results" in differing:
                for name, fields in {"best": {"best_step", "dev", "after"}, "before": {"before"}}.items():
                    if all(found["results"].get(x) == y for x, y in final["results"].items() if x not in fields):
                        differing[name] = differing.pop("results")
                        break
            return differing
        expected, got = self.world.reading(template, words), read_result(done, self.folder)
        return {} if got == expected else {"reading": _first_difference(got, expected)}

    def judge(
        self,
        done: Done,
        undo: Callable[[], Any] | None = None,
        before: dict[str, str] | None = None,
        template: str = "",
        **settings: Any,
    ) -> str:
        """The outcome of a command that a fault has hit.

        Args:
          done: the command.
          undo: takes the fault away, after which the same command must end as without it.
          before: the digests of the folder, where an error must leave all as it was.
          template: what the command was run on, where it does not train.
          settings: of the same command, see `World.process`.

        Raises:
          Fault: none of the outcomes that are promised.
        """
        if done.code == 0:
            differing = self.differences(done, done.words, template)
            for name, what in differing.items():
                if name not in _NAMES or not re.search(_NAMES[name], done.text):
                    raise Fault(f"silent: {name} differs ({what}); said: {done.text[-1500:]}")
            if before is not None and (done.words[0] != "train" or template == "whole"):
                self.unchanged(before)
            return NAMED if differing else IDENTICAL
        check_error(done)
        if before is not None:
            self.unchanged(before)
        if undo is None:
            raise Fault(f"refused: {done.err[-1500:]}")
        undo()
        again = self.do(done.words if done.words[0] != "train" else TRAIN, **settings)
        if again.code:
            raise Fault(f"refused again once the fault was mended: {again.err[-1500:]}")
        if differing := self.differences(again, done.words, template):
            raise Fault(f"after the mend: {differing}")
        return REFUSED

    def unchanged(self, before: dict[str, str]) -> None:
        """Raises `Fault` where files that were there are gone or changed."""
        after = self.snapshot()
        changed = [name for name, digest in before.items() if after.get(name) != digest]
        if changed:
            raise Fault(f"lost or changed: {', '.join(changed[:5])}")

    def snapshot(self) -> dict[str, str]:
        """The digests of all files of the case, but for what any command may change: a lock, programs, figures."""
        aside = ("home/", "tmp/", "programs/", *OUTPUTS)
        found = digests(self.folder)
        return {n: d for n, d in found.items() if not (n.startswith(aside) or n.endswith(".lock") or "/figures/" in n)}

    def ends_identical(self, **settings: Any) -> str:
        """Runs the training command to its end."""
        return self.judge(self.do(**settings))


def check_error(done: Done) -> None:
    """Raises `Fault` unless a command has ended with one error in the package's form."""
    if done.code not in (1, 2):
        raise Fault(f"status {done.code} of {done.words[0]}: {done.text[-1500:]}")
    if len(_ERROR.findall(done.err)) != 1:
        raise Fault(f"{len(_ERROR.findall(done.err))} errors of {done.words[0]}: {done.text[-1500:]}")


def _is_part(lines: list[Any], whole: list[Any]) -> bool:
    """Whether lines are some of others, in the same order."""
    rest = iter(whole)
    return all(any(line == other for other in rest) for line in lines)


def _first_difference(a: Any, b: Any, name: str = "") -> str:
    """The first place where two values differ, in words."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*b, *(key for key in a if key not in b)]:
            if key not in a or key not in b:
                return f"{name}/{key} is only in {'the expected' if key in b else 'this'}"
            if a[key] != b[key]:
                return _first_difference(a[key], b[key], f"{name}/{key}")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                return _first_difference(x, y, f"{name}/{number}")
    if isinstance(a, list) and isinstance(b, list):
        return f"{name} has {len(a)} entries, not {len(b)}"
    return f"{name}: {str(a)[:200]}, not {str(b)[:200]}"
