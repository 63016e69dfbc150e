"""Training a reward model on human preferences: every pair within a batch counts, against the share of raters who prefer
one text over the other."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from common.microbatches import cut_microbatches
from common.models.packed_attention import Packed
from common.statistics import spread
from contracts.config import TandemConfig
from contracts.records import PreferencePair, RatedText
from contracts.scoring import write_golden
from learner.adapted_models import trained_scalar
from learner.engine import TrainEngine
from learner.losses import soft_pairwise_loss
from learner.pair_losses import pair_metrics, pair_preferences, preference_matrix
from learner.ranks import Ranks
from learner.saved_model import save_checkpoint
from learner.sft import epoch_batches


def batch_preferences(
    batch: Sequence[RatedText | PreferencePair],
) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Scoring inputs of a batch, P(i beats j) [N, N], and which entries are known preferences [N, N].

    Rated texts are compared all with all; of stored pairs only the two halves of a pair are.
    """
    if all(isinstance(item, RatedText) for item in batch):
        rated = [item for item in batch if isinstance(item, RatedText)]
        preferences = preference_matrix([item.ratings for item in rated])
        return [item.token_ids for item in rated], preferences, torch.ones_like(preferences, dtype=torch.bool)
    pairs = [item for item in batch if isinstance(item, PreferencePair)]
    texts = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    return texts, *pair_preferences([pair.preference for pair in pairs])


class RewardModelTask:
    """All ranks hold all examples; each scores its share of a batch and sees everybody's scores in the loss."""

    def __init__(self, ranks: Ranks, config: TandemConfig, start: str, examples: Sequence[RatedText | PreferencePair]):
        """`start` is the checkpoint whose layers the model begins with."""
        self.ranks = ranks
        self.config = config
        self.start = start
        self.examples = examples
        stage = config.reward_model
        self.batches = epoch_batches(len(examples), stage.batch_size, stage.epochs, config.seed, ranks.world_size)
        layers, embeddings = stage.trainable_layers, stage.freeze_embeddings
        model = trained_scalar(start, config, ranks, "reward_model", layers, embeddings)
        self.engine = TrainEngine(model, stage.optimizer, config.learner, ranks, len(self.batches))
        self.model = model

    def num_steps(self) -> int:
        return len(self.batches)

    def step(self, index: int) -> dict[str, float]:
        """One optimizer step."""
        start = time.perf_counter()
        texts, preferences, known = batch_preferences([self.examples[i] for i in self.batches[index]])
        preferences, known = preferences.to(self.ranks.device), known.to(self.ranks.device)
        scores = self._gather(*self._score(texts), len(texts))
        loss, pairs = soft_pairwise_loss(scores, preferences, known)
        loss = loss / pairs.clamp(min=1)
        self.engine.backward(loss, is_last=True)
        norm = self.engine.step()
        with torch.no_grad():
            accuracy, _ = pair_metrics(scores, preferences, known)
        return {
            "reward_model/loss": loss.item(),
            "reward_model/accuracy": accuracy,
            "reward_model/score_std": scores.detach().std().item(),
            "reward_model/grad_norm": norm,
            "perf/train_tokens_per_s": sum(map(len, texts)) / (time.perf_counter() - start),
        }

    def _score(self, texts: list[list[int]]) -> tuple[list[int], torch.Tensor]:
        """This rank's rows and their scores."""
        lengths = [len(text) for text in texts]
        cut = cut_microbatches(lengths, self.config.learner.microbatch_tokens, self.ranks.world_size)[self.ranks.rank]
        rows, scores = [], []
        for part in cut:
            packed = Packed.of([texts[r] for r in part], self.ranks.device)
            scores.append(self.engine(packed, packed.last))
            rows += part
        return rows, torch.cat(scores)

    def _gather(self, rows: list[int], mine: torch.Tensor, count: int) -> torch.Tensor:
        """Everybody's scores in batch order. Gradient flows to this rank's own alone, so that summed over the ranks each
        score gets its gradient once."""
        everyone = torch.zeros(count, device=mine.device)
        everyone[rows] = mine.detach()
        return self.ranks.sum(everyone).index_put((torch.tensor(rows, device=mine.device),), mine)

    @torch.no_grad()
    def score(self, texts: list[list[int]]) -> list[float]:
        """Scores of scoring inputs, in order, on every rank."""
        return self._gather(*self._score(texts), len(texts)).tolist()

    def save(self, path: str) -> None:
        """Normalise on (a sample of) the training texts to mean 0 and variance 1, and write the checkpoint."""
        sample = np.random.default_rng(self.config.seed).permutation(len(self.examples))[:512]
        texts: list[list[int]] = []
        for i in sample:
            item = self.examples[i]
            texts += [item.token_ids] if isinstance(item, RatedText) else [item.chosen_ids, item.rejected_ids]
        raw = np.asarray(self.score(texts)) * self.model.std + self.model.mean
        fields = {"score_mean": float(raw.mean()), "score_std": spread(raw) or 1.0}
        save_checkpoint(self.engine, path, self.start, self.config.model, self.ranks, fields)
        if self.ranks.rank == 0:
            write_golden(path, texts[:16], ((raw[:16] - fields["score_mean"]) / fields["score_std"]).tolist())


TASK = RewardModelTask
