"""The run of a study: cell by cell, each trained and measured once.

study.json                the settings, the fingerprint of the training text, and digests of the dev and test pairs
initial.json              test scores before training
reference.npz             the frozen model's vectors of the sentences whose false negatives are counted
cells/<name>/             the run folder of a cell
cells/<name>/cell.json    its measures: there once the cell is done
study.csv, report.md, *.png, *.svg
"""

import shutil
from pathlib import Path
from typing import Any

import jax

from simcse_jax.config.values import check_types, field_value, from_dict, to_dict
from simcse_jax.errors import InputError, reason
from simcse_jax.reports.progress import say
from simcse_jax.runs.folder import check_outside_runs
from simcse_jax.storage.files import (
    check_new_folder,
    check_readable,
    check_writable_folder,
    finite,
    write_json,
    writing,
)
from simcse_jax.storage.records import read_record
from simcse_jax.study.grid import Cell, Settings, Study, changes
from simcse_jax.study.measure import Measures, Meter
from simcse_jax.study.report import write_report
from simcse_jax.training.contents import digests_of
from simcse_jax.training.job import joined
from simcse_jax.training.scores import load_tasks
from simcse_jax.training.trainer import TrainingDiverged, train


def run_study(study: Study) -> dict[str, Any]:
    """Trains and measures the cells that are not done yet, and writes table, figures and report.

    Returns:
      `{"cells": n, "report": path}`; or `{"stopped": name of the cell, "done": n}` when a signal ended it early.

    Raises:
      InputError: see `prepare`; also a study folder made with other settings or from other text.
    """
    study.validate()
    with joined(study.base):
        return _run(study)


def _run(study: Study) -> dict[str, Any]:
    folder = study.folder
    held = _check_folder(study)
    cells = study.cells()
    done = {cell: measures for cell in cells if (measures := _read(study, cell)) is not None}
    if len(done) < len(cells) or not (folder / "initial.json").is_file():
        _echo(f"study     {len(cells)} cells, {len(done)} of them done, in {folder}")
        meters: dict[Settings, Meter] = {(): Meter(study, study.base)}
        meter = meters[()]
        contents = digests_of(load_tasks(study.base.evaluation))
        if held is not None:
            _check_made_from(study, held, meter.tokens.fingerprint, contents)
        _make_folder(folder)
        about = {"study": to_dict(study), "data_fingerprint": meter.tokens.fingerprint, "contents": contents}
        _save(folder / "study.json", about)
        if not (folder / "initial.json").is_file():
            _save(folder / "initial.json", meter.initial_scores())
        for number, cell in enumerate(cells, 1):
            if cell not in done:
                _echo(f"cell      {number} of {len(cells)}: {cell.name}")
                key = study.key(cell)
                if key not in meters:
                    meters[key] = Meter(study, study.base_of(cell))
                measures = _run_cell(study, cell, meters[key])
                if measures is None:
                    return {"stopped": cell.name, "done": len(done)}
                done[cell] = measures
    elif held is not None:
        _save(folder / "study.json", held | {"study": to_dict(study)})
    for cell in cells if not study.keep_checkpoints else []:
        _drop_checkpoints(study, cell)
    if jax.process_index() == 0:
        write_report(study, done, _object(folder / "initial.json"))
    return {"cells": len(cells), "report": str(folder / "report.md")}


def _run_cell(study: Study, cell: Cell, meter: Meter) -> Measures | None:
    """Trains and measures a cell; None where a signal stopped it."""
    try:
        results = train(study.config(cell))
    except TrainingDiverged as error:
        _echo(f"{cell.name} diverged: {error}")
        measures: Measures = {"diverged": str(error)}
    else:
        if "stopped" in results:
            return None
        measures = finite(meter(cell, results))
    _save(study.cell_folder(cell) / "cell.json", measures)
    if not study.keep_checkpoints:
        _drop_checkpoints(study, cell)
    return measures


def _check_folder(study: Study) -> dict[str, Any] | None:
    """The content of study.json in the folder; None without a study.

    Raises:
      InputError: the folder holds a study with other settings, or something else, or cannot be made.
    """
    folder, file = study.folder, study.folder / "study.json"
    check_readable(folder)
    if not file.is_file():
        check_new_folder(folder, "a study")
        check_outside_runs(folder)
        return None
    check_writable_folder(folder)
    about = _object(file)
    try:
        before, _ = from_dict(Study, about["study"]), about["data_fingerprint"]
        check_types(before)
        dict(about.get("contents", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not a study's settings ({reason(error)})") from error
    if changed := changes(before, study):
        shown = "; ".join(f"{n} was {field_value(before, n)!r}, is {field_value(study, n)!r}" for n in changed)
        raise InputError(
            f"{folder} is a study with other settings ({shown}): give the same or another --output; "
            "only batch_sizes, rules, seeds and factors may be extended"
        )
    return about


def _check_made_from(study: Study, held: dict[str, Any], fingerprint: str, contents: dict[str, Any]) -> None:
    """Raises `InputError` if the cells to come would be of another text, or scored on other pairs, than those done."""
    if held["data_fingerprint"] != fingerprint:
        raise InputError(
            f"{study.folder} was made from other text than {study.base.data.train} now holds: choose another --output"
        )
    # Studies of earlier versions have no digests.
    for name, digest in held.get("contents", {}).items():
        if contents[name] != digest:
            raise InputError(
                f"{study.folder} was scored on other pairs than {name} names now: give the earlier pairs, or choose "
                "another --output"
            )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {folder} cannot be made ({reason(error)}): choose another --output") from error


def _read(study: Study, cell: Cell) -> Measures | None:
    file = study.cell_folder(cell) / "cell.json"
    if not file.is_file():
        return None
    return _object(file)


def _object(file: Path) -> dict[str, Any]:
    """The object in a file that a study wrote."""
    try:
        return dict(read_record(file))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{file} is damaged ({reason(error)}): restore it, or remove it to have it made again"
        ) from error


def _drop_checkpoints(study: Study, cell: Cell) -> None:
    if jax.process_index() == 0:
        shutil.rmtree(study.cell_folder(cell) / "checkpoints", ignore_errors=True)


def _save(file: Path, value: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        with writing(file):
            write_json(file, value)


def _echo(text: str) -> None:
    if jax.process_index() == 0:
        say(text)
