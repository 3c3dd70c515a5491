"""What commands say while they work: where it goes, how often, and that it never ends the work."""

import io
import json
import os
import pty
import re
import select
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
from tqdm import tqdm

from simcse_jax import SimCSE
from simcse_jax.cli import COMMANDS, command_class, main
from simcse_jax.commands.options import Command
from simcse_jax.reports.progress import note, progress_bar, say, telling


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def written(monkeypatch: pytest.MonkeyPatch, file: io.StringIO, clock: Clock, steps: int, seconds: float) -> str:
    """What goes to stderr, `file`, during so many steps of so many seconds."""
    monkeypatch.setattr("sys.stderr", file)
    with progress_bar(steps, "sentences", "encoding") as bar:
        bar._time = lambda: clock.now
        for _ in range(steps):
            clock.now += seconds
            bar.update()
    return file.getvalue()


def test_a_pipe_gets_a_line_in_ten_seconds(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    lines = written(monkeypatch, io.StringIO(), clock, 1000, 0.125).splitlines()  # 125 seconds
    assert lines[0] == "encoding: 0 of 1,000 sentences"  # at once: the line before the wait
    assert len(lines) == 13
    assert re.fullmatch(r"encoding: 80 of 1,000 sentences, \d\d:\d\d left", lines[1])
    assert not any(ord(character) < 32 for line in lines for character in line)


def test_a_bar_in_another_moves_no_cursor(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """An evaluation in a run."""
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    with progress_bar(4, "step") as outer:
        written(monkeypatch, file, clock, 2, 20)
        outer.update()
    lines = file.getvalue().splitlines()
    assert [line.partition(",")[0] for line in lines[:3]] == [
        "step 0 of 4",
        "encoding: 0 of 2 sentences",
        "encoding: 1 of 2 sentences",
    ]
    assert not any(ord(character) < 32 for line in lines for character in line)


def test_a_terminal_draws_over_one_line(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    text = written(monkeypatch, Terminal(), clock, 1000, 0.1)
    assert text.count("\n") == 1
    assert text.count("\r") > 50
    assert "encoding: 1,000 of 1,000 sentences" in text


def test_a_terminal_without_a_size_shows_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's, say, whose rows and columns are 0."""
    terminal, end = pty.openpty()
    with os.fdopen(end, "w") as file, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", file)
        with progress_bar(5, "sentences", "encoding") as bar:
            bar.update(5)
        shown = b""
        while select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 10_000)
        assert b"encoding: 5 of 5 sentences" in shown
    os.close(terminal)


def test_a_long_run_writes_few_lines(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    bar = progress_bar(100_000, "step", most_lines=200)
    bar._time = lambda: clock.now
    for step in range(100_000):
        clock.now += 0.25
        bar.set_postfix_str(f"loss {step}", refresh=False)
        bar.update()
    bar.close()
    lines = file.getvalue().splitlines()
    assert 100 < len(lines) <= 203
    assert re.fullmatch(r"step 500 of 100,000, \d+:\d+:\d+ left, loss 499", lines[1])
    assert lines[-1].startswith("step 100,000 of 100,000, 00:00 left")


def test_jupyter_gets_a_widget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tqdm has chosen its widget; elsewhere in a kernel, lines."""
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    with progress_bar(3, "sentences", "encoding"):
        pass
    assert file.getvalue() == "encoding: 0 of 3 sentences\n"

    made: list[dict[str, object]] = []

    class Widget(tqdm):
        __module__ = "tqdm.notebook"

        def __init__(self, **settings: object) -> None:
            made.append(settings)
            super().__init__(disable=True)

    monkeypatch.setattr("tqdm.auto.tqdm", Widget)
    assert isinstance(progress_bar(3, "sentences", "encoding"), Widget)
    assert made[0]["total"] == 3
    assert "file" not in made[0]  # tqdm would take it for a terminal


def test_notes_and_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """A library's caller sees no notes; --quiet leaves nothing, also of what is inside."""
    note("loading")
    assert capsys.readouterr() == ("", "")
    with telling(quiet=False):
        note("loading")
        say("step 3")
        assert capsys.readouterr() == ("step 3\n", "loading\n")
    with telling(quiet=True), telling(quiet=False):
        note("loading")
        say("step 3")
        progress_bar(3, "sentences").close()
    assert capsys.readouterr() == ("", "")


def test_text_that_a_terminal_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, shown in (("ascii", "? ? a\n"), ("latin-1", "? × a\n"), ("utf-8", "τ × a\n")):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw := io.BytesIO(), encoding=encoding))
        say("τ × a")
        assert raw.getvalue().decode(encoding) == shown


def test_a_reader_that_has_gone_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """`simcse-jax train ... | head`: what is said while the work goes on is dropped from then on."""
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as gone, monkeypatch.context() as patch, telling(quiet=False):
            patch.setattr(f"sys.{name}", gone)
            say("step 1")
            note("loading")
            with progress_bar(3, "sentences", "encoding") as bar:
                bar.update()
            print("step 2", flush=True)


def test_a_program_without_a_stderr_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has None there where a service manager, say, has closed it."""
    monkeypatch.setattr("sys.stderr", None)
    monkeypatch.setattr("sys.stdout", None)
    with telling(quiet=False), progress_bar(3, "sentences", "encoding") as bar:
        note("loading")
        say("step 1")
        bar.update()


PAIRS = "sentence1\tsentence2\tscore\na man\ta woman\t3\nthe dog\ta dog\t5\nred house\tnever two\t0\n"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", ["full", "none"])
def test_files_are_written_whatever_is_there_to_print_to(
    kind: str,
    name: str,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A log on a full disk, and a command that was started with `>&-` or `2>&-`."""
    if kind == "full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (pairs := tmp_path / "pairs.tsv").write_text(PAIRS)
    scores = tmp_path / "scores.json"
    command = ["evaluate", str(tiny_bert), "--pooler", "avg", "--tasks", str(pairs), "--json", str(scores)]
    with monkeypatch.context() as patch:
        place = Path("/dev/full").open("w") if kind == "full" else None  # noqa: SIM115
        patch.setattr(f"sys.{name}", place)
        if (kind, name) == ("full", "stdout"):
            with pytest.raises(SystemExit, match="2"):
                main(command)
        else:
            main(command)
        with suppress(OSError):  # of what it still holds
            getattr(sys, name).close()
    shown = capsys.readouterr()
    assert ("Spearman" in shown.out) == (name == "stderr")
    assert ("No space left on device): free space" in shown.err) == ((kind, name) == ("full", "stdout"))
    assert json.loads(scores.read_text())["models"]


@pytest.mark.parametrize("kind", ["ascii", "closed pipe"])
def test_evaluate_writes_its_files_whatever_happens_to_stdout(
    kind: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pairs := tmp_path / "süß τ.tsv").write_text(PAIRS)
    outputs = [tmp_path / f"scores.{kind}" for kind in ("json", "csv", "md")]
    command = ["evaluate", str(tiny_bert), "--pooler", "avg", "--tasks", str(pairs), "--json", str(outputs[0])]
    command += ["--csv", str(outputs[1]), "--markdown", str(outputs[2])]
    if kind == "ascii":
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii"))
        main(command)
        assert b"s?? ?" in raw.getvalue()
    else:
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as gone:
            monkeypatch.setattr("sys.stdout", gone)
            with pytest.raises(SystemExit, match="141"):
                main(command)
    assert json.loads(outputs[0].read_text())["models"]
    assert all(output.is_file() for output in outputs)


def test_quiet_leaves_results_alone(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pairs := tmp_path / "pairs.tsv").write_text(PAIRS)
    command = ["evaluate", str(tiny_bert), "--pooler", "avg", "--tasks", str(pairs)]
    main(command)
    loud = capsys.readouterr()
    assert loud.err.splitlines() == [f"loading {tiny_bert}", "encoding: 0 of 6 sentences"]
    main([*command, "--quiet"])
    assert capsys.readouterr() == (loud.out, "")
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--quiet", "--verbose"])
    assert "--quiet and --verbose were both given" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_quiet_and_verbose(name: str) -> None:
    assert {"quiet", "verbose"} <= set(command_class(name).__dataclass_fields__)
    assert issubclass(command_class(name), Command)


def test_json_of_a_search_is_json_on_every_terminal(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text := tmp_path / "text.txt").write_text("süß τ\n")
    for encoding in ("ascii", "utf-8"):
        monkeypatch.setattr("sys.stdout", file := io.TextIOWrapper(raw := io.BytesIO(), encoding=encoding))
        main(["search", str(tiny_bert), str(text), "τ", "--json", "--pooler", "avg"])
        file.flush()
        assert json.loads(raw.getvalue().decode(encoding))["hits"][0]["sentence"] == "süß τ"


def test_a_model_loads_silently_in_python(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SimCSE(tiny_bert, "avg").encode(["a man"])
    assert capsys.readouterr() == ("", "")
