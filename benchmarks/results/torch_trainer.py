"""PyTorch's side of the comparison: unsupervised SimCSE in a plain loop, evaluations included."""

import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from benchmarks.peers_torch import DEVICE, OnTorch, attention_mask, info_nce, products


class Trainer(OnTorch):
    """Two passes under dropout, the head in training only, AdamW under a line that falls to 0."""

    def __init__(
        self,
        model: str,
        batches: list[tuple[np.ndarray, np.ndarray]],
        head: dict[str, Any],
        pairs: tuple[list[str], list[str], np.ndarray],
        rate: float,
        temperature: float,
        every: int,
        seed: int,
        target: str,
    ) -> None:
        products(exact=True)
        torch.manual_seed(seed)
        self._encoder = AutoModel.from_pretrained(
            model, attn_implementation="sdpa", dtype=torch.float32, add_pooling_layer=False
        ).to(DEVICE)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        kernel, bias = (torch.tensor(np.array(head[name])) for name in ("kernel", "bias"))
        self._head = torch.nn.Linear(*kernel.shape).to(DEVICE)
        with torch.no_grad():
            self._head.weight.copy_(kernel.T)
            self._head.bias.copy_(bias)
        self._batches, self._pairs, self._target = batches, pairs, Path(target)
        self._rate, self._temperature, self._every = rate, temperature, every

    def run(self) -> dict[str, Any]:
        """Trains, and keeps the weights of the best score on the dev pairs."""
        parameters = [*self._encoder.parameters(), *self._head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=self._rate, weight_decay=0.0, fused=True)
        total = len(self._batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        path, seconds, best = [[0, self._score()]], 0.0, copy.deepcopy(self._encoder.state_dict())
        final = math.nan
        for step, (ids, lengths) in enumerate(self._batches, 1):
            started = time.perf_counter()
            self._encoder.train()
            words, mask = torch.tensor(ids, dtype=torch.long).to(DEVICE), attention_mask(ids, lengths).to(DEVICE)
            vectors = self._encoder(torch.cat([words, words]), torch.cat([mask, mask])).last_hidden_state[:, 0]
            z1, z2 = torch.tanh(self._head(vectors)).chunk(2)
            loss = info_nce(z1, z2, self._temperature)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            final = loss.item()
            seconds += time.perf_counter() - started
            if step % self._every == 0 or step == total:
                path.append([step, self._score()])
                if path[-1][1] > max(score for _, score in path[:-1]):
                    best = copy.deepcopy(self._encoder.state_dict())
        self._encoder.load_state_dict(best)
        self._encoder.save_pretrained(self._target)
        self._tokenizer.save_pretrained(self._target)
        return {"path": path, "loss": final, "steps": total, "seconds": seconds}

    def _score(self) -> float:
        """Spearman × 100 of the dev pairs, by the vector of [CLS]."""
        self._encoder.eval()
        first, second, gold = self._pairs
        texts = sorted({*first, *second}, key=len)
        vectors: dict[str, torch.Tensor] = {}
        for start in range(0, len(texts), 64):
            chosen = texts[start : start + 64]
            tokens = self._tokenizer(chosen, padding=True, truncation=True, max_length=512, return_tensors="pt")
            with torch.no_grad():
                hidden = self._encoder(tokens["input_ids"].to(DEVICE), tokens["attention_mask"].to(DEVICE))
            vectors |= dict(zip(chosen, hidden.last_hidden_state[:, 0], strict=True))
        a, b = (torch.stack([vectors[text] for text in side]) for side in (first, second))
        cosines = torch.nn.functional.cosine_similarity(a, b).cpu().numpy()
        return round(100 * float(spearmanr(cosines, gold).statistic), 3)
