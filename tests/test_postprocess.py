"""Whitening, all-but-the-top and the flow: their mathematics, and the folders they are kept in."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from simcse_jax.cli import main
from simcse_jax.data.demo import demo_similarity
from simcse_jax.errors import InputError
from simcse_jax.evaluation.geometry import average_cosine
from simcse_jax.evaluation.sentences import unlabelled_sentences
from simcse_jax.evaluation.sts import evaluate, load_task
from simcse_jax.inference.encoder import BatchEncoder
from simcse_jax.inference.export import export
from simcse_jax.inference.loading import LoadedModel, load_model
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.postprocess import (
    KEY,
    FitSettings,
    Flow,
    FlowSettings,
    PostProcessor,
    all_but_the_top,
    describe,
    fit,
    fit_flow,
    whitening,
)
from simcse_jax.postprocess.flow import init_flow
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.pretrained.weights import load_params
from simcse_jax.runtime.mesh import make_mesh
from simcse_jax.storage.manifest import MANIFEST
from tests.conftest import SENTENCES

METHODS = [
    FitSettings("whitening"),
    FitSettings("whitening", dim=5),
    FitSettings("all-but-the-top", components=2),
    FitSettings("flow", flow=FlowSettings(steps=2, hidden=8, epochs=3, batch_size=16, learning_rate=1e-3)),
]
IDS = ["whitening", "whitening to 5", "all-but-the-top", "flow"]


def sample(rows: int = 400, width: int = 12, dtype: str = "float64") -> np.ndarray:
    """Correlated vectors that are far from centred and from Gaussian."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, width)) ** 3 @ rng.normal(size=(width, width)) + 5 * rng.normal(size=width)
    return x.astype(dtype)


@pytest.mark.parametrize("dim", [None, 1, 7])
def test_whitened_vectors_have_mean_0_and_covariance_1(dim: int | None) -> None:
    with jax.enable_x64(True):
        x = sample()
        y = np.asarray(whitening(x, dim)(jnp.asarray(x)))
    assert y.shape == (400, dim or 12)
    np.testing.assert_allclose(np.mean(y, axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.atleast_2d(np.cov(y.T, bias=True)), np.eye(dim or 12), atol=1e-6)


def test_fewer_dimensions_are_the_leading_ones() -> None:
    """Those of largest variance, in order, so that whitening to k is the first k columns of whitening to all."""
    x = sample()
    whole, cut = whitening(x), whitening(x, 4)
    np.testing.assert_allclose(np.abs(whole.weight[:, :4]), np.abs(cut.weight), rtol=1e-9)
    spread = 1 / np.linalg.norm(whole.weight, axis=0)
    assert (np.diff(spread) < 0).all()
    np.testing.assert_allclose(spread[0] ** 2, np.linalg.eigvalsh(np.cov(x.T, bias=True))[-1])


def test_directions_that_the_sample_lacks_are_left_out() -> None:
    """Outputs of a LayerNorm, and their means, lie in a hyperplane: whitening would divide by rounding there."""
    x = sample().astype(np.float32)
    x = (x - np.mean(x, axis=1, keepdims=True)) / np.std(x, axis=1, keepdims=True) * np.linspace(1, 2, 12) + 0.3
    assert whitening(x.astype(np.float32)).width == 11
    with pytest.raises(InputError, match="span 11"):
        whitening(x.astype(np.float32), 12)


def test_whitening_to_all_dimensions_ignores_linear_maps() -> None:
    """Cosines after whitening are those of Mahalanobis: any invertible map of the vectors before changes nothing."""
    with jax.enable_x64(True):
        x = sample()
        other = x @ np.random.default_rng(1).normal(size=(12, 12)) - 3.0
        y, z = (np.asarray(whitening(v)(jnp.asarray(v))) for v in (x, other))
    np.testing.assert_allclose(y @ y.T, z @ z.T, atol=1e-8)


@pytest.mark.parametrize(("components", "removed"), [(None, 1), (0, 0), (3, 3)])
def test_the_top_is_gone_and_the_rest_is_as_it_was(components: int | None, removed: int) -> None:
    with jax.enable_x64(True):
        x = sample()
        y = np.asarray(all_but_the_top(x, components)(jnp.asarray(x)))
    np.testing.assert_allclose(np.mean(y, axis=0), 0, atol=1e-9)
    before = np.linalg.svd(x - np.mean(x, axis=0), compute_uv=False)
    after = np.linalg.svd(y, compute_uv=False)
    np.testing.assert_allclose(after, [*before[removed:], *[0] * removed], atol=1e-8 * before[0])


@pytest.fixture(scope="module")
def flow64() -> Flow:
    """A float64 flow whose parameters are all away from where they start."""
    with jax.enable_x64(True):
        flow = init_flow(sample(), FlowSettings(steps=3, hidden=7))
        rng = np.random.default_rng(2)
        return Flow(jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), flow.params), flow.fixed)


def test_a_flow_is_invertible(flow64: Flow) -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(sample())
        z = flow64(x)
        assert np.max(np.abs(z - x)) > 1
        np.testing.assert_allclose(flow64.inverse(z), x, atol=1e-9)
        z = jnp.asarray(np.random.default_rng(4).normal(size=(50, 12)))
        np.testing.assert_allclose(flow64(flow64.inverse(z)), z, atol=1e-9)


@pytest.mark.parametrize("width", [12, 5], ids=["even", "odd"])
def test_the_log_determinant_is_that_of_the_jacobian(flow64: Flow, width: int) -> None:
    with jax.enable_x64(True):
        x = sample(width=width)
        flow = flow64 if width == 12 else init_flow(x, FlowSettings(steps=3, hidden=7, seed=3))
        points = jnp.asarray(x[:20])
        _, log_det = flow.forward(points)
        jacobians = jax.vmap(jax.jacfwd(lambda row: flow(row[None])[0]))(points)
        np.testing.assert_allclose(log_det, jnp.linalg.slogdet(jacobians)[1], atol=1e-9)
        z = np.asarray(flow(points))
        density = -0.5 * np.sum(z**2 + np.log(2 * np.pi), axis=1) + np.asarray(log_det)
        np.testing.assert_allclose(flow.log_likelihood(points), density, atol=1e-9)


def test_actnorm_starts_from_the_data() -> None:
    """In front of the first linear map each coordinate has mean 0 and variance 1."""
    x = sample()
    flow = init_flow(x.astype(np.float32), FlowSettings(steps=2))
    y = (x + flow.params["bias"][0]) * np.exp(flow.params["scale"][0])
    np.testing.assert_allclose(np.mean(y, axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(y, axis=0), 1, atol=1e-5)


def test_fitting_raises_the_likelihood() -> None:
    """Also of vectors that were not seen, and above that of the Gaussian that fits best."""
    x = sample(3000, dtype="float32")
    seen, unseen = x[:2000], x[2000:]
    settings = FlowSettings(steps=4, hidden=16, epochs=20, batch_size=64, learning_rate=3e-3)
    flow, history = fit_flow(seen, settings)
    assert len(history) == 21
    assert history[-1] > max(history[:2])
    before = jnp.mean(init_flow(seen, settings).log_likelihood(jnp.asarray(unseen)))
    after = jnp.mean(flow.log_likelihood(jnp.asarray(unseen)))
    covariance = np.cov(seen.T, bias=True)
    gaussian = -0.5 * (12 * np.log(2 * np.pi * np.e) + np.linalg.slogdet(covariance)[1])
    assert before < after
    assert gaussian < after
    again, _ = fit_flow(seen, settings)
    jax.tree.map(np.testing.assert_array_equal, again, flow)


def raw_vectors(loaded: LoadedModel, sentences: list[str]) -> np.ndarray:
    tokenizer = load_tokenizer(loaded.checkpoint.folder)
    return BatchEncoder(loaded.model, tokenizer, make_mesh())(loaded.params, sentences)


@pytest.fixture(scope="module")
def fitted(tiny_bert: Path, text_file: Path) -> list[LoadedModel]:
    loaded = load_model(tiny_bert, "avg_static_last")
    vectors = raw_vectors(loaded, text_file.read_text().splitlines())
    return [loaded.with_postprocessor(*fit(vectors, settings)) for settings in METHODS]


@pytest.mark.parametrize("number", range(len(METHODS)), ids=IDS)
def test_a_saved_post_processor_is_applied_wherever_the_model_is(
    tmp_path: Path, fitted: list[LoadedModel], tiny_bert: Path, number: int
) -> None:
    loaded = fitted[number]
    folder = export(loaded, tmp_path / "model")
    again = load_model(folder)
    assert again.model == loaded.model
    assert (again.width, again.pooler) == (5 if METHODS[number].dim else 32, "avg_static_last")
    for name in ("method", "sentences", "width"):
        assert again.postprocessor[name] == loaded.postprocessor[name]
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(loaded.params), strict=True):
        np.testing.assert_array_equal(a, b)

    post: PostProcessor = loaded.params[KEY]
    expected = post(jnp.asarray(raw_vectors(load_model(tiny_bert, "avg_static_last"), SENTENCES)))
    np.testing.assert_allclose(raw_vectors(again, SENTENCES), expected, atol=2e-5)
    model = SimCSE(folder)
    np.testing.assert_allclose(model.encode(SENTENCES, normalize=False), expected, atol=2e-5)
    assert model.encode([]).shape == (0, again.width)

    twice = export(again, tmp_path / "twice")
    for file in folder.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (twice / file.relative_to(folder)).read_bytes(), file


@pytest.mark.parametrize("number", range(3), ids=IDS[:3])
def test_sentence_transformers_gives_the_same_vectors(tmp_path: Path, fitted: list[LoadedModel], number: int) -> None:
    library = pytest.importorskip("sentence_transformers", reason="reads the export")
    folder = export(fitted[number], tmp_path / "model")
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(SENTENCES)
    ours = SimCSE(folder).encode(SENTENCES, normalize=False)
    assert np.max(np.abs(theirs - ours)) < 1e-5 * max(1, np.max(np.abs(ours)))


@pytest.mark.parametrize(
    ("pooler", "settings"),
    [
        ("avg", FitSettings("whitening", dim=128)),
        ("avg_static", FitSettings("all-but-the-top")),
        ("cls", FitSettings("whitening", dim=128)),
    ],
    ids=["avg", "avg_static", "cls"],
)
def test_sentence_transformers_gives_the_same_vectors_of_a_real_model(
    tmp_path: Path, minilm: Path, pooler: str, settings: FitSettings
) -> None:
    """After each kind of module that can stand in front."""
    library = pytest.importorskip("sentence_transformers", reason="reads the export")
    sentences = unlabelled_sentences(str(demo_similarity("test")))
    loaded = load_model(minilm, pooler)
    folder = export(loaded.with_postprocessor(*fit(raw_vectors(loaded, sentences), settings)), tmp_path / "model")
    del loaded  # one copy per device
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(sentences[:60], normalize_embeddings=True)
    assert np.max(np.abs(theirs - SimCSE(folder).encode(sentences[:60]))) < 1e-5


def test_no_other_library_takes_a_flow_for_the_encoder(tmp_path: Path, fitted: list[LoadedModel]) -> None:
    folder = export(fitted[3], tmp_path / "model")
    card = (folder / "README.md").read_text("utf-8")
    assert "Only simcse_jax applies this flow" in card
    assert "SentenceTransformer" not in card
    assert 'SimCSE("this folder")' in card
    library = pytest.importorskip("sentence_transformers", reason="must refuse the export")
    for trust in (False, True):
        with pytest.raises((ImportError, ValueError), match="only_simcse_jax_applies_this_flow"):
            library.SentenceTransformer(str(folder), device="cpu", trust_remote_code=trust)


@pytest.fixture(scope="module")
def pairs() -> str:
    return str(demo_similarity("dev"))


def test_anisotropic_vectors_gain(minilm: Path) -> None:
    """The static vectors of all-MiniLM-L6-v2 score better whitened and without their top, fitted without labels."""
    task = load_task(str(demo_similarity("test")), "")
    loaded = load_model(minilm, "avg_static")
    vectors = raw_vectors(loaded, unlabelled_sentences(task.name))

    def score(model: LoadedModel) -> float:
        return evaluate([task], lambda sentences: raw_vectors(model, sentences))["reported"]["Avg."]

    before = score(loaded)
    for settings in (FitSettings("whitening", dim=128), FitSettings("all-but-the-top")):
        model = loaded.with_postprocessor(*fit(vectors, settings))
        assert score(model) > before + 1
        assert abs(average_cosine(raw_vectors(model, unlabelled_sentences(task.name)))) < 0.02
    assert average_cosine(vectors) > 0.3


def test_the_command_on_text_and_on_tasks(
    tmp_path: Path, tiny_bert: Path, text_file: Path, pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["postprocess", str(tiny_bert), str(text_file), str(tmp_path / "white"), "--pooler", "avg"]
    main([*arguments, "--dim", "16", "--limit", "150"])
    assert "whitening to width 16, fitted to 150 sentences of sentences.txt" in capsys.readouterr().out
    main(
        ["postprocess", str(tiny_bert), pairs, str(tmp_path / "top"), "--pooler", "avg", "--method", "all-but-the-top"]
    )
    about = json.loads((tmp_path / "top" / "config.json").read_text())["simcse_jax"]["postprocess"]
    assert about["components"] == 1
    assert about["source"] == "demo_sts_dev.tsv"

    scores = tmp_path / "scores.json"
    main(["evaluate", str(tmp_path / "white"), "--tasks", pairs, "--json", str(scores)])
    loaded = load_model(tmp_path / "white")
    expected = evaluate([load_task(pairs, "")], lambda sentences: raw_vectors(loaded, sentences))["reported"]["Avg."]
    assert json.loads(scores.read_text())["models"][0]["sts"]["reported"]["Avg."] == pytest.approx(expected, abs=1e-3)
    vectors = tmp_path / "vectors.npy"
    main(["encode", str(tmp_path / "white"), str(text_file), str(vectors), "--no-normalize"])
    covariance = np.cov(np.load(vectors)[:150].T, bias=True)
    np.testing.assert_allclose(covariance, np.eye(16), atol=1e-2)


def test_sentences_of_tasks_are_of_all_splits(real_data: Path) -> None:
    data = real_data / "senteval"
    found = unlabelled_sentences("STSBenchmark", data)
    for mode in ("dev", "test"):
        task = load_task("STSBenchmark", data, mode)
        assert set(task.subsets[0].first) <= set(found)
    assert len(found) == len(set(found))
    assert len(unlabelled_sentences("STSBenchmark,SICKRelatedness", data)) > len(found)


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    """The error of a postprocess command, which must leave nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["postprocess", *arguments])
    assert ended.value.code == 2
    assert sorted(tmp_path.rglob("*")) == before
    return capsys.readouterr().err


def test_bad_input(
    tmp_path: Path, tiny_bert: Path, text_file: Path, pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text, out = str(tiny_bert), str(text_file), str(tmp_path / "out")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    avg = ["--pooler", "avg"]
    cases = {
        "no file": (model, "absent.txt", out, *avg),
        "holds no sentence": (model, str(tmp_path / "blank.txt"), out, *avg),
        "unknown task 'STSBenchmrk'": (model, "STSBenchmrk", out, *avg),
        "exists and is not an empty folder": (model, text, str(tmp_path / "full"), *avg),
        "blank.txt is not a folder": (model, text, str(tmp_path / "blank.txt" / "out"), *avg),
        "give the pooler": (model, text, out),
        "only whitening uses it": (model, text, out, *avg, "--method", "flow", "--dim", "8"),
        "only all-but-the-top uses it": (model, text, out, *avg, "--components", "2"),
        "dim is 33; it must be from 1 to the width of the vectors, 32": (model, text, out, *avg, "--dim", "33"),
        "span 9: give more distinct sentences": (model, text, out, *avg, "--limit", "10", "--dim", "16"),
        "limit is 0": (model, text, out, *avg, "--limit", "0"),
        "components is 32": (model, text, out, *avg, "--method", "all-but-the-top", "--components", "32"),
        "fitted in batches of 128": (model, pairs, out, *avg, "--method", "flow", "--limit", "100"),
        "flow.epochs is 0": (model, text, out, *avg, "--method", "flow", "--flow.epochs", "0"),
        "the flow diverged": (model, text, out, *avg, "--method", "flow", "--flow.learning-rate", "1e6"),
        "cannot be fitted to 1 vectors": (model, text, out, *avg, "--limit", "1"),
    }
    for message, arguments in cases.items():
        assert message in refused(capsys, tmp_path, *arguments), message


def test_a_damaged_or_misused_folder(tmp_path: Path, fitted: list[LoadedModel]) -> None:
    folder = export(fitted[1], tmp_path / "model")
    with pytest.raises(InputError, match="fitted to vectors of pooler avg_static_last, not cls"):
        load_model(folder, "cls")
    assert load_model(folder, "avg_static_last").postprocessor
    with pytest.raises(InputError, match="has a post-processor already \\(whitening to width 5"):
        load_model(folder).check_no_postprocessor()

    (folder / MANIFEST).unlink()  # which would say it before
    config, weights = folder / "config.json", folder / "3_Dense" / "model.safetensors"
    about = json.loads(config.read_text())
    tensors = load_file(weights)

    def damage(message: str, **changes: object) -> None:
        settings = {**about["simcse_jax"], KEY: {**about["simcse_jax"][KEY], **changes}}
        config.write_text(json.dumps({**about, "simcse_jax": settings}))
        with pytest.raises(InputError, match=message):
            load_model(folder)

    damage("method is 'magic'; expected one of", method="magic")
    damage("whose file .* is missing", folder="4_Dense")
    damage(r"of shape \[5, 32\], config.json asks for \[6, 32\]", width=6)
    save_file({"linear.weight": tensors["linear.weight"]}, weights)
    damage("lacks 'linear.bias'")
    weights.write_bytes(b"broken")
    damage("cannot be read")


def test_training_starts_from_the_encoder_alone(tmp_path: Path, fitted: list[LoadedModel]) -> None:
    """A post-processor is fitted to weights that training changes: it stays behind."""
    folder = export(fitted[0], tmp_path / "model")
    checkpoint = read_checkpoint(folder)
    assert KEY not in load_params(checkpoint)


def test_descriptions() -> None:
    about = {"method": "whitening", "sentences": 1234, "width": 256}
    assert describe({**about, "source": "wiki.txt"}) == "whitening to width 256, fitted to 1,234 sentences of wiki.txt"
    assert describe({**about, "method": "flow"}) == "flow, fitted to 1,234 sentences"


def test_vectors_that_are_not_finite_are_refused() -> None:
    x = sample()
    x[3, 4] = np.nan
    with pytest.raises(InputError, match="not finite"):
        fit(x, replace(METHODS[0]))
