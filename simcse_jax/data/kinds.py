"""Text, or numbers, ids, labels and scores: what the name and the first values of a column say of it."""

import re
from typing import Any

import numpy as np

_NAMES = {
    "id": "id ids idx index key uid uuid guid qid docid hash url uri link file filename path email author "
    "username annotator worker speaker",
    "label": "label labels class classes category categories tag tags gold intent sentiment polarity emotion lang "
    "language locale split fold subset type kind genre topic",
    "score": "score scores rating ratings stars similarity relatedness rank weight count year date time timestamp "
    "price confidence probability prob",
    "text": "sentence sentences sent text texts query question answer anchor premise hypothesis passage document doc "
    "title body content context response summary paragraph phrase description prompt "
    "completion review comment pos neg positive negative negatives",
}
_CLASSES = (
    "true false yes no none null n/a na - unknown positive negative neutral pos neg entailment contradiction "
    "duplicate spam ham"
)
_LABELS = frozenset(_CLASSES.split())
_KINDS = {word: kind for kind, words in _NAMES.items() for word in words.split()}
_CLAIMS = ("anchor query queries question questions", "answer answers positive pos", "negative negatives neg")
_PLACES = {word: n for n, words in enumerate(_CLAIMS) for word in words.split()}
_TYPES = {bool: "truth values", int: "numbers", float: "numbers", list: "lists", dict: "objects", bytes: "bytes"}

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+")
_NAMELESS = re.compile(r"|Unnamed: \d+(\.\d+)?|__index_level_\d+__|level_\d+|row[_.]?names?")
_NUMBER = re.compile(r"[\W\d_]+|[-+]?[\d.,]+e[-+]?\d+|nan|[-+]?inf(inity)?|\d{4}-\d\d-\d\dt[\d:.]+(z|[-+][\d:]+)?")
_ADDRESS = re.compile(r"\w+://\S+|[\w.@/\\+-]+\.[A-Za-z]\w{1,4}")  # of the web, of mail, of files
_CODE = re.compile(r"[!-~]+")


def fault(name: str, values: list[Any], alone: bool) -> str:
    """Why a column is not taken for text, as the end of a sentence; empty for text.

    Args:
      name: of the column.
      values: some of its values, without null and blank ones.
      alone: whether the table has no other column.
    """
    if _NAMELESS.fullmatch(name):
        return "has no name of its own"
    if not values:  # of hard negatives, later rows may have some
        return "" if place(name) == 2 else "is empty"
    texts = [value.strip() for value in values if isinstance(value, str)]
    if not texts:
        return f"holds {_TYPES.get(type(values[0]), f'values of type {type(values[0]).__name__}')}"
    if _share(_NUMBER.fullmatch(text.lower()) for text in texts) > 0.9:
        return "holds numbers" if any(map(str.isdigit, texts[0])) else "holds no words"
    if _share(_ADDRESS.fullmatch(text) for text in texts) > 0.9:
        return "holds addresses"
    if all(text.lower() in _LABELS for text in texts):
        return "holds labels"
    kinds = {_KINDS.get(word) for word in _words_of(name)}
    repeated = len(texts) >= 4 and len(set(texts)) <= len(texts) / 2
    if np.median([len(text.split()) for text in texts]) >= 4 and not ("label" in kinds and repeated):
        return ""  # sentences, whatever their name, but for the names of classes
    for kind in ("id", "label", "score"):
        if kind in kinds:
            return f"has the name of {'an' if kind == 'id' else 'a'} {kind}"
    if "text" in kinds:
        return ""
    has_digits = _share(any(map(str.isdigit, text)) for text in texts) > 0.5
    if has_digits and all(_CODE.fullmatch(text) for text in texts):
        return "holds ids"
    few = repeated and max(len(text.split()) for text in texts) <= 3
    return "holds few different values, as labels do" if few and not alone else ""


def place(name: str) -> int | None:
    """The place in an example that the name of a column claims, such as 2 for a negative; None for other names."""
    return next((_PLACES[word] for word in _words_of(name) if word in _PLACES), None)


def is_sentence(text: str) -> bool:
    """Whether a text is more likely a sentence than the name of a column."""
    words = text.split()
    ends = (len(words) > 1 and text.endswith((".", "!", "?"))) or text.endswith(("。", "！", "？"))
    return ends or len(words) > 3 or len(text) > 60


def _words_of(name: str) -> list[str]:
    """The words of a name such as gold_label or pairID, in lower case."""
    return [word.lower() for word in _WORD.findall(name)]


def _share(found: Any) -> float:
    """The share of what is true."""
    return float(np.mean([bool(one) for one in found]))
