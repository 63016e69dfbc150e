"""Training a policy on human preferences without a reward model: DPO, and ranking by log-likelihood without a reference.

Both give every completion a score that the policy itself implies and compare scores as the reward model's loss does, all
pairs of a batch against the share of raters who prefer one. A batch may be cut between the texts of a pair:

    log-probabilities of the whole batch ──> loss ──> d loss / d log p of each completion ──> one backward pass a microbatch

The first pass keeps its graphs as far as `learner.held_tokens` allows; other microbatches are computed a second time. The
reference is the policy before its first step, so its log-probabilities are computed then, once, and no second model is held.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from common.microbatches import cut_microbatches
from common.models.forward import knows_shared_prompts
from contracts.config import PreferenceConfig, TandemConfig
from contracts.preference_losses import find_preference_loss
from contracts.records import Example, ExamplePair, RatedExample
from learner.adapted_models import trained_policy
from learner.engine import TrainEngine
from learner.examples import example_logprobs, loss_tokens, taught_tokens
from learner.models import PolicyModel
from learner.pair_losses import pair_metrics, pair_preferences, preference_loss, preference_matrix
from learner.ranks import Ranks
from learner.saved_model import save_checkpoint
from learner.sft import epoch_batches


def batch_examples(batch: Sequence[RatedExample | ExamplePair]) -> tuple[list[Example], Tensor, Tensor]:
    """The texts of a batch, P(i beats j) [N, N], and which entries are known [N, N]: of rated texts all, of stored pairs
    those between their two texts."""
    texts = [text for item in batch for text in item.texts]
    rated = [item.ratings for item in batch if isinstance(item, RatedExample)]
    if rated:
        preferences = preference_matrix(rated)
        return texts, preferences, torch.ones_like(preferences, dtype=torch.bool)
    return texts, *pair_preferences([item.preference for item in batch if isinstance(item, ExamplePair)])


class PreferenceTask:
    """All ranks hold all examples; each computes its share of a batch and sees everybody's log-probabilities in the loss."""

    def __init__(
        self,
        ranks: Ranks,
        config: TandemConfig,
        stage: PreferenceConfig,
        policy: str,
        examples: Sequence[RatedExample | ExamplePair],
    ):
        self.ranks = ranks
        self.config = config
        self.stage = stage
        self.examples = examples
        assert stage.loss is not None  # `contracts.methods.chosen_preference` has filled them in
        assert stage.beta is not None
        assert stage.nll_coef is not None
        self.loss = stage.loss
        self.beta = stage.beta
        self.nll_coef = stage.nll_coef
        self.batches = epoch_batches(len(examples), stage.batch_size, stage.epochs, config.seed, ranks.world_size)
        self.model: PolicyModel = trained_policy(policy, config, ranks, stage.trainable_layers)
        self.engine = TrainEngine(self.model, stage.optimizer, config.learner, ranks, len(self.batches))
        self._shares_prompts = knows_shared_prompts(self.model.lm, self.model.layout)
        self._tokenizer_from = policy
        self._reference: dict[int, list[float]] = {}  # of each example, by its number: one text, or the two of a pair

    def num_steps(self) -> int:
        return len(self.batches)

    def compute_reference(self, start: int, stop: int) -> None:
        """Log-probabilities of the texts of these examples, before the first step."""
        items = self.examples[start:stop]
        logprobs = iter(self.logprobs([text for item in items for text in item.texts]))
        self._reference |= {start + i: [next(logprobs) for _ in item.texts] for i, item in enumerate(items)}

    def step(self, index: int) -> dict[str, float]:
        """One optimizer step."""
        start, device = time.perf_counter(), self.ranks.device
        rows = self.batches[index]
        texts, preferences, known = batch_examples([self.examples[i] for i in rows])
        preferences, known = preferences.to(device), known.to(device)
        cut, held = self._cut(texts), self.config.learner.held_tokens
        parts: list[tuple[list[int], Tensor]] = []
        for part in cut:
            size = sum(len(texts[r].token_ids) for r in part)
            with torch.set_grad_enabled(size <= held):
                parts.append((part, self._sums([texts[r] for r in part])))
            held -= size if parts[-1][1].requires_grad else 0
        logprobs = self._gather(parts, len(texts))
        reference = torch.zeros_like(logprobs)
        if find_preference_loss(self.loss).has_reference:
            reference = torch.tensor([value for i in rows for value in self._reference[i]], device=device)
        tokens = torch.tensor([loss_tokens([text]) for text in texts], device=device).clamp(min=1)
        loss, scores, coefficients = preference_loss(
            logprobs, reference, tokens, preferences, known, self.loss, self.beta, self.nll_coef
        )
        for i, (part, first) in enumerate(parts):
            mine = first if first.requires_grad else self._sums([texts[r] for r in part])
            self.engine.backward((coefficients[part] * mine).sum(), is_last=i == len(parts) - 1)
        norm = self.engine.step()
        accuracy, margin = pair_metrics(scores, preferences, known)
        return {
            "preference/loss": loss.item(),
            "preference/accuracy": accuracy,
            "preference/margin": margin,
            "preference/token_logprob": (logprobs.sum() / tokens.sum()).item(),
            "preference/grad_norm": norm,
            "perf/train_tokens_per_s": sum(len(e.token_ids) for e in texts) / (time.perf_counter() - start),
        }

    @torch.no_grad()
    def logprobs(self, texts: list[Example]) -> list[float]:
        """log p of the completions, nats, in order, on every rank."""
        parts = [(part, self._sums([texts[r] for r in part])) for part in self._cut(texts)]
        return self._gather(parts, len(texts)).tolist()

    def _cut(self, texts: list[Example]) -> list[list[int]]:
        """This rank's microbatches."""
        lengths, budget = [len(e.token_ids) for e in texts], self.config.learner.microbatch_tokens
        numbers: dict[tuple[int, ...], int] = {}
        prompts = [tuple(e.token_ids[: _prompt_len(e)]) for e in texts]
        groups = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
        return cut_microbatches(lengths, budget, self.ranks.world_size, groups)[self.ranks.rank]

    def _sums(self, texts: list[Example]) -> Tensor:
        """log p of each completion of one microbatch [B]."""
        prompt_lens = [_prompt_len(e) for e in texts] if self._shares_prompts else None
        logprobs, owners = example_logprobs(self.engine, texts, self.ranks.device, prompt_lens)
        return torch.zeros(len(texts), device=logprobs.device).index_add(0, owners, logprobs)

    def _gather(self, parts: list[tuple[list[int], Tensor]], count: int) -> Tensor:
        """Everybody's log-probabilities in batch order, without gradient."""
        everyone = torch.zeros(count, device=self.ranks.device)
        for part, sums in parts:
            everyone[part] = sums.detach()
        return self.ranks.sum(everyone)

    def save(self, path: str) -> None:
        taught = taught_tokens(text for item in self.examples for text in item.texts)
        save_checkpoint(self.engine, path, self._tokenizer_from, self.config.model, self.ranks, taught=taught)


def _prompt_len(example: Example) -> int:
    """Tokens before the first that trains."""
    return example.loss_mask.index(True) if True in example.loss_mask else len(example.token_ids)


TASK = PreferenceTask
