"""What the documentation says is so: its code runs, its commands have the options they are given, its links lead
somewhere, and the site builds without a warning. `documents.py` says what is run, and what is only checked and why."""

import contextlib
import html
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from packaging.requirements import Requirement

from simcse_jax.cli import COMMANDS, main, parse
from simcse_jax.commands.ablate import Ablate
from simcse_jax.commands.analyze import Analyze
from simcse_jax.commands.evaluate import Evaluate
from simcse_jax.commands.train import Train
from simcse_jax.config.load import load_config_file
from simcse_jax.data import demo
from simcse_jax.evaluation.sts import STS_TASKS
from simcse_jax.evaluation.transfer_tasks import TRANSFER_TASKS
from simcse_jax.model.build import build_model
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.pretrained.weights import load_params
from simcse_jax.runs.checkpoints import Progress, open_checkpoints
from simcse_jax.runs.folder import create_run
from simcse_jax.runtime.mesh import make_mesh
from simcse_jax.training.spec import StepSpec, create_state
from simcse_jax.training.state import to_items
from tests.documents import (
    CHECKED,
    NOT_RUN,
    OTHER_OPTIONS,
    PAGES,
    ROOT,
    SYNTAX_ONLY,
    Block,
    anchors,
    blocks,
    calls,
    inline,
)


@pytest.fixture(scope="module")
def prepared(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder such as a reader has after `make quickstart`; the model is tiny and hardly trained."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("simcse_jax", "configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setenv("HOME", str(folder))
        patch.delenv("SIMCSE_DATA", raising=False)
        # The demonstration without its encoder, which is an extra package, and without parsing Python's library.
        patch.setattr(demo, "minilm_folder", lambda: tiny_bert)
        patch.setattr(demo, "demo_sentences", lambda: SENTENCES)
        Path("sentences.txt").write_text("\n".join(SENTENCES[:50]) + "\n")
        write_run(Path("runs/quickstart"), tiny_bert)
        main(["export", "runs/quickstart", "runs/quickstart-export"])
        yield folder


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it for one reading of a page, which writes there: a test that was slow runs again."""
    folder = shutil.copytree(prepared, tmp_path / "reader", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    return folder


def write_run(folder: Path, model: Path) -> None:
    """A run as training leaves it, but for the training, which would take longer than all the pages."""
    config, checkpoint = load_config_file("quickstart"), read_checkpoint(model)
    run = create_run(folder, config, "", checkpoint, load_tokenizer(model))
    spec = StepSpec(config, build_model(checkpoint.config, config.model), make_mesh(), 1, 1)
    with open_checkpoints(run.folder, config.checkpoint) as checkpoints:
        checkpoints.save(to_items(create_state(spec, load_params(checkpoint))), 0, Progress(), None)


SENTENCES = [
    f"{who} {does} {where}."
    for who in ("A man", "The dog", "She", "A child", "Nobody")
    for does in ("sleeps", "runs", "sings", "waits", "eats bread", "reads")
    for where in ("at home", "in town", "there")
]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of other packages that pages show
def test_code_runs(page: str, workspace: Path, tmp_path: Path) -> None:
    """The blocks of a page in their order, as a reader would follow it."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            run_python(block, names)
        elif block.language == "sh":
            check_shell(block, tmp_path)
        else:
            assert not re.search(r"^\$? ?simcse-jax(?!:)|^import|^from", block.text), (
                f"{block.place} is not marked as code"
            )


def run_python(block: Block, names: dict[str, object]) -> None:
    """Runs a block in a namespace."""
    if any(block.page == page and block.text.startswith(begin) for page, begin in NOT_RUN):
        return
    if "sentence_transformers" in block.text and importlib.util.find_spec("sentence_transformers") is None:
        return
    padded = "\n" * (block.line - 1) + block.text  # so that a traceback names the line of the page
    exec(compile(padded, ROOT / block.page, "exec"), names)


def check_shell(block: Block, folder: Path) -> None:
    """Checks the calls of a block, and makes them where the block says so."""
    for program, *words in calls(block, folder):
        try:
            check_call(program, words)
            if program == "simcse-jax":
                check_data(parse(words), block)
        except (SystemExit, Exception) as error:
            if not (isinstance(error, SystemExit) and error.code in (0, None)):  # as after --help
                pytest.fail(f"{block.place}: {program} {' '.join(words)}\n{error}", pytrace=False)
        if block.runs:
            assert program == "simcse-jax", f"{block.place}: {program} is not among the programs that can be run here"
            main(words)


def check_call(program: str, words: list[str]) -> None:
    """Checks the arguments of a program without running it."""
    if program == "simcse-jax":
        command = parse(words)
        if isinstance(command, Train):
            command.config.validate()
    elif program in ("python", "python3") and words[:2] == ["-m", "benchmarks"]:
        from benchmarks.__main__ import parse as parse_benchmarks

        parse_benchmarks(words[2:])
    elif program in ("python", "python3"):
        module = importlib.util.find_spec(words[1]) if words[0] == "-m" else (ROOT / words[0]).is_file()
        assert module, f"there is no {words[0]}"
    elif program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert targets
        assert {w for w in words if "=" not in w} <= set(targets[1].split())
    elif program == "pip":
        check_requirements([word for word in words[1:] if not word.startswith("-") and "://" not in word])
    else:
        assert program not in CHECKED
        assert program in SYNTAX_ONLY or (ROOT / program).is_file()


def check_data(command: object, block: Block) -> None:
    """Checks that a command which reads SentEval's data says where they are, or its page does."""
    if isinstance(command, Train | Ablate):
        config = command.config if isinstance(command, Train) else command.ablation.base
        tasks, folder, where = (config.evaluation.dev, *config.evaluation.test), config.evaluation.data, block.text
    elif isinstance(command, Evaluate | Analyze):
        tasks = command.tasks if isinstance(command, Evaluate) else (command.task, *command.tasks)
        folder, where = command.data, (ROOT / block.page).read_text("utf-8")
    else:
        return
    named = {*STS_TASKS, *TRANSFER_TASKS, "sts", "transfer", "full"} & set(tasks)
    assert not named or folder or "SIMCSE_DATA" in where, f"reads {', '.join(named)}: from where?"


def check_requirements(words: list[str]) -> None:
    """Checks that what pip is to install are requirements, and ours with extras that exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        wanted = Requirement(word.replace(".", "simcse-jax", 1) if word.startswith(".") else word)
        assert wanted.name != "simcse-jax" or wanted.extras <= set(extras), f"no such extra: {word}"


def test_ten_minutes(workspace: Path) -> None:
    """The script as it stands, but for its size."""
    code = (ROOT / "examples" / "ten_minutes.py").read_text("utf-8")
    for whole, small in (("batch_size=32", "batch_size=8"), ("max_steps=40", "max_steps=2")):
        assert code.count(whole) == 1
        code = code.replace(whole, small)
    exec(compile(code, "ten_minutes.py", "exec"), {"__name__": "__main__"})
    assert (workspace / "runs" / "ten_minutes_export" / "model.safetensors").is_file()


def test_every_reading_begins_afresh(prepared: Path, workspace: Path) -> None:
    """A test of the fast tier that was slow runs again, and finds nothing of its own in the way."""
    assert {path.name for path in (workspace / "runs").iterdir()} == {"quickstart", "quickstart-export"}
    assert not workspace.samefile(prepared)
    assert workspace.samefile(Path.cwd())


@pytest.fixture(scope="module")
def options(prepared: Path) -> set[str]:
    """Every option of every command, from its help."""

    def shown(*words: str) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            main([*words, "--help"])
        return out.getvalue()

    settings = {"train": "quickstart", "plan": "quickstart", "study": "study_batch_size", "ablate": "dropout"}
    texts = [shown(), *(shown(*name.split(), *([settings[name]] if name in settings else [])) for name in COMMANDS)]
    texts += [path.read_text() for path in (ROOT / "launch").iterdir() if path.is_file()]
    return {option for text in texts for option in re.findall(r"--[a-z][\w.-]*", text)} | set(OTHER_OPTIONS)


@pytest.mark.parametrize("page", PAGES)
def test_options_in_text_exist(page: str, options: set[str]) -> None:
    """Of pages that compare with another program, all but the first column of tables, which has the other's."""
    for column, token in inline(page, "code_inline"):
        if column > 0 or "/from_" not in page:
            unknown = {o.replace("_", "-") for o in re.findall(r"(?<!\S)--[a-z][\w.-]*", token.content)} - options
            assert not unknown, f"{page}: `{token.content}`: no such option {sorted(unknown)}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Also on GitHub, where nothing is built; of other sites only the form of the address is checked."""
    for _, link in inline(page, "link_open"):
        target = urlsplit(str(link.attrs["href"]))
        if target.scheme:
            assert target.scheme == "https", link.attrs["href"]
            assert "." in target.netloc, link.attrs["href"]
            continue
        path = (ROOT / page).parent / target.path if target.path else ROOT / page
        assert path.exists(), f"{page}: {link.attrs['href']} is not there"
        if target.fragment:
            assert target.fragment in anchors(path.resolve().relative_to(ROOT).as_posix()), link.attrs["href"]


def test_no_page_takes_a_name_of_the_sites_own_pages() -> None:
    """Sphinx writes these after ours, and over them."""
    assert not {Path(page).stem for page in PAGES if page.startswith("docs/")} & {"search", "genindex", "py-modindex"}


@pytest.mark.release
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """And every page is there as it is written, the docstrings too."""
    pytest.importorskip("sphinx", reason="Sphinx is not installed: pip install 'simcse-jax[docs]'")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", tmp_path / "trees"]
    done = subprocess.run([*command, ROOT / "docs", site], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for page in (Path(page).relative_to("docs") for page in PAGES if page.startswith("docs/")):
        title = (ROOT / "docs" / page).read_text("utf-8").splitlines()[0].removeprefix("# ").replace("`", "")
        assert f"<h1>{title}<" in (site / page).with_suffix(".html").read_text("utf-8"), page
    written = (site / "objectives.html").read_text("utf-8")
    assert written.count("<math") > 20  # drawn by the browser alone
    assert not re.search(r'<script[^>]*src="http', written)
    api = html.unescape(re.sub("<[^>]*>", "", (site / "api.html").read_text("utf-8")))
    assert "Cosine similarity of every sentence" in api  # the docstrings are there
    # Words before a colon are no type, and types and defaults are those that one would write.
    assert (
        "Sentences (or pairs, or triplets) per step over all devices: the global batch. It must be greater than 0"
        in api
    )
    assert '{"label": "entailment"}' in api
    assert "evaluation: EvaluationConfig = ...," in api
    assert "factors: dict[str, tuple[Any, ...]] = ...," in api
    for noise in ("lambda", "Annotated", "~simcse_jax", "~typing", "<factory>"):
        assert noise not in api
    if shutil.which("chromium") and shutil.which("chromedriver") and importlib.util.find_spec("selenium"):
        nothing_is_cut(site)


def nothing_is_cut(site: Path) -> None:
    """The columns of a page end where the window does, on a laptop and on a phone."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        for width, columns in ((1366, [".content", ".toc-drawer"]), (390, [".content"])):
            screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            for page in ("start", "objectives", "api"):
                driver.get((site / f"{page}.html").as_uri())
                for column in columns:
                    script = "return document.querySelector(arguments[0]).getBoundingClientRect().right"
                    assert driver.execute_script(script, column) <= width, (page, width, column)
                assert driver.execute_script("return document.documentElement.scrollWidth") <= width, (page, width)
    finally:
        driver.quit()
