"""The code and the links in README.md and docs/: where they are, and what is done with them.

Python blocks run, those of a page one after the other in one namespace. Shell blocks are gone through by bash with
every program replaced by one that writes down what it was called with, so that loops, variables and quotes are the
shell's own; each call is then checked as far as it can be without making it (`test_docs.py`). The calls of a block that
begins with ```` ```sh run ```` are also made. Both happen in a folder in which runs/quickstart is a tiny run. What is
left out is listed here, each with its reason.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

NOT_RUN: dict[tuple[str, str], str] = {
    ("docs/evaluate.md", "import mteb"): "asks the hub for data; tests/test_mteb.py runs the same calls",
}
"""Python blocks that do not run: (page, how the block begins) -> why."""

_SYNTAX_ONLY = {
    "a server would have to answer": ("curl",),
    "asks or changes a cluster, a cloud project or a machine": (
        *("gcloud", "gsutil", "kubectl", "docker", "sbatch", "squeue", "scancel", "srun", "nvidia-smi", "ssh-add"),
        "apt-get",
    ),
    "a tool of the shell or of development": (
        *("bash", "cat", "grep", "ls", "mkdir", "sleep", "tail"),
        *("mypy", "pytest", "ruff"),
    ),
    "of TensorBoard, which follows a run": ("tensorboard", "xprof"),
}
SYNTAX_ONLY: dict[str, str] = {program: why for why, programs in _SYNTAX_ONLY.items() for program in programs}
"""Programs that shell blocks call and of which nothing but the shell's syntax is checked -> why."""

OTHER_OPTIONS: dict[str, str] = {
    "--no-deps": "of pip",
    "--compile": "of python -m benchmarks",
    "--quick": "of python -m benchmarks",
    "--cpus-per-task": "of SLURM",
    "--marks": "of python -m tests.mutants",
    "--cases": "of python -m tests.torture",
    "--draws": "of python -m benchmarks noise",
    "--keep": "of python -m tests.torture",
    "--examples": "of python -m benchmarks.lock",
    "--vectors": "of python -m benchmarks.search",
    "--width": "of python -m benchmarks.search",
    "--base.": "how many options of ablate begin",
}
"""Options that the text names and that are none of a command or launch script of ours -> whose they are."""

CHECKED = ("simcse-jax", "python", "python3", "pip", "make")
"""Programs whose arguments are checked, by `test_docs.py`."""

_RECORD = """#!/bin/sh
{ for word in "$0" "$@"; do printf '%s\\0' "$word"; done; printf '\\n'; } > "$CALLS.$$"
/bin/cat "$CALLS.$$" >> "$CALLS"  # in one piece: the programs of a pipe run side by side
"""
_BUILTINS = "cd() { :; }; source() { :; }; "


@dataclass(frozen=True)
class Block:
    """A block of code."""

    page: str
    line: int
    """Of its first line of code, from 1."""
    language: str
    runs: bool
    """Of a shell block: whether its calls are made."""
    text: str

    @property
    def place(self) -> str:
        """What an error names."""
        return f"{self.page}:{self.line}"


def _tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text("utf-8"))


def blocks(page: str) -> list[Block]:
    """The blocks of code of a page; those that are indented have no language."""
    found = []
    for token in _tokens(page):
        if token.type in ("fence", "code_block") and token.map:
            language, *marks = token.info.split() or [""]
            found.append(Block(page, token.map[0] + 2, language, "run" in marks, token.content))
    return found


def inline(page: str, kind: str) -> Iterator[tuple[int, Token]]:
    """Inline tokens of a kind (`link_open`, `code_inline`), each with the column of the table it is in, else 0."""
    column = 0
    for token in _tokens(page):
        if token.type == "tr_open":
            column = 0
        elif token.type in ("td_close", "th_close"):
            column += 1
        elif token.type == "inline":
            yield from ((column, child) for child in token.children or [] if child.type == kind)


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    tokens = _tokens(page)
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def calls(block: Block, folder: Path) -> list[list[str]]:
    """The programs that a shell block calls with their arguments, in order; none of them runs.

    Args:
      block: the block.
      folder: a folder to work in, where the stand-ins are put.
    """
    programs, log = folder / ".programs", folder / ".calls"
    launchers = [folder / path.relative_to(ROOT) for path in (ROOT / "launch").iterdir() if path.is_file()]
    for path in [*(programs / name for name in (*CHECKED, *SYNTAX_ONLY)), *launchers]:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_RECORD)
            path.chmod(0o755)
    log.write_text("")
    environment = {"PATH": str(programs), "CALLS": str(log), "SIMCSE_DATA": "data", "HOME": str(folder)}
    command = ["/bin/bash", "-e", "-c", _BUILTINS + block.text]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"{block.place}: {done.stderr}"
    called = [line.split("\0") for line in log.read_text("utf-8").split("\0\n") if line]
    return [[program.removeprefix(f"{programs}/"), *words] for program, *words in called]
