"""mteb's own STS tasks on local text, against ours."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simcse_jax.evaluation.mteb import MTEBEncoder
from simcse_jax.evaluation.sts import Task, evaluate, load_task
from simcse_jax.inference.simcse import SimCSE

TASKS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark")


def test_vectors_and_similarities(tiny_bert: Path) -> None:
    """What the protocol asks for, without mteb."""
    encoder = MTEBEncoder(tiny_bert, pooler="avg")
    batches = [{"text": ["a man runs", "the dog"]}, {"text": [""]}]
    vectors = encoder.encode(batches, task_metadata=None, hf_split="test", hf_subset="default", batch_size=2)
    expected = SimCSE(tiny_bert, "avg").encode(["a man runs", "the dog", ""])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    np.testing.assert_allclose(encoder.similarity(3 * vectors, vectors), vectors @ vectors.T, atol=1e-6)
    np.testing.assert_allclose(encoder.similarity_pairwise(vectors, -2 * vectors), [-1, -1, -1], atol=1e-6)


def scores_of_mteb(encoder: MTEBEncoder, tasks: list[Task]) -> list[dict[str, float]]:
    """mteb's scores of its own task of each name, with our text in the place of the hub's."""
    mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install mteb")
    from datasets import Dataset, DatasetDict

    theirs: list[Any] = []
    for task in tasks:
        columns: dict[str, list[Any]] = {
            "sentence1": [s for u in task.subsets for s in u.first],
            "sentence2": [s for u in task.subsets for s in u.second],
            "score": [float(g) for u in task.subsets for g in u.gold],
        }
        local = mteb.get_task(task.name)
        local.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        local.data_loaded = True
        theirs.append(local.evaluate(encoder, split="test", encode_kwargs={"batch_size": 64})["default"])
    return theirs


@pytest.mark.filterwarnings("ignore")
def test_mteb_takes_the_adapter(tiny_bert: Path) -> None:
    mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install mteb")
    from mteb.models import EncoderProtocol

    encoder = MTEBEncoder(tiny_bert, "step-7", pooler="avg")
    assert isinstance(encoder, EncoderProtocol)
    assert encoder.mteb_model_meta.name == f"simcse_jax/{tiny_bert.name}"
    assert encoder.mteb_model_meta.revision == "step-7"
    rng = np.random.default_rng(0)
    words = np.array(["man", "dog", "cat", "runs", "red", "river"])
    from simcse_jax.evaluation.sts import Subset

    text = [[" ".join(rng.choice(words, 4)) for _ in range(40)] for _ in "ab"]
    task = Task("STS12", [Subset("all", *text, rng.uniform(0, 5, 40))], "all")
    (theirs,) = scores_of_mteb(encoder, [task])
    ours = evaluate([task], SimCSE(tiny_bert, "avg").encode)["tasks"]["STS12"]["all"]
    assert 100 * theirs["cosine_spearman"] == pytest.approx(ours["spearman"]["all"], abs=0.02)
    assert 100 * theirs["spearman"] == pytest.approx(ours["spearman"]["all"], abs=0.02)
    assert 100 * theirs["cosine_pearson"] == pytest.approx(ours["pearson"]["all"], abs=0.02)
    assert mteb.__version__ >= "2"


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_sts_of_mteb_is_ours(real_data: Path, minilm: Path) -> None:
    """All pairs of a task concatenated: there the protocols are one, but for how identical sentences tie."""
    tasks = [load_task(name, real_data / "senteval") for name in TASKS]
    theirs = scores_of_mteb(MTEBEncoder(minilm, pooler="avg"), tasks)
    ours = evaluate(tasks, lambda sentences: SimCSE(minilm, "avg").encode(sentences))["reported"]
    for task, scores in zip(tasks, theirs, strict=True):
        assert 100 * scores["cosine_spearman"] == pytest.approx(ours[task.name], abs=1e-3)
