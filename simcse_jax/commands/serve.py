"""`simcse-jax serve`."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

from simcse_jax.commands.options import Command, check_searchable, make_searchable
from simcse_jax.errors import InputError
from simcse_jax.poolers import PoolerName
from simcse_jax.serve.limits import Limits


@dataclass(frozen=True)
class Serve(Command):
    """Serve search over sentences to browsers and through an HTTP API; it also compares and plots any sentences."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run, an exported folder, a Hugging Face or sentence-transformers folder, or a name on the hub."""
    sentences: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[SENTENCES]")] = None
    """Sentences to search: a text file, one sentence per line (also .gz), or the folder of an index saved before with
    the same model, which loads without encoding. Without it, the service encodes, compares and plots."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets every other machine that reaches this one use the service, too."""
    port: int = 8000
    """Port to listen on; 0 takes any that is free."""
    name: str | None = None
    """Name of the model on the page; by default the name of its folder, or its name on the hub."""
    pooler: PoolerName | None = None
    """Overrides the pooler saved with the model."""
    max_length: int | None = None
    """Most tokens per sentence; by default the model's own limit."""
    long_text: Literal["cut", "windows"] = "cut"
    """Longer texts are cut, or encoded in windows whose vectors are averaged."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = field(default_factory=Limits)

    def run(self) -> None:
        """Answers requests until SIGTERM or Ctrl-C."""
        self.limits.validate()
        if any(find_spec(package) is None for package in ("fastapi", "uvicorn")):
            raise InputError("the service needs FastAPI and uvicorn: pip install 'simcse-jax[serve]'")
        from simcse_jax.inference.simcse import SimCSE
        from simcse_jax.reports.progress import note, say
        from simcse_jax.serve.app import create_app
        from simcse_jax.serve.engine import Engine
        from simcse_jax.serve.server import Server, bind, is_loopback, leave, url

        if self.sentences is not None:
            check_searchable(self.sentences)
        with bind(self.host, self.port) as bound:  # before the model is loaded, which takes a while
            if not is_loopback(self.host):
                note(f"listening on {self.host}: whoever reaches this machine can use the service")
            model = SimCSE(self.model, self.pooler, self.max_length, long_text=self.long_text)
            if self.sentences is not None:
                make_searchable(model, self.sentences)
            size = "no sentences" if model.index is None else f"{len(model.index):,} sentences"
            say(f"{self.model}: width {model.width}, {size}; compiling")
            failed: list[Exception] = []

            def on_ready(error: Exception | None) -> None:
                if error is None:
                    say(f"ready: {url(bound)}  (Ctrl-C to stop)")
                else:
                    failed.append(error)
                    server.stop()

            engine = Engine(model, model.index, self.limits.max_hits, self.limits.batch)
            hosts = ["localhost", "127.0.0.1", "[::1]", self.host] if is_loopback(self.host) else ["*"]
            app = create_app(engine, self.name or _short(self.model), self.limits, hosts, on_ready)
            server = Server(app, self.limits)
            server.run(bound)
        if failed:
            raise failed[0]
        if app.state.batcher.busy:
            leave()
        say("stopped")


def _short(model: str) -> str:
    """The name of a model's folder; a name on the hub as it is."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.exists() else model
