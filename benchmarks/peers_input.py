"""Peers of the input pipeline: tokenizers alone, and a PyTorch loader with transformers' collator."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.worker import OnHost

_CHUNK = 8192  # sentences at a time, as in our pipeline


class Tokens(OnHost):
    """The package tokenizers, in its fastest form; its results are dropped."""

    def __init__(self, model: str, text: str, length: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        self._tokenizer.enable_truncation(length)
        self._tokenizer.no_padding()
        self._text = text

    def _encoded(self) -> Iterator[list[Any]]:
        lines = Path(self._text).read_text("utf-8").splitlines()
        for start in range(0, len(lines), _CHUNK):
            yield self._tokenizer.encode_batch_fast(lines[start : start + _CHUNK])

    def run(self) -> None:
        """Reads the text and tokenises it."""
        for _ in self._encoded():
            pass

    def check(self) -> dict[str, int]:
        """Number and sum of the tokens."""
        ids = [np.asarray(sentence.ids) for chunk in self._encoded() for sentence in chunk]
        return {"tokens": sum(map(len, ids)), "sum of ids": int(sum(x.sum() for x in ids))}


class Batches(OnHost):
    """`torch.utils.data.DataLoader` with `DataCollatorWithPadding` over tokenised sentences held in memory."""

    def __init__(self, model: str, sentences: list[list[int]], order: list[int], batch_size: int) -> None:
        from torch.utils.data import DataLoader
        from transformers import AutoTokenizer, DataCollatorWithPadding

        examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sentences]
        collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(model))
        self._loader: Any = DataLoader(examples, batch_size=batch_size, sampler=order, collate_fn=collator)

    def run(self) -> None:
        """Loads all batches."""
        for _ in self._loader:
            pass

    def check(self) -> dict[str, int]:
        """Number and sum of the tokens."""
        batches = list(self._loader)
        return {
            "tokens": int(sum(batch["attention_mask"].sum() for batch in batches)),
            "sum of ids": int(sum(batch["input_ids"].sum() for batch in batches)),
        }
