"""PyTorch peers: a plain SimCSE step, InfoNCE alone, checkpoints by torch.save."""

import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel

from benchmarks.timing import peak_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Waits until the device has done all its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def products(exact: bool) -> None:
    """Sets float32 products to full precision, as comparisons need it, or to JAX's default: TF32 on GPUs."""
    torch.set_float32_matmul_precision("highest" if exact or DEVICE.type != "cuda" else "high")


def autocast(dtype: str) -> AbstractContextManager[Any]:
    """PyTorch's mixed precision, weights float32, for bfloat16; nothing for float32."""
    return nullcontext() if dtype == "float32" else torch.autocast(DEVICE.type, torch.bfloat16)


def info_nce(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> torch.Tensor:
    """SimCSE's loss in float32, with one matrix product of unit vectors: the public code's broadcast cosine takes N²H
    memory."""
    logits = normalize(z1.float()) @ normalize(z2.float()).T / temperature
    return cross_entropy(logits, torch.arange(len(z1), device=z1.device))


class OnTorch:
    """The base of all contenders on PyTorch: memory and ceiling."""

    def peak(self) -> int:
        """Most bytes held: of an accelerator's memory if there is one, else of the process."""
        return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else peak_bytes()

    def ceiling(self, size: int, dtype: str, exact: bool = False) -> float:
        """FLOP/s of the best of five products of two square matrices; `exact`: without TF32."""
        products(exact)
        a = torch.randn(size, size, device=DEVICE, dtype=getattr(torch, dtype))
        torch.matmul(a, a)
        times = []
        for _ in range(5):
            wait()
            start = time.perf_counter()
            torch.matmul(a, a)
            wait()
            times.append(time.perf_counter() - start)
        return 2 * size**3 / min(times)


class TrainingStep(OnTorch, ABC):
    """Forward, backward, clip and AdamW on the module that `build` makes."""

    def __init__(
        self, model: str, batches: list[tuple[np.ndarray, np.ndarray]], dtype: str, temperature: float, compiled: bool
    ) -> None:
        self.folder, self.dtype, self.temperature, self.compiled = model, dtype, temperature, compiled
        self._batches = [
            {"input_ids": torch.tensor(ids, dtype=torch.long), "attention_mask": attention_mask(ids, lengths)}
            for ids, lengths in batches
        ]
        self._batches = [{name: x.to(DEVICE) for name, x in batch.items()} for batch in self._batches]
        self._number = count()
        self.module: Any = None
        self.optimizer: Any = None

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """A module that maps a batch, a dictionary of tensors, to the loss."""

    def loss(self, module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch."""
        with autocast(self.dtype):
            loss: torch.Tensor = module(batch)
        return loss

    def run(self) -> None:
        """Takes a step; the first makes everything."""
        if self.module is None:
            products(exact=False)
            torch.manual_seed(0)
            self.module = self.build().to(DEVICE).train()
            # Fused, the default of the trainers of transformers and sentence-transformers.
            self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=3e-5, weight_decay=0.0, fused=True)
            if self.compiled:
                self.module.compile()
        loss = self.loss(self.module, self._batches[next(self._number) % len(self._batches)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()
        wait()

    def check(self) -> dict[str, float]:
        """Loss and gradient norm of the first batch under the first weights, without dropout, not compiled."""
        products(exact=True)
        module = self.build().to(DEVICE).eval()
        loss = self.loss(module, self._batches[0])
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        products(exact=False)
        return {"loss": loss.item(), "gradient norm": norm.item()}


def attention_mask(ids: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    """1 where a row has a token, 0 where padding."""
    return torch.tensor(np.arange(ids.shape[1]) < lengths[:, None], dtype=torch.long)


class _SimCSE(torch.nn.Module):
    """Both views in one pass, as in the public code; BERT's own pooler is SimCSE's head."""

    def __init__(self, folder: str, temperature: float) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
        self.temperature = temperature

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        views = {name: torch.cat([x, x]) for name, x in batch.items()}
        z1, z2 = self.encoder(**views).pooler_output.chunk(2)
        with torch.autocast(z1.device.type, enabled=False):
            return info_nce(z1, z2, self.temperature)


class Step(TrainingStep):
    """A plain SimCSE step: BERT of transformers with scaled-dot-product attention."""

    def build(self) -> torch.nn.Module:
        """Encoder and loss."""
        return _SimCSE(self.folder, self.temperature)


class Checkpointing(Step):
    """The steps of a loop, with torch.save of model and optimizer before them or without."""

    def __init__(self, loop: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.loop = loop
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-")

    def steps(self) -> None:
        """Takes the steps alone."""
        for _ in range(self.loop):
            self.run()

    def save_and_steps(self) -> None:
        """Writes a checkpoint and goes on."""
        state = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, Path(self._folder.name) / "state.pt")
        self.steps()

    def written(self) -> None:
        """Does nothing: the checkpoint is on disk already."""


class Loss(OnTorch):
    """InfoNCE of two views, forward and backward, dense."""

    def __init__(self, views: tuple[np.ndarray, np.ndarray], temperature: float) -> None:
        self._views = [torch.tensor(x, device=DEVICE, requires_grad=True) for x in views]
        self._temperature = temperature

        products(exact=True)  # as ours, whose logits are never rounded to a shorter type

    def run(self) -> None:
        """Computes the loss and both gradients."""
        self._loss()

    def _loss(self) -> tuple[torch.Tensor, ...]:
        z1, z2 = self._views
        loss = info_nce(z1, z2, self._temperature)
        gradients = torch.autograd.grad(loss, self._views)
        wait()
        return loss.detach(), *gradients

    def check(self) -> dict[str, Any]:
        """The loss and both gradients."""
        return dict(zip(("loss", "gradient 1", "gradient 2"), (x.cpu().numpy() for x in self._loss()), strict=True))
