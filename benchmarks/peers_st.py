"""sentence-transformers as a peer: the step inside its trainer, and `encode`."""

from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

try:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
except ImportError:  # earlier releases have the losses here
    from sentence_transformers.losses import MultipleNegativesRankingLoss

from benchmarks.peers_torch import DEVICE, OnTorch, TrainingStep, products, wait


class _Ranking(torch.nn.Module):
    def __init__(self, folder: str, temperature: float) -> None:
        super().__init__()
        # The folder names the pooling and the head, so that its vectors are those of our training.
        model = SentenceTransformer(folder, device=str(DEVICE))
        self.loss = MultipleNegativesRankingLoss(model, scale=1 / temperature)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = self.loss([dict(batch), dict(batch)], None)
        return loss


class Step(TrainingStep):
    """MultipleNegativesRankingLoss over (sentence, sentence), as its documentation recommends for unsupervised SimCSE.

    The step does what the trainer does with a batch: the loss of both columns under autocast, backward, clip, AdamW.
    It leaves out the trainer's loop (collator, logging, callbacks), as our step leaves out ours: the loop would only
    add to the time, and it needs the package accelerate.
    """

    def build(self) -> torch.nn.Module:
        """Model and loss."""
        return _Ranking(self.folder, self.temperature)


class Encode(OnTorch):
    """`SentenceTransformer.encode`, vectors of length 1; with bfloat16 weights and arithmetic on request."""

    def __init__(self, model: str, sentences: list[str], batch_size: int, dtype: str) -> None:
        settings: dict[str, Any] = {"dtype": getattr(torch, dtype)}
        self._model = SentenceTransformer(model, device=str(DEVICE), model_kwargs=settings)
        self._sentences, self._batch_size = sentences, batch_size
        products(exact=False)

    def run(self) -> np.ndarray:
        """Encodes all sentences."""
        tensors = self._model.encode(
            self._sentences,
            batch_size=self._batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
            convert_to_tensor=True,
        )
        vectors: np.ndarray = tensors.float().cpu().numpy()  # NumPy has no bfloat16
        wait()
        return vectors

    def check(self) -> dict[str, np.ndarray]:
        """The vectors."""
        products(exact=True)
        vectors = self.run()
        products(exact=False)
        return {"vectors": vectors}
