"""A battery of tests of the dropout noise, under the keys that training makes."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt32
from scipy import stats

from benchmarks.report import Table
from simcse_jax import rng
from simcse_jax.data.batch import Batch
from simcse_jax.model import EncoderConfig, SentenceEncoder
from simcse_jax.model.build import init_params
from simcse_jax.model.encoder import Dropout
from simcse_jax.noise import Words, below, random_bits
from simcse_jax.training.loss import encode_views

Bits = Callable[[Words, UInt32[Array, "..."]], UInt32[Array, "..."]]
Sums = dict[str, Any]

LEVEL = 0.01
"""The noise fails where one test's p, times the number of tests, is below it."""
_LAGS = (1, 2, 3, 5, 8, 13)
_THIN = 4  # of as many groups, one also meets the tests that take long
_GAPS = 60


@dataclass(frozen=True)
class Shape:
    """The draws of a key, which a layer reads as positions × features or as heads × queries × keys, and the keys."""

    layers: int = 12
    sentences: int = 128
    """Two views of half as many examples."""
    positions: int = 32
    features: int = 768
    heads: int = 24

    @property
    def draws(self) -> int:
        """Draws per key."""
        return self.positions * self.features

    @property
    def places(self) -> int:
        """Places in the network that have noise of their own: the embeddings, and three in each layer."""
        return 1 + 3 * self.layers

    @property
    def lags(self) -> tuple[int, ...]:
        """Distances of the draws of a key that are compared: neighbours, and those a position and a head apart."""
        return (*_LAGS, self.features, self.draws // self.heads)

    @property
    def flips(self) -> int:
        """Bits of the counter whose flip stays among a key's draws."""
        return (self.draws & -self.draws).bit_length() - 1


@dataclass(frozen=True)
class Finding:
    """The result of a test: a number that is standard normal, or a p-value of its own, if the noise is ideal."""

    name: str
    draws: int
    z: float | None
    p: float


@dataclass(frozen=True)
class Battery(Table):
    """The findings as a table."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def failed(self) -> list[Finding]:
        """The tests that the noise fails, by Bonferroni's correction."""
        return [f for f in self.findings if f.p * len(self.findings) < LEVEL]

    def markdown(self) -> str:
        """Title, table and notes."""
        from simcse_jax.reports.tables import markdown_table

        lines = [
            [
                *(f.name, f"{f.draws:.2e}", "" if f.z is None else f"{f.z:+.2f}", f"{f.p:.2g}"),
                "**fails**" if f in self.failed else "passes",
            ]
            for f in self.findings
        ]
        table = markdown_table(["test", "draws", "z", "p", f"at {LEVEL:g}, corrected"], lines)
        return "\n\n".join([f"### {self.title}", table, *self.notes])


@dataclass(frozen=True)
class Noise:
    """The dropout masks that training would draw, tested for bias and for dependence: between bits, neighbours,
    positions, heads, sentences, views, places, layers, steps and seeds."""

    draws: float = 1e9
    """Least number of draws."""
    rate: float = 0.1
    """Probability of dropout."""
    seeds: tuple[int, ...] = (42, 0)
    """Seeds of the runs whose first steps are drawn."""
    shape: Shape = field(default_factory=Shape)

    def quick(self) -> "Noise":
        """The same part at the size of a rehearsal."""
        return replace(self, draws=1e6, shape=Shape(2, 16, 8, 64, 4))

    def run(self, folder: Path) -> list[Table]:
        """Draws and tests."""
        shape = self.shape
        steps = max(2, math.ceil(self.draws / (shape.places * shape.sentences * shape.draws * len(self.seeds))))
        keys = np.concatenate([training_keys(shape, seed, steps) for seed in self.seeds])
        findings = battery(keys, shape, self.rate)
        total = keys.size // 2 * shape.draws
        battery_of = Battery(f"Dropout noise: {total:,} draws, each in three passes", [], findings=findings)
        verdict = f"It fails {len(battery_of.failed)} of {len(findings)} tests."
        about = (
            f"Masks at rate {self.rate:g} of {steps} steps of seeds {', '.join(map(str, self.seeds))}: "
            f"{shape.sentences} sentences, two views of each example, {shape.places} places in a network of "
            f"{shape.layers} layers, {shape.positions} positions of {shape.features} features, which is as many as "
            f"{shape.heads} heads of {shape.draws // shape.heads} weights."
        )
        return [replace(battery_of, notes=[f"{verdict} {about}"], figures={"failed": len(battery_of.failed)})]


def training_keys(shape: Shape, seed: int, steps: int) -> UInt32[np.ndarray, "steps places sentences 2"]:
    """The keys under which training draws its masks, recorded where the encoder uses them."""
    config = EncoderConfig("bert", 8, 8, shape.layers, 1, 8, 8, 1)
    model = SentenceEncoder(config, pooler="avg", scan=False)
    params = jax.eval_shape(lambda: init_params(model, 0))
    examples = shape.sentences // 2
    batch = Batch(np.zeros((examples, 1, 2), np.int32), np.full((examples, 1, 1), 2, np.int32), np.ones(examples, bool))

    @jax.jit
    def record(step: Array) -> Array:
        found: list[Array] = []

        def keep(call: Any, arguments: Any, settings: Any, context: Any) -> Any:
            result = call(*arguments, **settings)
            if isinstance(context.module, Dropout):
                found.append(jnp.stack(result.key, axis=-1).reshape(shape.sentences, 2))
            return result

        weights = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        with nn.intercept_methods(keep):
            encode_views(model, weights, batch, rng.key(seed, "dropout", step))
        return jnp.stack(found)

    return np.stack([np.asarray(record(jnp.int32(step))) for step in range(steps)])


def battery(
    keys: UInt32[np.ndarray, "steps places sentences 2"], shape: Shape, rate: float, bits: Bits = random_bits
) -> list[Finding]:
    """Tests the noise under keys.

    Args:
      keys: from `training_keys`, of several seeds one after the other.
      shape: what the keys are of.
      rate: probability of dropout.
      bits: the generator.
    """
    p = int(below(rate)) / 2**32
    totals: Sums = {}
    for number, group in enumerate(keys.reshape(-1, shape.sentences, 2)):
        words = _words(shape, bits, group)
        _add(totals, {k: np.asarray(v) for k, v in _within(shape, rate, words).items()})
        if number % _THIN == 0:
            _add(totals, {k: np.asarray(v) for k, v in _bitwise(shape, words).items()})
            _add(totals, _slow(np.asarray(words < below(rate)), p))
    groupings: list[tuple[str, np.ndarray]] = [
        ("places in the network", np.moveaxis(keys, 1, 2).reshape(-1, keys.shape[1], 2)),
        ("steps and seeds", np.moveaxis(keys, 0, 2).reshape(-1, keys.shape[0], 2)),
    ]
    for name, groups in groupings:
        for group in groups:
            _add(totals, {f"{name}/{k}": np.asarray(v) for k, v in _among(shape, rate, bits, group).items()})
    return [*_findings(totals, keys, shape, p)]


def _add(totals: Sums, found: Sums) -> None:
    for name, value in found.items():
        if name.endswith("most"):
            totals[name] = max(totals.get(name, 0), int(value))
        elif name.endswith("least"):
            totals[name] = min(totals.get(name, 2**31), int(value))
        else:
            totals[name] = totals.get(name, 0) + value.astype(np.float64 if value.dtype.kind == "f" else np.int64)


@partial(jax.jit, static_argnums=(0, 1))
def _words(shape: Shape, bits: Bits, keys: UInt32[Array, "n 2"]) -> UInt32[Array, "n C"]:
    return bits((keys[:, :1], keys[:, 1:]), jnp.arange(shape.draws, dtype=jnp.uint32)[None])


@partial(jax.jit, static_argnums=(0, 1))
def _within(shape: Shape, rate: float, words: UInt32[Array, "n C"]) -> Sums:
    """Sums over the draws of sentences at one place and step."""
    dropped = words < below(rate)
    m, p = dropped.astype(jnp.float32), int(below(rate)) / 2**32
    n = len(words)
    grid = m.reshape(n, shape.positions, shape.features)
    heads = m.reshape(n, shape.heads, shape.draws // shape.heads)
    found = {f"sentences/{k}": v for k, v in _pairs(m[None], p).items()}
    found |= {f"positions/{k}": v for k, v in _pairs(grid, p).items()}
    found |= {f"heads/{k}": v for k, v in _pairs(heads, p).items()}
    found |= {f"views/{k}": v for k, v in _pairs(m.reshape(n // 2, 2, -1), p).items()}
    found["key chi"] = _chi(m, p)
    found["position chi"], found["feature chi"] = _chi(grid, p), _chi(jnp.swapaxes(grid, 1, 2), p)
    found["dropped"] = _total(dropped)
    for lag in shape.lags:
        a, b = (dropped[:, lag:], dropped[:, :-lag])
        found[f"lag {lag}"] = jnp.stack([_total(a & b), _total(a), _total(b)])
    return found


@partial(jax.jit, static_argnums=0)
def _bitwise(shape: Shape, words: UInt32[Array, "n C"]) -> Sums:
    """Sums over the bits of the same draws, of which masks take the highest."""
    found: Sums = {"words": jnp.int32(words.size)}
    found["ones"] = jnp.stack([_total((words >> b) & 1) for b in range(32)])
    turned = [(words << r) | (words >> (32 - r)) for r in range(1, 17)]
    found["turns"] = jnp.stack([_differing(words, other) for other in turned])
    for lag in shape.lags:
        found[f"serial {lag}"] = _differing(words[:, lag:], words[:, :-lag])
    for j in range(shape.flips):
        found[f"xor {j}"] = _differing(*jnp.moveaxis(words.reshape(len(words), -1, 2, 2**j), 2, 0))
    found["bytes"] = jnp.zeros(256, jnp.int32).at[(words >> 24).reshape(-1)].add(1)
    both = (words[:, ::2] >> 28) * 16 + (words[:, 1::2] >> 28)
    found["neighbours"] = jnp.zeros(256, jnp.int32).at[both.reshape(-1)].add(1)
    return found


@partial(jax.jit, static_argnums=(0, 1, 2))
def _among(shape: Shape, rate: float, bits: Bits, keys: UInt32[Array, "n 2"]) -> Sums:
    """Sums over the pairs of masks of one sentence at several places, or at several steps."""
    dropped = (_words(shape, bits, keys) < below(rate)).astype(jnp.float32)
    return _pairs(dropped[None], int(below(rate)) / 2**32)


def _differing(a: UInt32[Array, "..."], b: UInt32[Array, "..."]) -> Array:
    return _total(jax.lax.population_count(a ^ b))


def _total(x: Array) -> Array:
    """The sum, in float32 first, which XLA adds up five times as fast on CPUs: exact for rows up to 2²⁴."""
    return jnp.sum(jnp.sum(x.astype(jnp.float32).reshape(len(x), -1), axis=1).astype(jnp.int32))


def _chi(m: Float[Array, "... C"], p: float) -> Array:
    """Σ (dropped − C p)² / C p (1 − p) over all but the last axis."""
    count = m.shape[-1]
    return jnp.sum((jnp.sum(m, axis=-1) - count * p) ** 2) / (count * p * (1 - p))


def _pairs(m: Float[Array, "g n C"], p: float) -> Sums:
    """Over all pairs of n masks in each group: Σ of their squared correlation times C, and the extremes of their common
    elements."""
    n, count = m.shape[1:]
    joint = jnp.matmul(m, jnp.swapaxes(m, 1, 2))
    ones = jnp.sum(m, axis=2)
    g = joint - p * (ones[:, :, None] + ones[:, None, :]) + count * p * p
    above = jnp.triu(jnp.ones((n, n), bool), 1)[None]
    return {
        "square": jnp.sum(jnp.where(above, g * g, 0)) / (count * (p * (1 - p)) ** 2),
        "sum": jnp.sum(jnp.where(above, g, 0)) / (math.sqrt(count) * p * (1 - p)),
        "most": jnp.max(jnp.where(above, joint, 0)),
        "least": jnp.min(jnp.where(above, joint, count)),
    }


def _slow(dropped: np.ndarray, p: float) -> Sums:
    """Gaps between dropped elements, and the mean spectrum of the masks."""
    count = dropped.shape[1]
    lengths = np.concatenate([np.diff(np.flatnonzero(row)) for row in dropped])
    gaps = np.bincount(np.minimum(lengths, _GAPS), minlength=_GAPS + 1)[1:]
    spectrum = np.abs(np.fft.rfft(dropped - p, axis=1)[:, 1 : count // 2]) ** 2 / (count * p * (1 - p))
    return {"gaps": gaps, "spectrum": np.sum(spectrum, axis=0), "spectra": np.array(len(dropped))}


def _findings(t: Sums, keys: np.ndarray, shape: Shape, p: float) -> Iterator[Finding]:
    steps, places, sentences = keys.shape[:3]
    count, many = shape.draws, keys.size // 2
    draws = many * count
    fourth = (1 - 3 * p * (1 - p)) / (p * (1 - p))  # standardised fourth moment of an element of a mask

    def normal(name: str, z: float, of: int = draws) -> Finding:
        return Finding(name, of, z, float(2 * stats.norm.sf(abs(z))))

    def chi(name: str, total: float, number: int, each: int) -> Finding:
        """Of `number` sums of `each` elements, standardised and squared."""
        return normal(name, (total - number) / math.sqrt(number * (2 + (fourth - 3) / each)))

    def several(name: str, z: Iterable[float], of: int = draws) -> Finding:
        values = np.array([*z])
        return Finding(f"{name} (χ² of {len(values)})", of, None, _two_sided(float(np.sum(values**2)), len(values)))

    yield normal("rate", (t["dropped"] - draws * p) / math.sqrt(draws * p * (1 - p)))
    yield chi("rate of each key", t["key chi"], many, count)
    yield chi("rate of each position", t["position chi"], many * shape.positions, shape.features)
    yield chi("rate of each feature of a sentence", t["feature chi"], many * shape.features, shape.positions)
    joint = []
    for lag in shape.lags:
        pairs = many * (count - lag)
        both, a, b = t[f"lag {lag}"]
        joint.append((both - p * (a + b) + pairs * p * p) / (p * (1 - p) * math.sqrt(pairs)))
    apart = f"{_LAGS[0]} to {_LAGS[-1]}, a position and a head apart"
    yield several(f"masks {apart}", joint)
    words = int(t["words"])
    yield several("each bit of a word", (t["ones"] - words / 2) / math.sqrt(words / 4), words)
    turns = (t["turns"] - 16 * words) / math.sqrt(8 * words)
    turns[15] /= math.sqrt(2)  # each pair of bits twice
    yield several("bits of a word, 1 to 16 apart", turns, words)
    compared = {lag: words // count * (count - lag) for lag in shape.lags}
    serial = [(t[f"serial {lag}"] - 16 * n) / math.sqrt(8 * n) for lag, n in compared.items()]
    yield several(f"words {apart}", serial, words)
    flips = [(t[f"xor {j}"] - 8 * words) / math.sqrt(4 * words) for j in range(shape.flips)]
    yield several("words whose counters differ in one bit", flips, words)
    yield _fits("highest byte", t["bytes"], np.full(256, 1 / 256))
    yield _fits("highest bits of two neighbours", t["neighbours"], np.full(256, 1 / 256))
    lengths = np.arange(1, _GAPS)
    share = (count - lengths) * p * (1 - p) ** (lengths - 1)
    beyond = np.arange(_GAPS, count)
    last = np.sum((count - beyond) * p * (1 - p) ** (beyond - 1))
    yield _fits("gaps between dropped elements", t["gaps"], np.array([*share, last]) / (np.sum(share) + last))
    spectra = int(t["spectra"])
    waves = (t["spectrum"] / spectra - 1) * math.sqrt(spectra)
    spread = math.sqrt(len(waves) * (2 + 6 / spectra))
    yield normal("spectrum of a mask", (float(np.sum(waves**2)) - len(waves)) / spread, spectra * count)
    groups = {
        "views": (many // 2, 2, count),
        "sentences": (steps * places, sentences, count),
        "positions": (many, shape.positions, shape.features),
        "heads": (many, shape.heads, count // shape.heads),
        "places in the network": (steps * sentences, places, count),
        "steps and seeds": (places * sentences, steps, count),
    }
    for name, (number, n, each) in groups.items():
        pairs = number * n * (n - 1) // 2
        # Pairs with a mask in common are not quite independent.
        variance = 2 + (fourth**2 - 3) / each + 2 * (n - 2) * (fourth - 1) / each
        yield normal(f"{name}, pair by pair", (t[f"{name}/square"] - pairs) / math.sqrt(pairs * variance))
        yield normal(f"{name}, all pairs", t[f"{name}/sum"] / math.sqrt(pairs))
        most, least = t[f"{name}/most"], t[f"{name}/least"]
        ends = stats.binom.sf(most - 1, each, p * p), stats.binom.cdf(least, each, p * p)
        extreme = 1 - (1 - min(ends)) ** (2 * pairs) if min(ends) > 1e-12 else 2 * pairs * min(ends)
        yield Finding(f"{name}, the most unusual pair of {pairs:,}", draws, None, float(min(1.0, extreme)))


def _two_sided(chi: float, freedom: int) -> float:
    """As unlikely as too large a sum of squares is one too small."""
    return float(min(1.0, 2 * min(stats.chi2.sf(chi, freedom), stats.chi2.cdf(chi, freedom))))


def _fits(name: str, found: np.ndarray, shares: np.ndarray) -> Finding:
    total = int(np.sum(found))
    chi = float(np.sum((found - total * shares) ** 2 / (total * shares)))
    return Finding(f"{name} (χ² of {len(found) - 1})", total, None, _two_sided(chi, len(found) - 1))
