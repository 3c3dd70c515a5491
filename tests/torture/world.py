"""What every case starts from: a tiny model with text and pairs, and runs that no fault has hit."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from simcse_jax.runs.metrics_log import TIMES
from tests.torture.process import Done, Process

TRAIN = ("train", "config.py")
STEPS, STOP = 12, 7
CONFIG = f"""
from simcse_jax.config import *

config = Config(
    output="run", batch_size=16, max_steps={STEPS}, log_every=1,
    model=ModelConfig(path="model", pooler="cls", mlp_only_train=True),
    data=DataConfig(train="text.txt", max_length=12, cache="cache"),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    evaluation=EvaluationConfig(dev="dev.tsv", test=("test.tsv",), every=4),
    checkpoint=CheckpointConfig(every=3, keep=2),
)
"""
WORDS = ["man", "woman", "dog", "cat", "runs", "eats", "sees", "red", "house", "river", "never", "two"]

EVALUATE = ("evaluate", "run", "--tasks", "test.tsv")
EXPORT = ("export", "run", "out")
READERS = {
    "run": [EVALUATE, EXPORT],
    "export": [("evaluate", "export", "--tasks", "test.tsv"), ("encode", "export", "text.txt", "vectors.npy")],
    "index": [("search", "run", "index", "a man runs", "--json")],
}
"""The commands that read what a run leaves, by what they read."""
OUTPUTS = ("out/", "vectors.npy")
"""Where commands write."""
WRITERS = [
    EXPORT,
    ("search", "run", "text.txt", "--save-index", "out"),
    ("encode", "export", "text.txt", "vectors.npy"),
]
"""The commands that write something other than a run; the last word is where."""


def digests(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder, by its path; of a link, where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = xxhash.xxh3_128_hexdigest(path.read_bytes())
        elif not any(path.iterdir()):
            found[f"{name}/"] = ""
    return found


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of the log without what they say of time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def print_arrays(checkpoint: Path) -> None:
    """Prints the digest of every value that a checkpoint's stores hold. Starts threads, so it runs in a child."""
    import tensorstore

    found = {}
    for item in sorted(path.parent for path in checkpoint.glob("*/manifest.ocdbt")):
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{item}/"}).result()
        for key in sorted(store.list().result()):
            found[f"{item.name}/{key.decode()}"] = xxhash.xxh3_128_hexdigest(store.read(key).result().value)
    print(json.dumps(found))


@dataclass
class World:
    """The folder that cases are copied from."""

    folder: Path
    seconds: float = 0.0
    """What an undisturbed run takes."""
    final: dict[str, Any] = field(default_factory=dict)
    """What it leads to, see `World.outcome`."""
    readings: dict[tuple[str, ...], Any] = field(default_factory=dict)
    """What commands that read say and write, by template and words."""

    def process(
        self,
        words: tuple[str, ...],
        folder: Path,
        *,
        devices: int = 1,
        figures: bool = False,
        programs: Path | None = None,
        environment: dict[str, str | None] | None = None,
        setup: Callable[[], Any] | None = None,
        main: Callable[[], Any] | None = None,
    ) -> Process:
        """Starts a command in a case's folder.

        Args:
          words, folder, main: see `Process`.
          devices: of the child.
          figures: whether a run draws its figures at the end, which takes a second.
          programs: folder of the compiled programs; the package's own, below HOME, where it does not exist.
          environment: variables to set, or to remove where None.
          setup: called in the child.
        """
        kept = self.folder / "programs" if programs is None else programs
        surroundings = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")} | (environment or {})

        def prepare() -> None:
            import jax

            jax.config.update("jax_num_cpu_devices", devices)
            if kept.is_dir():
                jax.config.update("jax_compilation_cache_dir", str(kept))
            if not figures:
                import simcse_jax.commands.train as train

                train._draw = lambda run: []
            if setup:
                setup()

        return Process(words, folder, surroundings, prepare, main)

    def outcome(self, folder: Path, run: str = "run") -> dict[str, Any]:
        """All that a run has led to and that does not depend on time."""
        root = folder / run
        steps = [int(path.name) for path in (root / "checkpoints").iterdir() if path.name.isdecimal()]
        latest = root / "checkpoints" / str(max(steps))
        arrays = self.process((), folder, main=lambda: print_arrays(latest)).finish()
        assert arrays.code == 0, arrays.text
        settings = json.loads((root / "run.json").read_text())
        results = json.loads((root / "results.json").read_text())
        del settings["config"]["output"], settings["config"]["data"]["cache"]
        return {
            "step": max(steps),
            "arrays": json.loads(arrays.out),
            "log": log_of(root),
            "results": {name: x for name, x in results.items() if name != "seal"},
            "settings": settings,
            "model": digests(root / "model"),
        }

    def reading(self, template: str, words: tuple[str, ...]) -> tuple[str, dict[str, str]]:
        """What a command prints and writes about a template that no fault has hit."""
        if (template, *words) not in self.readings:
            folder = self.folder / f"reading-{os.getpid()}"
            shutil.copytree(self.folder / template, folder, symlinks=True)
            done = self.process(words, folder).finish()
            assert done.code == 0, done.text
            self.readings[template, *words] = read_result(done, folder)
            shutil.rmtree(folder)
        return self.readings[template, *words]


def read_result(done: Done | None, folder: Path) -> tuple[str, dict[str, str]]:
    """What a command that reads has printed, and written to one of the `OUTPUTS`."""
    written = {n: d for n, d in digests(folder).items() if n.startswith(OUTPUTS)}
    lines = done.out.replace(str(folder), "").splitlines() if done else []
    return "\n".join(line for line in lines if not line.startswith("figures ")), written


def _write_inputs(folder: Path, seed: int) -> None:
    from tests.conftest import TINY_BERT, write_model

    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    write_model(folder / "model", TINY_BERT | small)
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(3, 9)))

    (folder / "text.txt").write_text("\n".join(dict.fromkeys(sentence() for _ in range(203))) + "\n")
    for name, pairs in (("dev", 12), ("test", 8)):
        rows = [f"{sentence()}\t{sentence()}\t{rng.integers(0, 51) / 10}" for _ in range(pairs)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n")
    (folder / "config.py").write_text(CONFIG)
    for name in ("home", "tmp"):
        (folder / name).mkdir()


def _stop_after(step: int) -> None:
    import simcse_jax.training.trainer as trainer

    trainer.StopRequest.__call__ = lambda self, now: now == step  # type: ignore[method-assign]


def _end_before_training() -> None:
    import simcse_jax.training.trainer as trainer

    def end(*_: Any) -> None:
        os._exit(0)

    trainer.Trainer.__init__ = end  # type: ignore[method-assign, assignment]


def make_world(folder: Path) -> World:
    """Makes the templates.

    inputs  a model, text, pairs and a config
    begun   a run that was killed before its first checkpoint
    half    a run that was stopped after step 7: the checkpoints of steps 4 (the best), 6 and 7
    whole   a run that has ended, exported as `export`, with an index of the text as `index`
    """
    world = World(folder)
    (folder / "programs").mkdir(parents=True)

    def train(template: str, setup: Callable[[], Any] | None = None) -> Process:
        shutil.copytree(folder / "inputs", folder / template)
        process = world.process(TRAIN, folder / template, figures=template == "whole", setup=setup)
        done = process.finish()
        assert done.code == 0, done.text
        return process

    for seed in range(20):  # other versions round otherwise, and select another step
        (folder / "inputs").mkdir()
        written = world.process((), folder / "inputs", main=lambda seed=seed: _write_inputs(Path(), seed)).finish()
        assert written.code == 0, written.text
        train("whole")
        dev = {line["step"]: line["dev"] for line in log_of(folder / "whole" / "run") if "dev" in line}
        if dev[0] < dev[4] and dev[STEPS] < max(dev[4], dev[8]):
            break
        shutil.rmtree(folder / "whole")
        shutil.rmtree(folder / "inputs")
    else:
        raise AssertionError("no pairs select a step in between, as the faults of a best checkpoint need it")
    train("begun", _end_before_training)
    train("half", lambda: _stop_after(STOP))
    for words in (("export", "run", "export"), ("search", "run", "text.txt", "--save-index", "index")):
        done = world.process(words, folder / "whole").finish()
        assert done.code == 0, done.text
    world.final = world.outcome(folder / "whole")
    again = train("again")  # with the programs of the cache
    world.seconds = again.seconds
    found = world.outcome(folder / "again")
    assert found == world.final, "two runs differ without any fault"
    shutil.rmtree(folder / "again")
    return world
