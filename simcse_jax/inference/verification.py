"""What is whole of a folder that this package wrote, what made it, and whether that can be repeated here."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from simcse_jax.config.values import field_value
from simcse_jax.errors import InputError
from simcse_jax.inference.index import is_index
from simcse_jax.runs.checkpoints import Progress, checkpoint_folders, faults_of, read_progress, record_of
from simcse_jax.runs.folder import Run, is_run, open_run, read_results
from simcse_jax.runs.metrics_log import Record, problem_of, read_log, spoilt_lines
from simcse_jax.runtime.provenance import NOT_COMPARED, provenance, software
from simcse_jax.storage.files import expanded, is_remote
from simcse_jax.storage.manifest import MANIFEST, Damage, digest, faults, has_manifest, read_manifest
from simcse_jax.storage.objects import local_path
from simcse_jax.storage.records import read_bounded

_CACHES = "token caches"
State = Literal["whole", "damaged", "unknown", "note"]
Made = dict[str, str]
"""See `provenance`."""


@dataclass(frozen=True)
class Item:
    """A part of a folder that is verified by itself."""

    name: str
    state: State
    detail: str


@dataclass(frozen=True)
class Report:
    """A folder: what is whole of it and where it comes from."""

    path: str
    kind: str
    items: list[Item]
    about: dict[str, str] = field(default_factory=dict)
    """Digests of the config and the text, and what the settings name."""
    made: dict[str, Made] = field(default_factory=dict)
    """What made each part; empty for a folder of an earlier version."""
    differs: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    """What was different, for each part, and is here now."""

    @property
    def whole(self) -> bool:
        """Whether nothing is damaged."""
        return all(item.state != "damaged" for item in self.items)

    def __str__(self) -> str:
        """The report as lines of text."""
        width = max([len(item.name) for item in self.items] + [len(name) for name in self.about] + [12])
        lines = [f"{self.path}: {self.kind}, {'whole' if self.whole else 'DAMAGED'}"]
        for item in self.items:
            state = item.state.upper() if item.state == "damaged" else item.state
            lines.append(f"  {item.name:<{width}}  {state:<7}  {item.detail}".rstrip())
        lines += [f"  {name:<{width}}  {text}" for name, text in self.about.items()]
        here = _here()
        for part, made in self.made.items():
            rows = [(part, "was", "is here")]
            for name in _names(made):
                was, now = made.get(name, "-"), here.get(name, "-")
                rows.append((name, was, "the same" if was == now else now))
            widths = [min(36, max(len(row[column]) for row in rows)) for column in (0, 1)]
            lines += ["", *(f"  {n:<{widths[0]}}  {was:<{widths[1]}}  {now}" for n, was, now in rows)]
        return "\n".join([*lines, "", f"  {self.repeatable}"])

    @property
    def repeatable(self) -> str:
        """Whether the folder can be made again here with the same bits, in words."""
        if self.kind == _CACHES:
            return "repeated here: give one of them to see what made it"
        if not self.made or any(item.state == "unknown" for item in self.items):
            return "repeated here: not known, as an earlier version kept no record of what made it or a part of it"
        changed = list(dict.fromkeys(name for differs in self.differs.values() for name in differs))
        if changed:
            return f"repeated here: not bit for bit, as there are differences ({', '.join(changed)})"
        return "repeated here: bit for bit, from the same input: code, packages, devices and settings are the same"


@cache
def _here() -> Made:
    try:
        return provenance()
    except RuntimeError:  # the devices are in use, or there are none
        return software()


def _names(made: Made) -> list[str]:
    """What is compared with what is here: tokens do not depend on devices, of which their cache says nothing."""
    return list(dict.fromkeys([*made, *_here()])) if "devices" in made else list(made)


def _report(path: str | Path, kind: str, items: list[Item], about: dict[str, str], made: dict[str, Made]) -> Report:
    here = _here()
    differs = {
        part: {
            name: (was.get(name, "-"), here.get(name, "-"))
            for name in _names(was)
            if name not in NOT_COMPARED and was.get(name) != here.get(name)
        }
        for part, was in made.items()
    }
    return Report(str(path), kind, items, about, made, {part: found for part, found in differs.items() if found})


def inspect(path: str | Path) -> Report:
    """Compares all files of a folder with its manifests.

    Args:
      path: a run, a checkpoint in it, an export, a saved index, a token cache, or the folder that holds token caches;
        also on an object store.

    Raises:
      InputError: the folder is none of these, or an export or index of a version that wrote no manifest.
    """
    folder = local_path(path)
    if not folder.is_dir():
        raise InputError(f"{path} is not a folder: give a run, an export, a saved index or a token cache")
    if is_run(folder):
        return _inspect_run(path, folder)
    if folder.absolute().parent.name == "checkpoints" and folder.name.isdecimal():
        item, _, record = _checkpoint(folder.absolute())
        return _report(path, "a checkpoint", [item], {}, _parts(record.get("parts", [])))
    if has_manifest(folder):
        kind = "an export" if (folder / "config.json").is_file() else "a folder"
        kind = "a token cache" if folder.name.startswith("tokens-") else kind
        return _inspect_one(path, folder, "a saved index" if is_index(folder) else kind)
    if caches := sorted(folder.glob("tokens-*")):
        items = [_files(cache.name, cache) for cache in caches]
        what = "left by a process that was killed, or being filled"
        items += [Item(left.name, "note", what) for left in sorted(folder.glob("partial-*"))]
        return _report(path, _CACHES, items, {}, {})
    if is_index(folder) and b'"manifest"' in read_bounded(folder / "index.json"):  # it had one
        return _report(path, "a saved index", [Item("files", "damaged", f"{MANIFEST} is missing")], {}, {})
    raise InputError(
        f"{path} has no {MANIFEST} to compare it with: give a run, an export, a saved index or a token cache; those of "
        "earlier versions and the models of other programs have none"
    )


def _inspect_one(path: str | Path, folder: Path, kind: str) -> Report:
    """The report of a folder that has one manifest."""
    item = _files("files", folder)
    try:
        found = read_manifest(folder)["about"]
    except Damage:
        return _report(path, kind, [item], {}, {})
    names = {"run": "config digest", "text": "text digest", "step": "step of the run", "source": "text"}
    about = {title: str(found[name]) for name, title in names.items() if name in found}
    made = _parts(found.get("parts", [])) | ({"written by": found["made"]} if "made" in found else {})
    return _report(path, kind, [item], about, made)


def _files(name: str, folder: Path) -> Item:
    """Whether all files are there that the manifest of a folder names."""
    try:
        found = faults(folder)
        return Item(name, "damaged", "; ".join(found)) if found else Item(name, "whole", _size(folder))
    except Damage as damage:
        return Item(name, "damaged", str(damage))


def _size(folder: Path) -> str:
    sizes = [size for size, _ in read_manifest(folder)["files"].values()]
    return f"{len(sizes):,} files, {sum(sizes):,} bytes"


def _checkpoint(folder: Path) -> tuple[Item, Progress | None, dict[str, Any]]:
    """A checkpoint; where it is whole, also the progress and the record that it holds."""
    name = f"checkpoint {folder.name}"
    try:
        progress = read_progress(folder)
        if found := faults_of(folder):
            return Item(name, "damaged", "; ".join(found)), None, {}
        record = record_of(folder)
        if not has_manifest(folder):
            return Item(name, "unknown", "of an earlier version, without a manifest"), progress, record
        return Item(name, "whole", _size(folder)), progress, record
    except Damage as damage:
        return Item(name, "damaged", str(damage)), None, {}


def _inspect_run(path: str | Path, folder: Path) -> Report:
    items = [Item("settings", "unknown", "of an earlier version, without a manifest")]
    if has_manifest(folder):
        items = [_files("settings", folder)]
    try:
        run: Run | None = open_run(folder)
    except InputError as error:
        run = None
        if items[0].state != "damaged":
            items = [Item("settings", "damaged", str(error))]
    newest, progress, record = 0, Progress(), dict[str, Any]()
    steps = checkpoint_folders(folder)
    for step, place in steps.items():
        item, found, noted = _checkpoint(place)
        if not place.exists():  # a run that is being trained has dropped it
            continue
        items.append(item)
        if found is not None:
            newest, progress, record = step, found, noted
    if progress.best_step is not None:
        state = next((i.state for i in items if i.name == f"checkpoint {progress.best_step}"), None)
        detail = f"that of step {progress.best_step}, dev {progress.best_score}"
        items.append(Item("best", state or "damaged", detail if state else f"{detail}, is gone"))
    if (parts := record.get("parts")) and parts[0]["from"]:
        items.append(Item(f"steps to {parts[0]['from']}", "unknown", "of an earlier version, which kept no record"))
    items += [_log(folder, newest, record.get("log", {})), *_results(folder)]
    if aside := sorted(place.name for place in (folder / "damaged").glob("*")):
        items.append(Item("damaged/", "note", f"set aside and not used: {', '.join(aside)}"))
    made = _parts(record.get("parts", []))
    if not made and has_manifest(folder) and items[0].state == "whole":
        made = {"begun by": read_manifest(folder)["about"].get("made", {})}
    return _report(path, "a run", items, _settings(run) if run else {}, made)


def _log(folder: Path, step: int, written: Record) -> Item:
    name, file = "metrics.jsonl", folder / "metrics.jsonl"
    if problem := problem_of(file, step, written):
        return Item(name, "damaged", problem)
    spoilt, lines = spoilt_lines(file), read_log(file)
    if spoilt > 1:
        return Item(name, "damaged", f"{spoilt:,} lines cannot be read")
    notes = [f"{len(lines):,} lines", *["a half line, which the run drops when it goes on"][:spoilt]]
    notes += [f"lines before step {gap:,} were lost or changed earlier" for gap in written.get("gaps", [])]
    return Item(name, "whole" if written else "unknown", ", ".join(notes))


def _results(folder: Path) -> list[Item]:
    try:
        results = read_results(folder)
    except Damage as damage:
        return [Item("results.json", "damaged", str(damage))]
    if not results:
        return [Item("results.json", "note", "not there: the run has not ended")]
    ended = f"the run has ended at step {results['step']:,}" if "step" in results else "the run has not ended"
    return [Item("results.json", "whole", ended)]


def _parts(parts: list[dict[str, Any]]) -> dict[str, Made]:
    return {f"from step {part['from']}": part["made"] for part in parts}


def _settings(run: Run) -> dict[str, str]:
    """The digests that identify a run, and the files and names that its settings give."""
    about = {"config digest": digest(run.folder / "run.json"), "text digest": run.data_fingerprint}
    for name in ("data.train", "model.path", "evaluation.dev", "evaluation.test"):
        value = field_value(run.config, name)
        for given in [value] if isinstance(value, str) else value:
            if given:
                there = not is_remote(given) and expanded(given).exists()
                about[f"{name} {given}" if name in about else name] = f"{given} ({'here' if there else 'no path here'})"
    return about
