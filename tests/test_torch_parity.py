"""Live against PyTorch and transformers: hidden states, poolers, where dropout acts, and ten optimisation steps."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simcse_jax import noise
from simcse_jax.config import Config, ObjectiveConfig, OptimizerConfig
from simcse_jax.data.batch import Batch
from simcse_jax.errors import InputError
from simcse_jax.model import Encoder, SentenceEncoder, read_encoder_config
from simcse_jax.model.encoder import ACTIVATIONS
from simcse_jax.model.product import affine
from simcse_jax.poolers import POOLERS
from simcse_jax.pretrained.folders import read_checkpoint
from simcse_jax.pretrained.weights import load_params
from simcse_jax.runtime.mesh import make_mesh
from simcse_jax.training.spec import StepSpec, create_state
from simcse_jax.training.step import make_train_step
from tests.conftest import TINY_BERT, TINY_ROBERTA, full, mask_of

torch = pytest.importorskip("torch", reason="the peer these tests compare with")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # its threads would wait for those of JAX

CONFIGS = {"bert": TINY_BERT, "roberta": TINY_ROBERTA}
PRECISIONS = {"float32": contextlib.nullcontext, "float64": lambda: jax.enable_x64(True)}
N, LENGTH, STEPS = 16, 14, 10


def save_torch_model(folder: Path, config: dict[str, Any], seed: int = 0) -> Any:
    """A random transformers model, also with random biases and LayerNorms, saved to `folder`."""
    name = {"bert": "Bert", "roberta": "Roberta"}[config["model_type"]]
    arguments = {k: v for k, v in config.items() if k != "model_type"}
    torch.manual_seed(seed)
    # transformers takes the attention's form from the config.
    settings = getattr(transformers, f"{name}Config")(**arguments, attn_implementation="eager")
    model = getattr(transformers, f"{name}Model")(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return model.eval()


def random_batch(config: dict[str, Any], rows: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Padded ids and lengths, of which one is the full length and one is 1."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, LENGTH, rows).astype(np.int32)
    lengths.flat[:2] = LENGTH, 1
    ids = generator.integers(5, config["vocab_size"], (*rows, LENGTH)).astype(np.int32)
    return np.where(np.arange(LENGTH) < lengths[..., None], ids, config["pad_token_id"]), lengths


def torch_states(model: Any, ids: np.ndarray, lengths: np.ndarray) -> tuple[Any, Any, Any]:
    """Hidden states, attention mask and pooler output."""
    mask = torch.tensor(np.asarray(mask_of(lengths, ids.shape[-1])))
    out = model(torch.tensor(ids, dtype=torch.long), attention_mask=mask.long(), output_hidden_states=True)
    return out.hidden_states, mask, out.pooler_output


def torch_poolers(model: Any, ids: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """Every pooler, written with torch."""
    states, mask, head = torch_states(model, ids, lengths)

    def mean(x: Any) -> Any:
        return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    return {
        "cls": head,
        "cls_before_pooler": states[-1][:, 0],
        "avg": mean(states[-1]),
        "avg_top2": mean((states[-1] + states[-2]) / 2),
        "avg_first_last": mean((states[-1] + states[1]) / 2),
        "avg_static_last": mean((states[-1] + states[0]) / 2),
        "avg_static": mean(states[0]),
    }


def largest_difference(ours: Any, theirs: Any) -> float:
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs.detach().double().numpy())))


def compare_encoders(folder: Path, config: dict[str, Any], dtype: str, tolerance: float) -> None:
    """Hidden states, also at padding, and all poolers of a fresh model."""
    model = save_torch_model(folder, config).to(getattr(torch, dtype))
    ids, lengths = random_batch(config, (7,))
    with PRECISIONS[dtype]():
        checkpoint = read_checkpoint(folder)
        params = load_params(checkpoint, np.dtype(dtype))
        sizes = jnp.asarray(lengths[:, None])
        states = Encoder(checkpoint.config, jnp.dtype(dtype), jnp.dtype(dtype)).apply(
            {"params": params["encoder"]}, jnp.asarray(ids), sizes
        )
        theirs = torch_states(model, ids, lengths)[0]
        assert len(states) == len(theirs) == config["num_hidden_layers"] + 1
        for i, (a, b) in enumerate(zip(states, theirs, strict=True)):
            assert a.dtype == dtype
            assert largest_difference(a, b) < tolerance, f"hidden state {i}"
        expected = torch_poolers(model, ids, lengths)
        for pooler in POOLERS:
            encoder = SentenceEncoder(checkpoint.config, pooler, False, jnp.dtype(dtype), jnp.dtype(dtype))
            vectors = encoder.apply({"params": params}, jnp.asarray(ids), sizes)[:, 0]
            assert largest_difference(vectors, expected[pooler]) < tolerance, pooler


@pytest.mark.parametrize(
    ("architecture", "dtype", "tolerance"),
    [
        full("bert", "float32", 1e-5),
        ("bert", "float64", 1e-10),
        ("roberta", "float32", 1e-5),
        full("roberta", "float64", 1e-10),
    ],
)
def test_hidden_states_and_poolers(tmp_path: Path, architecture: str, dtype: str, tolerance: float) -> None:
    compare_encoders(tmp_path, CONFIGS[architecture], dtype, tolerance)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "gelu"])
def test_activations(tmp_path: Path, activation: str) -> None:
    compare_encoders(tmp_path, TINY_BERT | {"hidden_act": activation}, "float64", 1e-10)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(InputError, match="hidden_act is 'silu'"):
        read_encoder_config(TINY_BERT | {"hidden_act": "silu"})


def torch_trajectory(
    model: Any, batches: list[tuple[np.ndarray, np.ndarray]], config: Config, weight_decay: float
) -> np.ndarray:
    """Loss and gradient norm by step: SimCSE with hard negatives, in plain PyTorch."""
    objective, settings = config.objective, config.optimizer
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    model.train()
    figures = []
    for step, (ids, lengths) in enumerate(batches):
        z1, z2, z3 = (torch_states(model, ids[:, i], lengths[:, i])[2] for i in range(3))
        cosine = torch.nn.functional.cosine_similarity
        logits = torch.cat([cosine(z1[:, None], z[None, :], dim=-1) for z in (z2, z3)], 1) / objective.temperature
        weight = torch.diag(torch.full((N,), objective.hard_negative_log_weight, dtype=logits.dtype))
        logits = logits + torch.cat([torch.zeros_like(weight), weight], 1)
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(N))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / len(batches))
        optimizer.step()
        figures.append([loss.item(), norm.item()])
    return np.array(figures)


@pytest.mark.parametrize(
    ("architecture", "dtype", "tolerance"),
    [
        full("bert", "float32", 1e-5),
        ("bert", "float64", 1e-9),
        ("roberta", "float32", 1e-5),
        full("roberta", "float64", 1e-9),
    ],
)
def test_ten_steps(tmp_path: Path, architecture: str, dtype: str, tolerance: float) -> None:
    hf_config = CONFIGS[architecture] | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = Config(
        batch_size=N,
        objective=ObjectiveConfig(temperature=0.05, hard_negative_log_weight=0.7),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0),
    )
    batches = [random_batch(hf_config, (N, 3), seed) for seed in range(STEPS)]
    reference = save_torch_model(tmp_path, hf_config).to(getattr(torch, dtype))
    expected = torch_trajectory(reference, batches, config, config.optimizer.weight_decay)
    assert np.all(expected[:, 1] > config.optimizer.clip_norm), "clipping has to act"
    with PRECISIONS[dtype]():
        checkpoint = read_checkpoint(tmp_path)
        params = load_params(checkpoint, np.dtype(dtype))
        model = SentenceEncoder(checkpoint.config, "cls", False, jnp.dtype(dtype), jnp.dtype(dtype))
        mesh = make_mesh(devices=jax.devices()[:1])
        spec = StepSpec(config, model, mesh, 1, STEPS)
        state = create_state(spec, params)
        step = make_train_step(spec, state)
        figures = []
        for ids, lengths in batches:
            state, metrics = step(state, Batch(ids, lengths[..., None], np.ones(N, bool)))
            figures.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    assert np.max(np.abs(np.array(figures) - expected) / expected) < tolerance


def fake_bits(counter: Any) -> Any:
    """Noise of an element's number, which both frameworks can be given."""
    return counter * np.uint32(2654435761) ^ (counter * np.uint32(40503)) >> 7


@pytest.mark.parametrize(
    ("architecture", "pooler"), [("bert", "cls"), full("bert", "avg"), full("roberta", "cls"), ("roberta", "avg")]
)
def test_dropout_acts_where_it_does_in_transformers(
    tmp_path: Path, architecture: str, pooler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same noise given to both, training vectors agree; the two rates differ, so that no place can pass for
    another. Pooler `cls` has its last layer computed at the first token alone."""
    config = CONFIGS[architecture] | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.3}
    reference = save_torch_model(tmp_path, config).double()
    ids, lengths = random_batch(config, (7,))
    still = torch_poolers(reference, ids, lengths)[pooler]
    calls = []

    def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        assert training
        calls.append((tuple(x.shape), p))
        # An element's number: place and feature of a token vector; head, query and key of an attention weight.
        sizes = (config["max_position_embeddings"],) * 2 if x.ndim == 4 else (x.shape[-1],)
        counter = np.zeros((), np.uint32)
        for n, size in zip(x.shape[1:], (1, *sizes), strict=True):
            counter = counter[..., None] * np.uint32(size) + np.arange(n, dtype=np.uint32)
        return x * torch.tensor(fake_bits(counter) >= round(p * 2**32)) / (1 - p)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    expected = torch_poolers(reference.train(), ids, lengths)[pooler]
    assert len(calls) == 1 + 3 * config["num_hidden_layers"]
    with jax.enable_x64(True), monkeypatch.context() as patch:
        patch.setattr(noise, "random_bits", lambda key, counter: fake_bits(counter))
        checkpoint = read_checkpoint(tmp_path)
        model = SentenceEncoder(checkpoint.config, pooler, False, jnp.float64, jnp.float64)
        vectors = model.apply(
            {"params": load_params(checkpoint, np.float64)},
            jnp.asarray(ids),
            jnp.asarray(lengths[:, None]),
            jnp.arange(len(ids))[:, None],
            rngs={"dropout": jax.random.key(0)},
        )
    assert largest_difference(vectors[:, 0], expected) < 1e-10
    assert largest_difference(still.detach().numpy(), expected) > 0.1


def test_every_place_and_layer_has_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the embeddings and three times a layer, each under another key; none in evaluation."""
    config = read_encoder_config(TINY_BERT)
    ids, lengths = random_batch(TINY_BERT, (5,))
    keys: list[Any] = []
    usual = noise.words_of

    def words_of(key: Any, sentences: Any) -> Any:
        jax.debug.callback(lambda x: keys.append(tuple(x.tolist())), jax.random.key_data(key))
        return usual(key, sentences)

    monkeypatch.setattr(noise, "words_of", words_of)
    model = SentenceEncoder(config, "cls")
    sizes = jnp.asarray(lengths[:, None])
    params = model.init(jax.random.key(0), jnp.asarray(ids), sizes)
    model.apply(params, jnp.asarray(ids), sizes, jnp.arange(5)[:, None], rngs={"dropout": jax.random.key(0)})
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 1 + 3 * config.num_hidden_layers
    keys.clear()
    model.apply(params, jnp.asarray(ids), sizes)
    jax.effects_barrier()
    assert keys == []


def test_dropout_zeroes_its_share_and_scales_the_rest() -> None:
    x = jnp.ones((64, 32, 32))
    sentences, counter = jnp.arange(64)[:, None, None], jnp.arange(32 * 32, dtype=jnp.uint32).reshape(1, 32, 32)
    draw = jax.jit(lambda key: noise.dropout(x, noise.drawn(key, sentences), counter, 0.3))
    first, second = (np.asarray(draw(jax.random.key(seed))) for seed in (0, 1))
    np.testing.assert_allclose(np.unique(first), [0, 1 / 0.7], rtol=1e-6)
    deviation = (0.3 * 0.7 / x.size) ** 0.5
    assert abs(np.mean(first == 0) - 0.3) < 5 * deviation
    # Noise of other sentences, and of another key, is independent.
    assert abs(np.mean((first == 0) & (second == 0)) - 0.09) < 5 * deviation
    assert abs(np.mean((first[1:] == 0) & (first[:-1] == 0)) - 0.09) < 5 * deviation


def test_products_of_bfloat16_are_summed_wide() -> None:
    """Rounded once: the factors, and the result; the gradient of the kernel not at all."""
    generator = np.random.default_rng(0)
    x, kernel, g = (generator.normal(size=shape) for shape in ((64, 512), (512, 32), (64, 32)))
    bx, bg = (jnp.asarray(a, jnp.bfloat16) for a in (x, g))
    none = jnp.zeros(32)
    y, back = jax.vjp(lambda x, w: affine(x, w, none, jnp.bfloat16), bx, jnp.asarray(kernel, jnp.float32))
    for_x, for_kernel = back(bg)
    assert (y.dtype, for_x.dtype, for_kernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    wx, wk, wg = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, kernel, g))
    np.testing.assert_array_equal(y, (wx @ wk).astype(jnp.bfloat16))
    np.testing.assert_allclose(for_kernel, wx.T @ wg, rtol=1e-5, atol=1e-5)
