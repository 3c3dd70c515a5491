"""The parts: commands of this project, most important first."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """A command, and its limit."""

    name: str
    seconds: int
    """Most seconds on a GPU: twice what the part is thought to need, compilation included."""
    module: str
    """Module that Python runs."""
    arguments: tuple[str, ...] = ()
    real_text: bool = False
    """Whether it needs the real text of SIMCSE_DATA."""


def parts(output: Path, runs: Path, quick: bool = False) -> list[Part]:
    """The parts in their order: first what has never been measured.

    Args:
      output: folder of the tables.
      runs: empty folder for training runs.
      quick: rehearse at tiny sizes.
    """

    def benchmark(name: str, seconds: int, *arguments: str, real_text: bool = False) -> Part:
        ends = ("--output", str(output / name), *(("--quick",) if quick else ()))
        return Part(name, seconds, "benchmarks", (*arguments, *ends), real_text)

    def exact_step(batch_size: int, seconds: int) -> Part:
        size = {"batch-size": batch_size, "micro-batch": 1024, "size.layers": 12, "size.width": 768}
        if quick:
            size = {"batch-size": 64, "micro-batch": 32, "size.layers": 2, "size.width": 128}
        options = (word for name, value in size.items() for word in (f"--{name}", str(value)))
        return Part(f"step-{batch_size}", seconds, "benchmarks.large_batch", ("step", *options, "--dtype", "bfloat16"))

    def training(name: str, seconds: int, steps: int, *arguments: str) -> Part:
        size = ("--max-steps", "4", "--batch-size", "8") if quick else ("--max-steps", str(steps))
        ends = (*arguments, *size, "--output", str(runs / name))
        return Part(name, seconds, "simcse_jax", ("train", "quickstart", *ends))

    step = ("step", "--batch-size", "512", "--dtypes", "bfloat16", "--product", "8192")
    profile = ("--step.batch-size", "512", "--step.dtypes", "bfloat16", "--step.product", "8192")
    encode = ("--sentences", "20000", "--batch-size", "512", "--dtypes", "bfloat16", "--product", "8192")
    bfloat16, seldom = ("--model.dtype", "bfloat16"), ("--evaluation.every", "500", "--checkpoint.every", "5000")
    return [
        Part("machine", 60, "benchmarks.gpu.machine"),
        benchmark("loss", 180, "loss", "--rows", "4096", "16384", "65536", "--product", "8192"),
        benchmark("profile", 150, "profile", *profile),
        exact_step(262_144, 300),
        # PyTorch's compiler takes minutes on a CPU, and a rehearsal of it says nothing.
        benchmark("step-512", 240, *step, *(() if quick else ("--compile",))),
        benchmark("step-512-sts", 240, *step, "--lengths", "sts", real_text=True),
        benchmark("encode", 180, "encode", *encode, "--rounds", "3"),
        benchmark("encode-long", 150, "attention", "--product", "8192"),
        training("train-float32", 150, 300),
        training("train-bfloat16", 150, 300, *bfloat16),
        Part("resume", 150, "benchmarks.gpu.resume", ("--output", str(runs / "resume"), *(("--quick",) * quick))),
        exact_step(1_048_576, 500),
        training("unsupervised", 600, 15_625, *bfloat16, *seldom, "--log-every", "100"),
    ]
