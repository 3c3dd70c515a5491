"""Kinds: what a run was begun with, or what it keeps beside itself, is another when it goes on."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.torture.case import Case
from tests.torture.kinds import IDENTICAL, REFUSED, Fault, kind
from tests.torture.world import TRAIN


@kind("token cache changed", 3)
def tokens(case: Case) -> str:
    """Ids that are in the vocabulary, or offsets that are in order: nothing that reading would notice."""
    case.fill("half")
    (cache,) = (case.folder / "cache").glob("tokens-*")
    what = case.rng.choice(["ids", "offsets", "zeros", "other cache"])
    case.place = what
    ids = np.fromfile(cache / "ids-0.bin", np.uint16)
    offsets = np.fromfile(cache / "offsets-0.bin", np.int64)
    if what == "ids":
        at = case.rng.randrange(len(ids))
        ids[at] = ids[at] % 90 + 1
    elif what == "offsets":
        offsets[case.rng.randrange(1, len(offsets) - 1)] += case.rng.choice([-1, 1])
    elif what == "zeros":
        ids[:] = 0
    else:
        ids = np.roll(ids, int(offsets[1]))
    ids.tofile(cache / "ids-0.bin")
    offsets.tofile(cache / "offsets-0.bin")
    return case.judge(case.do())


def _changed(
    case: Case, template: str, path: Path, content: bytes, may_go_on: bool, words: tuple[str, ...] = TRAIN
) -> str:
    """Puts other content into a file; the run must name it, or go on as if it had not been changed."""
    original = path.read_bytes()
    assert content != original
    path.write_bytes(content)
    before = case.snapshot()
    outcome = case.judge(case.do(words), lambda: path.write_bytes(original), before, template)
    if outcome != REFUSED and not (may_go_on and outcome == IDENTICAL):
        raise Fault(f"a change of {path.name} was not refused")
    return outcome


@kind("start weights changed", 3)
def weights(case: Case) -> str:
    """Between the parts of a run: of no account once there is a checkpoint, and refused before."""
    template = case.rng.choice(["half", "begun", "begun"])
    case.fill(template)
    path = case.folder / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    places = json.loads(content[8 : 8 + size])
    # The head of a run that asks for none is drawn, whatever the file has.
    name = case.rng.choice([n for n in sorted(places) if not n.startswith(("pooler", "__"))])
    start, end = places[name]["data_offsets"]
    content[8 + size + case.rng.randrange(start, end)] ^= 1 << case.rng.randrange(8)
    case.place = template
    return _changed(case, template, path, bytes(content), may_go_on=template == "half")


def _other_digit(text: str, pattern: str, rng: random.Random) -> str:
    """Text with one of the numbers that a pattern matches replaced by another."""
    found = rng.choice([*re.finditer(pattern, text)])
    other = rng.choice([x for x in "0123456789" if x != found[0]])
    return text[: found.start()] + other + text[found.end() :]


_CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "dev.tsv": lambda text, rng: _other_digit(text, r"(?<=\t)\d(?=\.\d\n)", rng),
    "test.tsv": lambda text, rng: _other_digit(text, r"(?<=\t)\d(?=\.\d\n)", rng),
    "text.txt": lambda text, rng: text.replace(rng.choice(["man", "dog", "red"]), "cat", 1),
}


@kind("pairs or text changed", 3)
def content(case: Case) -> str:
    """The same paths, other content: one score of a pair, one word of the text."""
    template = case.rng.choice(["half", "half", "begun"])
    case.fill(template)
    name = case.rng.choice([*_CHANGES])
    case.place = f"{template}: {name}"
    path = case.folder / name
    changed = _CHANGES[name](path.read_text(), case.rng)
    return _changed(case, template, path, changed.encode(), may_go_on=False)


@kind("settings changed", 1)
def settings(case: Case) -> str:
    """In the config file, or in the run's own copy."""
    case.fill("half")
    where = case.rng.choice(["config.py", "run/run.json"])
    path = case.folder / where
    text = path.read_text()
    name, other = case.rng.choice([("learning_rate", "0.004"), ("batch_size", "8"), ("max_steps", "16")])
    changed, times = re.subn(rf'({name}"?[:=] ?)[^,]*?([,)\n])', rf"\g<1>{other}\2", text)
    assert times == 1
    case.place = f"{where}: {name}"
    return _changed(case, "half", path, changed.encode(), may_go_on=False)


@kind("model of a run changed", 2)
def own_model(case: Case) -> str:
    """A value in the run's own config, or a word of its vocabulary: still a model, and another."""
    template = case.rng.choice(["half", "whole"])
    case.fill(template)
    name = case.rng.choice(["config.json", "tokenizer.json"])
    path = case.folder / "run" / "model" / name
    text = path.read_text()
    if name == "config.json":
        pairs = [('"hidden_dropout_prob": 0.1', '"hidden_dropout_prob": 0.2'), ('"gelu"', '"relu"')]
        pairs += [('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-2')]
        changed = text.replace(*case.rng.choice(pairs))
    else:
        changed = re.sub(r'"(a|b|c|##a|##e)": (\d+)', lambda m: f'"{m[1]}": {int(m[2]) + 1}', text, count=1)
    case.place = f"{template}: {name}"
    words = case.rng.choice([TRAIN, ("evaluate", "run", "--tasks", "test.tsv")])
    # A run that has ended needs its model no more, to say how it ended.
    return _changed(case, template, path, changed.encode(), words == TRAIN and template == "whole", words)
