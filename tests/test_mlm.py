"""The masked language model: against PyTorch, its masks, on any mesh and in chunks, and a BERT pretrained with it."""

import contextlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from simcse_jax import rng
from simcse_jax.cli import main
from simcse_jax.config import Config, MLMConfig, ModelConfig, ObjectiveConfig, SmoothingConfig
from simcse_jax.data.batch import Batch
from simcse_jax.errors import InputError
from simcse_jax.inference.export import export
from simcse_jax.inference.loading import load_model
from simcse_jax.model import SentenceEncoder, build_mlm_head, init_mlm_head, read_encoder_config
from simcse_jax.model.build import build_model, init_params
from simcse_jax.objectives.mlm import Vocabulary, block_size, cross_entropy, mask_tokens
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.tokenizers import load_tokenizer
from simcse_jax.pretrained.weights import load_params, to_tensors
from simcse_jax.runs.folder import open_run
from simcse_jax.runtime.mesh import make_mesh, put, put_batch, state_sharding
from simcse_jax.training.loss import make_loss
from simcse_jax.training.spec import StepSpec
from simcse_jax.xla.collectives import collectives
from simcse_jax.xla.flops import matrix_flops
from simcse_jax.xla.hlo import parse
from tests.conftest import TINY_BERT, TINY_ROBERTA, full, mask_of, relative_error, tree_error, without_key_biases
from tests.test_step import batches

CONFIGS = {"bert": TINY_BERT | {"hidden_act": "gelu_new"}, "roberta": TINY_ROBERTA}
PRECISIONS = {"float32": contextlib.nullcontext, "float64": lambda: jax.enable_x64(True)}
VOCABULARY = Vocabulary(mask=4, special=(0, 1, 2, 3, 4), size=120)
SMALL = TINY_BERT | {"num_hidden_layers": 2}
N, LENGTH = 24, 12


def save_torch_model(folder: Path, config: dict[str, Any]) -> Any:
    """A random model of transformers with its prediction head, biases and LayerNorms random too."""
    torch = pytest.importorskip("torch", reason="the peer this test compares with")
    transformers = pytest.importorskip("transformers")
    name = {"bert": "Bert", "roberta": "Roberta"}[config["model_type"]]
    torch.manual_seed(0)
    arguments = {k: v for k, v in config.items() if k != "model_type"}
    settings = getattr(transformers, f"{name}Config")(**arguments, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForMaskedLM")(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return model.eval()


def numbered(rows: int, length: int) -> tuple[Any, Any]:
    """The number of each row's sentence, and the places of its tokens."""
    return jnp.arange(rows)[:, None], jnp.arange(length)[None, :]


def logits_of(model: SentenceEncoder, params: Any, mlm: Any, ids: np.ndarray, lengths: Any) -> np.ndarray:
    """Logits [B, L, V] without dropout."""

    @jax.jit
    def apply(params: Any, mlm: Any) -> Any:
        states = model.apply(
            {"params": params}, jnp.asarray(ids), jnp.asarray(lengths[:, None]), method=SentenceEncoder.hidden_states
        )
        head = build_mlm_head(model.config, model.dtype, model.param_dtype)
        table = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
        return head.apply({"params": mlm}, states[-1].reshape(-1, states[-1].shape[-1]), table)

    return np.asarray(apply(params, mlm)).reshape(*ids.shape, -1)


def random_ids(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [7, L] padded on the right, and their lengths."""
    generator = np.random.default_rng(0)
    lengths = np.array([LENGTH, 1, 5, 9, 3, 12, 7], np.int32)
    ids = generator.integers(5, config["vocab_size"], (7, LENGTH)).astype(np.int32)
    return np.where(np.arange(LENGTH) < lengths[:, None], ids, config["pad_token_id"]), lengths


@pytest.mark.parametrize(
    ("architecture", "dtype", "tolerance"),
    [
        full("bert", "float32", 1e-5),
        ("bert", "float64", 1e-12),
        ("roberta", "float32", 1e-5),
        full("roberta", "float64", 1e-12),
    ],
)
def test_logits_loss_and_gradient_are_those_of_pytorch(
    tmp_path: Path, architecture: str, dtype: str, tolerance: float
) -> None:
    """Logits at every token; then cross-entropy and the gradient of every weight, without dropout, the decoder tied."""
    config = CONFIGS[architecture] | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    reference = save_torch_model(tmp_path, config)
    import torch

    reference = reference.to(getattr(torch, dtype))
    ids, lengths = random_ids(config)
    with PRECISIONS[dtype]():
        checkpoint = read_checkpoint(tmp_path)
        params = load_params(checkpoint, np.dtype(dtype), mlm=True)
        objective = ObjectiveConfig(contrastive_weight=0.0, mlm=MLMConfig(weight=1.0, probability=0.5))
        run = Config(batch_size=7, model=ModelConfig(pooler="avg", dtype=dtype), objective=objective)  # type: ignore[arg-type]
        model = build_model(checkpoint.config, run.model)
        params["head"] = {"dense": {"kernel": np.zeros((32, 32), dtype), "bias": np.zeros(32, dtype)}}
        inside = mask_of(lengths, LENGTH)
        logits = logits_of(model, params, params["mlm"], ids, lengths)

        mesh = make_mesh(devices=jax.devices()[:1])
        function = jax.grad(make_loss(StepSpec(run, model, mesh, 1, 1, VOCABULARY), params), has_aux=True)
        batch = Batch(jnp.asarray(ids[:, None]), jnp.asarray(lengths[:, None, None]), jnp.ones(7, bool))
        grads, (metrics, _) = jax.jit(function)(params, None, np.int32(3), batch)
        key = rng.key(run.seed, "mlm", 3)
        masked, chosen = mask_tokens(
            key, jnp.arange(7)[:, None], jnp.arange(LENGTH)[None, :], jnp.asarray(ids), inside, VOCABULARY, 0.5
        )
        names = to_tensors(jax.tree.map(np.asarray, grads), checkpoint.config)

    attention = torch.tensor(np.asarray(inside)).long()
    expected = reference(torch.tensor(ids).long(), attention_mask=attention).logits.detach().numpy()
    assert np.max(np.abs(logits - expected)) < tolerance
    labels = np.where(np.asarray(chosen), ids, -100)
    out = reference(
        torch.tensor(np.asarray(masked)).long(), attention_mask=attention, labels=torch.tensor(labels).long()
    )
    out.loss.backward()
    assert float(metrics["mlm"]) == pytest.approx(out.loss.item(), rel=tolerance)
    right = (out.logits.argmax(-1).numpy() == labels).sum() / (labels >= 0).sum()
    assert float(metrics["mlm_accuracy"]) == pytest.approx(right, rel=1e-6)
    for name, parameter in reference.named_parameters():
        # Softmax ignores a key bias: its gradient is rounding noise.
        error = np.max(np.abs(names[name] - parameter.grad.numpy())) if "key.bias" in name else 0.0
        if "key.bias" not in name:
            error = relative_error(names[name], parameter.grad.numpy())
        assert error < 10 * tolerance, name


def test_masks_are_drawn_as_stated() -> None:
    """15 % of the tokens that are not special; of these 80 / 10 / 10 %; within four standard deviations."""
    rows, length, size = 400, 64, 1000
    vocabulary = Vocabulary(mask=4, special=(0, 1, 2, 3, 4, 700), size=size)
    generator = np.random.default_rng(0)
    ids = generator.integers(5, size, (rows, length)).astype(np.int32)
    ids[:, 0], ids[:, 9], ids[:, 20] = 2, 3, 700
    inside = np.arange(length)[None, :] < generator.integers(30, length + 1, (rows, 1))
    draw = jax.jit(
        lambda key: mask_tokens(
            key,
            jnp.arange(rows)[:, None],
            jnp.arange(length)[None, :],
            jnp.asarray(ids),
            jnp.asarray(inside),
            vocabulary,
            0.15,
        )
    )
    masked, chosen = map(np.asarray, draw(jax.random.key(1)))
    open_to = inside & ~np.isin(ids, vocabulary.special)
    assert not chosen[~open_to].any()
    np.testing.assert_array_equal(masked[~chosen], ids[~chosen])

    def near(count: Any, total: Any, share: float) -> bool:
        return bool(abs(count / total - share) < 4 * (share * (1 - share) / total) ** 0.5)

    assert near(chosen.sum(), open_to.sum(), 0.15)
    replaced = masked[chosen] == 4
    kept = masked[chosen] == ids[chosen]
    assert near(replaced.sum(), chosen.sum(), 0.8)
    assert near(kept.sum(), chosen.sum(), 0.1 + 0.1 / size)
    others = masked[chosen][~replaced & ~kept]
    assert others.min() >= 0
    assert others.max() < size
    assert abs(others.mean() - size / 2) < 4 * size / (12 * len(others)) ** 0.5
    # Another key, and another sentence, choose independently; the same sentence alone chooses the same.
    again = np.asarray(draw(jax.random.key(2))[1])
    both = open_to.sum()
    assert near((chosen & again).sum(), both, 0.15**2)
    assert near((chosen[1:] & chosen[:-1]).sum(), (open_to[1:] & open_to[:-1]).sum(), 0.15**2)
    sentences, places = numbered(9, length)
    alone = mask_tokens(
        jax.random.key(1), sentences[7:], places, jnp.asarray(ids[7:9]), jnp.asarray(inside[7:9]), vocabulary, 0.15
    )
    np.testing.assert_array_equal(alone[0], masked[7:9])


@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
def test_every_chosen_token_counts_once(share: float) -> None:
    """In blocks of any size, value and gradient are those of all logits at once."""
    generator = np.random.default_rng(0)
    hidden, table = (jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in ((50, 8), (30, 8)))
    targets = jnp.asarray(generator.integers(0, 30, 50), jnp.int32)
    chosen = jnp.asarray(generator.random(50) < share)

    def whole(hidden: Any, table: Any) -> Any:
        loss = -jnp.take_along_axis(jax.nn.log_softmax(hidden @ table.T), targets[:, None], axis=1)[:, 0]
        return jnp.sum(jnp.where(chosen, loss, 0) * jnp.arange(50))

    def blocks(hidden: Any, table: Any, block: int) -> Any:
        loss, correct = cross_entropy(lambda x: x @ table.T, hidden, targets, chosen, block)
        assert loss.shape == correct.shape == (50,)
        return jnp.sum(loss * jnp.arange(50))

    expected = jax.value_and_grad(whole, (0, 1))(hidden, table)
    for block in (1, 7, 50, block_size(50, 0.15)):
        value, grads = jax.value_and_grad(blocks, (0, 1))(hidden, table, block)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        for a, b in zip(grads, expected[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def settings(contrastive: float, mlm: float) -> ObjectiveConfig:
    return ObjectiveConfig(contrastive_weight=contrastive, mlm=MLMConfig(weight=mlm))


@cache
def gradients(
    data: int, fsdp: int, micro_batch: int, columns: int, contrastive: float, mlm: float, valid: int = N
) -> tuple[dict[str, float], Any, str]:
    """Metrics, the gradient of every weight with dropout on, and the compiled program."""
    mesh = make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    run = Config(batch_size=N, micro_batch=micro_batch, objective=settings(contrastive, mlm))
    model = build_model(read_encoder_config(SMALL), run.model)
    params = jax.jit(lambda: init_params(model, 7))()
    if mlm:
        table = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
        params["mlm"] = init_mlm_head(jax.random.key(1), table, 0.2)
    params = put(params, state_sharding(mesh, params))
    batch = batches(columns, 2, N)[0]._replace(valid=np.arange(N) < valid)
    placed = put_batch(mesh, N, lambda rows: jax.tree.map(lambda x: x[rows], batch))
    loss = make_loss(StepSpec(run, model, mesh, 1, 1, VOCABULARY), params)
    compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(params, None, np.int32(1), placed).compile()
    grads, (metrics, _) = compiled(params, None, np.int32(1), placed)
    return {name: float(x) for name, x in metrics.items()}, jax.tree.map(np.asarray, grads), compiled.as_text()


@pytest.mark.parametrize("how", [(8, 1, 0), full((1, 8, 0)), (4, 2, 2), full((1, 1, 7))], ids=str)
def test_any_mesh_and_any_chunk_is_one_device(how: tuple[int, int, int]) -> None:
    """The last batch of an epoch, in which some rows do not count."""
    expected, expected_grads, _ = gradients(1, 1, 0, 1, 1.0, 0.5, N - 5)
    metrics, grads, _ = gradients(*how, 1, 1.0, 0.5, N - 5)
    assert metrics.keys() == expected.keys()
    for name in ("loss", "contrastive", "mlm", "mlm_accuracy"):
        assert metrics[name] == pytest.approx(expected[name], rel=5e-6), name
    assert tree_error(without_key_biases(grads), without_key_biases(expected_grads)) < 1e-5


@pytest.mark.program
def test_gradients_are_summed_over_devices_once() -> None:
    """Those of both passes together: what is summed is as much as there are weights, and the keys' gradient."""
    _, grads, text = gradients(8, 1, 0, 1, 1.0, 0.5, N - 5)
    found = [c for c in collectives(parse(text)) if c.kind in ("all-reduce", "reduce-scatter")]
    summed = sum(np.prod(shape) * (c.count or 1) for c in found for kind, shape in c.arrays if kind == "f32")
    weights = sum(x.size for x in jax.tree.leaves(grads))
    assert summed <= weights + N * SMALL["hidden_size"] + 100


def test_rows_that_do_not_count_change_nothing() -> None:
    """The mean is over the tokens of the rows that count."""
    whole, some = gradients(1, 1, 0, 1, 0.0, 1.0)[0], gradients(1, 1, 0, 1, 0.0, 1.0, 5)[0]
    assert whole["mlm"] != some["mlm"]
    assert gradients(1, 1, 0, 1, 0.0, 1.0, 0)[0]["mlm"] == 0


@pytest.mark.parametrize("columns", [1, 3])
def test_the_loss_is_the_weighted_sum(columns: int) -> None:
    """The contrast is as without the auxiliary, to the bit of its inputs; so is the auxiliary with three sentences."""
    contrast, contrast_grads, _ = gradients(1, 1, 0, columns, 1.0, 0.0)
    both, grads, _ = gradients(1, 1, 0, columns, 2.0, 0.5)
    assert "mlm" not in contrast
    assert both["contrastive"] == pytest.approx(contrast["loss"], rel=1e-6)
    assert both["loss"] == pytest.approx(2 * both["contrastive"] + 0.5 * both["mlm"], rel=1e-6)
    assert np.abs(grads["mlm"]["dense"]["kernel"]).max() > 0
    if columns == 3:
        alone, alone_grads, _ = gradients(1, 1, 0, columns, 0.0, 1.0)
        assert alone.keys() == {"loss", "mlm", "mlm_accuracy"}
        assert both["mlm"] == pytest.approx(alone["mlm"], rel=1e-6)
        terms = contrast_grads | {"mlm": jax.tree.map(np.zeros_like, grads["mlm"])}, alone_grads
        expected = jax.tree.map(lambda a, b: 2 * a + 0.5 * b, *terms)
        assert tree_error(without_key_biases(grads), without_key_biases(expected)) < 1e-5


def test_without_contrast_sentences_are_encoded_once() -> None:
    def flops(contrastive: float, mlm: float) -> int:
        run = Config(batch_size=N, objective=settings(contrastive, mlm))
        mesh, model = make_mesh(devices=jax.devices()[:1]), build_model(read_encoder_config(SMALL), run.model)
        params = jax.eval_shape(lambda: init_params(model, 0))
        table = params["encoder"]["embeddings"]["word_embeddings"]["embedding"]
        params["mlm"] = jax.eval_shape(lambda t: init_mlm_head(jax.random.key(0), t, 0.02), table)
        batch = jax.tree.map(jnp.asarray, batches(1, 1, N)[0])
        loss = make_loss(StepSpec(run, model, mesh, 1, 1, VOCABULARY), params)
        return matrix_flops(jax.make_jaxpr(loss)(params, None, np.int32(0), batch)).total()

    contrast, both, alone = flops(1.0, 0.0), flops(1.0, 1.0), flops(0.0, 1.0)
    # Two masked passes beside the contrast, one without it, each as much as half of the contrast's encoding.
    assert both - contrast > 0.9 * contrast
    assert alone < 0.7 * (both - contrast)


def change(folder: Path, **tensors: Any) -> None:
    path = folder / "model.safetensors"
    save_file({n: x for n, x in {**load_file(path), **tensors}.items() if x is not None}, path)


def test_heads_of_checkpoints(tmp_path: Path, tiny_bert: Path) -> None:
    """Read where asked for and there, under any of its names; a decoder that is not tied is refused."""
    assert "mlm" not in load_params(read_checkpoint(tiny_bert), mlm=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_bert / name).read_bytes())
    words = load_file(tmp_path / "model.safetensors")["embeddings.word_embeddings.weight"]
    generator = np.random.default_rng(0)
    shapes = {"transform.dense.weight": (32, 32), "transform.dense.bias": (32,), "decoder.bias": (120,)}
    shapes |= {"transform.LayerNorm.gamma": (32,), "transform.LayerNorm.beta": (32,)}
    tensors = {f"cls.predictions.{n}": generator.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    change(tmp_path, **tensors, **{"cls.predictions.decoder.weight": words})
    read = load_params(read_checkpoint(tmp_path), mlm=True)["mlm"]
    np.testing.assert_array_equal(read["dense"]["kernel"], tensors["cls.predictions.transform.dense.weight"].T)
    np.testing.assert_array_equal(read["layer_norm"]["scale"], tensors["cls.predictions.transform.LayerNorm.gamma"])
    np.testing.assert_array_equal(read["bias"], tensors["cls.predictions.decoder.bias"])
    assert "mlm" not in load_params(read_checkpoint(tmp_path))

    change(tmp_path, **{"cls.predictions.transform.dense.bias": None})
    with pytest.raises(InputError, match=r"missing cls\.predictions\.transform\.dense\.bias"):
        load_params(read_checkpoint(tmp_path), mlm=True)
    bias = {name: x for name, x in tensors.items() if name.endswith("transform.dense.bias")}
    change(tmp_path, **bias, **{"cls.predictions.decoder.weight": words + 1})
    with pytest.raises(InputError, match=r"cls\.predictions\.decoder\.weight that differs from its embeddings"):
        load_params(read_checkpoint(tmp_path), mlm=True)
    load_params(read_checkpoint(tmp_path))


@pytest.mark.full
def test_pretrain_export_and_go_on(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From text alone to a BERT that transformers and the next run load with its head."""
    base, run, exported = (str(tmp_path / name) for name in ("base", "run", "exported"))
    sizes = ["--size", "200", "--layers", "2", "--hidden", "32", "--intermediate", "48", "--positions", "40"]
    main(["vocabulary", str(text_file), base, *sizes])
    words = (Path(base) / "vocab.txt").read_text().split()
    assert words[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert {"river", "house"} <= set(words)
    tokenizer = load_tokenizer(base)
    assert tokenizer.tokenize("red HOUSE") == ["red", "house"]

    options = ["--data.train", str(text_file), "--data.cache", str(tmp_path / "cache"), "--data.max-length", "12"]
    options += ["--batch-size", "16", "--log-every", "1", "--optimizer.warmup-steps", "0"]
    main(["train", "pretrain_mlm", "--model.path", base, "--output", run, *options, "--max-steps", "5"])
    printed = capsys.readouterr().out
    assert "batch     16 over all devices: no contrast" in printed
    assert "masked    15% of the tokens of every sentence, weight 1, its head fresh" in printed

    loaded = load_model(run)
    assert loaded.mlm is not None
    assert open_run(Path(run)).config.objective.mlm.weight == 1
    assert "mlm" not in loaded.params
    export(loaded, exported)
    again = load_params(read_checkpoint(exported), mlm=True)
    jax.tree.map(np.testing.assert_array_equal, again, {**loaded.params, "mlm": loaded.mlm})

    main(
        [
            *("train", "unsup_bert_base", "--model.path", exported, "--output", str(tmp_path / "next"), *options),
            *("--max-steps", "2", "--objective.mlm.weight", "0.1", "--evaluation.dev", ""),
        ]
    )
    assert "weight 0.1, its head from the checkpoint" in capsys.readouterr().out
    plain = load_file(export(load_model(tmp_path / "next"), tmp_path / "plain") / "model.safetensors")
    assert not any(name.startswith(("cls.", "bert.")) for name in plain)

    torch = pytest.importorskip("torch", reason="reads the export")
    from transformers import AutoModel, AutoModelForMaskedLM

    model, found = AutoModelForMaskedLM.from_pretrained(exported, output_loading_info=True)
    assert type(model).__name__ == "BertForMaskedLM"
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    assert not AutoModel.from_pretrained(exported, output_loading_info=True)[1]["missing_keys"]
    ids = np.array([[2, 7, 4, 9, 3]], np.int32)
    params, mlm = jax.tree.map(np.asarray, (loaded.params, loaded.mlm))
    logits = logits_of(loaded.model, params, mlm, ids, np.array([ids.shape[1]]))
    with torch.no_grad():
        expected = model.eval()(torch.tensor(ids).long()).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (settings(0.0, 0.0), "both 0: nothing is left to minimise"),
        (settings(-1.0, 0.1), "objective.contrastive_weight is -1.0; it must be 0 or more"),
        (settings(1.0, float("inf")), "objective.mlm.weight is inf; it must be a finite number"),
        (ObjectiveConfig(mlm=MLMConfig(0.1, 0.0)), "it must be above 0 and at most 1"),
        (replace(settings(0.0, 1.0), smoothing=SmoothingConfig(weight=0.1)), "smoothing is a part of the contrast"),
    ],
)
def test_settings_that_no_run_can_use(objective: ObjectiveConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(objective=objective, data=replace(Config().data, train="x.txt")).validate()


def test_a_vocabulary_that_cannot_be_made(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["vocabulary", str(text_file), str(tmp_path / "out"), *arguments])
        return capsys.readouterr().err

    assert "size is 3; it must be at least 6" in error("--size", "3")
    assert "hidden is 30, which heads, 4, does not divide" in error("--hidden", "30")
    assert not (tmp_path / "out").exists()
