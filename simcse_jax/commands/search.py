"""`simcse-jax search`."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from simcse_jax.commands.options import Command, check_searchable, make_searchable
from simcse_jax.config import Backend, LongText
from simcse_jax.errors import InputError
from simcse_jax.poolers import PoolerName


@dataclass(frozen=True)
class Search(Command):
    """Find the sentences of a file that are most similar to a query."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run, an exported folder, a Hugging Face or sentence-transformers folder, or a name on the hub."""
    sentences: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SENTENCES")]
    """Text file, one sentence per line (also .gz; no blank line is a hit), or a folder that --save-index wrote."""
    queries: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[QUERY ...]")] = ()
    """Sentences to look for, each in quotes."""
    top_k: int = 5
    """Most sentences to find per query."""
    threshold: float | None = None
    """Least cosine similarity of a hit; by default any."""
    json: bool = False
    """Print one JSON object per query, each on a line."""
    save_index: Path | None = None
    """Folder to write the index to, so that the next search need not encode the sentences again."""
    backend: Backend = "jax"
    """`jax` and `faiss-flat` are exact, `faiss-ivf` is approximate; an index saved before keeps its own."""
    pooler: PoolerName | None = None
    """Overrides the pooler saved with the model."""
    max_length: int | None = None
    """Most tokens per sentence; by default the model's own limit."""
    long_text: LongText = "cut"
    """Longer texts are cut, encoded in windows whose vectors are averaged, or refused."""

    def run(self) -> None:
        """Builds or loads the index, and searches it."""
        import json

        from simcse_jax.inference.index import check_backend, check_search
        from simcse_jax.inference.simcse import SimCSE
        from simcse_jax.reports.progress import note
        from simcse_jax.storage.files import check_new_folder, write_or_rescue

        if not self.queries and self.save_index is None:
            raise InputError('nothing to look for: give a query in quotes, e.g. "a man plays music"')
        if any(not query.strip() for query in self.queries):
            raise InputError("a query is blank: give words to look for")
        check_search(self.top_k, self.threshold)
        if not self.sentences.expanduser().is_dir():  # a saved index keeps its own
            check_backend(self.backend)
        if self.save_index is not None:
            check_new_folder(self.save_index)
        check_searchable(self.sentences)
        model = SimCSE(self.model, self.pooler, self.max_length, long_text=self.long_text)
        make_searchable(model, self.sentences, self.backend)
        if self.save_index is not None:
            write_or_rescue(model.save_index, self.save_index)
            note(f"index of {len(model.index or ()):,} sentences saved in {self.save_index}: give it as SENTENCES")
        for query, cut in zip(self.queries, model.are_cut(self.queries), strict=True):
            if cut:
                limit = f"is longer than the {model.max_length} tokens that the model reads"
                note(f"'{query[:60]}…' {limit}: only the beginning counts")
        for query, hits in zip(self.queries, model.search(list(self.queries), self.top_k, self.threshold), strict=True):
            if self.json:
                found = {"query": query, "hits": [asdict(hit) for hit in hits]}
                print(json.dumps(found, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))
                continue
            print(query)
            for hit in hits:
                print(f"  {hit.score:.4f}  {hit.index + 1:>6}  {hit.sentence}")
            if not hits:
                print(f"  nothing with a similarity of {self.threshold} or more: try a lower --threshold")
