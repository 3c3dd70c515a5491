"""The power of the tests: small faults put into the code one at a time, each run against the tests of its subject.

`python -m tests.mutants --output results.json` runs the mutants of tests/mutants.json and prints which test kills each.
A second call goes on where the first one ended. `--draw` draws the mutants again from the areas that the file names.
"""

import argparse
import ast
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

ROOT = Path(__file__).parents[1]
MUTANTS = ROOT / "tests" / "mutants.json"
COPIED = ("simcse_jax", "configs", "tests", "benchmarks", "docs", "examples", "launch", ".ci", "[!.]*.*")
COPIED += ("Makefile", "LICENSE")
LOCK = Lock()

OPERATORS: dict[type, tuple[str, str]] = {
    **{ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")},
    **{ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is")},
    **{ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.And: ("and", "or"), ast.Or: ("or", "and")},
    **{ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.Pow: ("**", "*")},
    **{ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*")},
}
NAMES = {"min": "max", "any": "all", "sum": "mean", "minimum": "maximum", "zeros": "ones", "cumsum": "cumprod"}
NAMES |= {after: before for before, after in NAMES.items()} | {"sorted": "list"}
KEYS = ("function", "line", "occurrence", "becomes")


def blocks(node: ast.AST, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every function and class below a node by its qualified name, and the node itself by the name given."""
    yield name, node
    inner = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
    while inner:
        child = inner.pop(0)
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield from blocks(child, f"{name}.{child.name}".lstrip("."))
        else:
            inner[:0] = [x for x in ast.iter_child_nodes(child) if not isinstance(x, ast.expr)]


def edits(node: Any) -> Iterator[tuple[Any, Any, str, str]]:
    """The faults of one node: between which nodes, the text there and the text instead; all of a node where empty."""
    match node:
        case ast.Compare(ops=[op], comparators=[right]):
            yield node.left, right, *OPERATORS[type(op)]
        case ast.BinOp(right=ast.Constant(value=str()) | ast.JoinedStr()) | ast.BinOp(left=ast.List()):
            return  # paths and texts
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            yield node.left, node.right, *OPERATORS[type(op)]
        case ast.BoolOp(op=op):
            yield node.values[0], node.values[1], *OPERATORS[type(op)]
        case ast.AugAssign(op=op) if type(op) in OPERATORS:
            before, after = OPERATORS[type(op)]
            yield node.target, node.value, f"{before}=", f"{after}="
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node, node, "", ast.unparse(node.operand)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.UnaryOp):
            yield test, test, "", f"not ({ast.unparse(test)})"
        case ast.Constant(value=bool() as value):
            yield node, node, "", str(not value)
        case ast.Constant(value=int() | float() as value):
            yield node, node, "", repr(value + 1 if isinstance(value, int) else 2 * value or 1.0)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name) as function) if name in NAMES:
            if not (isinstance(function, ast.Name) and name == "sum"):
                yield function, function, "", ast.unparse(function)[: -len(name)] + NAMES[name]
        case ast.Return(value=ast.Tuple(elts=[a, b, *_])):
            yield a, b, "", f"{ast.unparse(b)}, {ast.unparse(a)}"


def left_out(node: Any, parent: Any) -> bool:
    """Whether a part of the code gets no faults: annotations, decorators, texts, messages and assertions."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.arg | ast.Import | ast.ImportFrom):
        return True
    places = [getattr(parent, "annotation", None), getattr(parent, "returns", None)]
    return any(node is x for x in [*places, *getattr(parent, "decorator_list", [])])


def faults(path: Path) -> Iterator[dict[str, Any]]:
    """Every fault of a file: the function, its line before, which of its equal lines that is, and the line after."""
    text = path.read_text()
    lines = text.splitlines()

    def walk(node: Any, name: str, start: int) -> Iterator[dict[str, Any]]:
        for a, b, before, after in edits(node):
            line = lines[a.lineno - 1]
            if a.lineno != b.end_lineno:
                continue
            first, last = (a.end_col_offset, b.col_offset) if before else (a.col_offset, b.end_col_offset)
            head, part, tail = (line.encode()[i:j].decode() for i, j in ((0, first), (first, last), (last, None)))
            became = head + (part.replace(before, after, 1) if before else after) + tail
            above = [x.strip() for x in lines[start : a.lineno]]
            fault = dict(zip(KEYS, (name, above[-1], above.count(above[-1]), became.strip()), strict=True))
            if became != line:
                yield fault
        children: Iterator[Any] = ast.iter_child_nodes(node)
        for child in children:
            if not left_out(child, node):
                inner = isinstance(child, ast.FunctionDef | ast.ClassDef)
                deeper = f"{name}.{child.name}".lstrip(".") if inner else name
                yield from walk(child, deeper, child.lineno - 1 if inner else start)

    yield from walk(ast.parse(text), "", 0)


def place(fault: dict[str, Any], package: Path) -> tuple[Path, int]:
    """The file and the row of a fault, wherever its function stands now.

    Raises:
      LookupError: no function or more than one of that name holds the line.
    """
    found = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        lines = text.splitlines()
        for name, node in blocks(ast.parse(text)):
            if name == fault["function"]:
                first, last = (node.lineno - 1, node.end_lineno) if name else (0, len(lines))
                rows = [row for row in range(first, last) if lines[row].strip() == fault["line"]]
                found += [(path, row) for row in rows[fault["occurrence"] - 1 : fault["occurrence"]]]
    if len(found) != 1:
        raise LookupError(
            f"mutant {fault.get('id')}: {len(found)} functions {fault['function']} hold {fault['line']!r}"
        )
    return found[0]


def draw(areas: list[dict[str, Any]], equivalent: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Mutants drawn from the areas: first a function, then one of its faults, each function once while there are more.

    Args:
      areas: for each the number of `mutants`, and `files`: the tests of each file or pattern of files.
      equivalent: faults that change no result, each with its `reason`; they are passed over.
      seed: seed of the draws.
    """
    drawn: list[dict[str, Any]] = []
    taken = [[fault[key] for key in KEYS] for fault in equivalent]
    for number, area in enumerate(areas):
        rng = random.Random(f"{seed} {number}")
        by_function: dict[tuple[str, str], list[dict[str, Any]]] = {}
        tests_of: dict[Path, list[str]] = {}
        for pattern, tests in area["files"].items():
            for path in sorted((ROOT / "simcse_jax").glob(pattern)):
                tests_of.setdefault(path, tests.split())
        for path, tests in sorted(tests_of.items()):
            for fault in faults(path):
                by_function.setdefault((path.name, fault["function"]), []).append(fault | {"tests": tests})
        functions, end = rng.sample(sorted(by_function), len(by_function)), len(drawn) + area["mutants"]
        while len(drawn) < end:
            functions.append(function := functions.pop(0))
            fault = rng.choice(by_function[function])
            if [fault[key] for key in KEYS] not in taken:
                place(fault, ROOT / "simcse_jax")
                taken.append([fault[key] for key in KEYS])
                drawn.append({"id": len(drawn) + 1} | fault)
    return drawn


def pytest(folder: Path, arguments: list[str], limit: float) -> tuple[str, str]:
    """Runs pytest in a folder: "passed", "failed" or "timeout", and the first test that failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    # One test that hangs ends the run; the others have ten times its limit together.
    command += ["-o", f"faulthandler_timeout={limit}", "-o", "faulthandler_exit_on_timeout=true"]
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    environment = os.environ | {"PYTHONPATH": str(folder), "JAX_COMPILATION_CACHE_DIR": cache}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(10 * limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.M)
    if code in (-signal.SIGTERM, -signal.SIGINT):
        raise KeyboardInterrupt(f"pytest was ended by signal {-code}")
    if code in (0, 5):  # 5: the marks leave no test
        return "passed", ""
    hung = code is None or (not failed and "Timeout (" in text)
    return "timeout" if hung else "failed", failed[1] if failed else text[-200:]


def judge(
    mutant: dict[str, Any], folder: Path, options: argparse.Namespace, found: dict[str, Any], note: Callable[[], None]
) -> None:
    """Runs the tests of one mutant in a copy of the repository, file by file up to the first that fails.

    Args:
      mutant: the mutant.
      folder: the copy.
      options: of the command.
      found: what earlier calls found, which is brought up to date: the `state` (killed, timeout, survived, or
        undecided), the test that it is killed `by`, the files that `passed` and the `seconds`.
      note: is called after each file.
    """
    path, row = place(mutant, folder / "simcse_jax")
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    lines[row] = lines[row].replace(mutant["line"], mutant["becomes"])
    path.write_text("".join(lines))
    try:
        for file in mutant["tests"]:
            if file in [*found["passed"], *options.without]:
                continue
            forget(path)
            begin = time.monotonic()
            marks = ["-m", options.marks] if options.marks else []
            outcome, by = pytest(folder, [f"tests/test_{file}.py", *marks], options.limit)
            found["seconds"] += round(time.monotonic() - begin)
            if outcome != "passed":
                found |= {"state": "killed" if outcome == "failed" else outcome, "by": by or file}
                return
            found["passed"].append(file)
            note()
        if set(found["passed"]) >= set(mutant["tests"]):
            found["state"] = "survived"
    finally:
        path.write_text(text)
        forget(path)
        note()


def copied(folder: Path) -> Path:
    """A copy of what the tests need of the repository."""
    folder.mkdir()
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copy(path, folder)
    return folder


def forget(path: Path) -> None:
    """Removes what Python compiled of a file: it tells versions apart by size and whole seconds."""
    for kept in path.parent.glob(f"__pycache__/{path.stem}.*"):
        kept.unlink()


def state_of(mutant: dict[str, Any], results: dict[str, Any]) -> str:
    """The state of a mutant by the results so far."""
    return str(results.get(str(mutant["id"]), {}).get("state", "undecided"))


def table(mutants: list[dict[str, Any]], results: dict[str, Any]) -> str:
    """One row per mutant, and the sum."""
    rows = ["| mutant | function | line after | state | by |", "|---|---|---|---|---|"]
    for mutant in mutants:
        found = results.get(str(mutant["id"]), {})
        cells = (
            mutant["function"] or "module",
            f"`{mutant['becomes']}`",
            state_of(mutant, results),
            found.get("by", ""),
        )
        rows.append(" | ".join([f"| {mutant['id']}", *(cell.replace("|", "\\|") for cell in cells)]) + " |")
    states = [state_of(mutant, results) for mutant in mutants]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("killed", "timeout", "survived", "undecided"))
    return "\n".join([*rows, "", f"{len(mutants)} mutants: {counts}"])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="results, as JSON; mutants that it holds are not run again")
    parser.add_argument("--marks", default="", help='only tests of these marks, e.g. "not release"')
    parser.add_argument("--without", default=[], nargs="+", help="files of tests to leave out at first, as in mlm")
    parser.add_argument("--only", type=int, nargs="+", help="only these mutants")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--limit", type=float, default=600, help="seconds per test; a mutant over it counts as killed")
    parser.add_argument("--check", action="store_true", help="run the tests that killed mutants on the code unchanged")
    parser.add_argument("--draw", action="store_true", help="draw the mutants anew")
    options = parser.parse_args()
    book = json.loads(MUTANTS.read_text())
    if options.draw:
        book["mutants"] = draw(book["areas"], book["equivalent"], book["seed"])
        MUTANTS.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n")
        return
    mutants = [m for m in book["mutants"] if not options.only or m["id"] in options.only]
    output: Path | None = options.output
    results = json.loads(output.read_text()) if output and output.exists() else {}
    lost = []
    for mutant in mutants:
        results.setdefault(str(mutant["id"]), {"state": "undecided", "by": "", "passed": [], "seconds": 0})
        try:
            place(mutant, ROOT / "simcse_jax")
        except LookupError as error:
            lost.append(str(error))
    if lost:
        sys.exit("\n".join([*lost, f"Give these mutants in {MUTANTS} the functions and lines of now."]))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        folders: SimpleQueue[Path] = SimpleQueue()
        for job in range(options.jobs):
            folders.put(copied(Path(scratch) / str(job)))

        def note() -> None:
            with LOCK:
                if output:
                    output.write_text(json.dumps(results, indent=1) + "\n")

        def run(mutant: dict[str, Any]) -> None:
            folder = folders.get()
            found = results[str(mutant["id"])]
            judge(mutant, folder, options, found, note)
            folders.put(folder)
            print(mutant["id"], *(found[key] for key in ("state", "seconds", "by")), flush=True)

        list(pool.map(run, [m for m in mutants if state_of(m, results) == "undecided"]))
        if options.check:
            tests = {found["by"] for found in results.values() if found["state"] == "killed" and "::" in found["by"]}
            print("on the code unchanged:", *pytest(folders.get(), sorted(tests), options.limit))
    print(table(mutants, results))


if __name__ == "__main__":
    main()
