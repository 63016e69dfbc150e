"""A reward model: token ids in, one score a sequence out.

Works with any `AutoModelForSequenceClassification` of one label whose head is a linear layer `score` over a causal backbone.
Scores are (raw - mean) / std with the normaliser that `stage=reward_model` wrote into the configuration of the checkpoint,
where there is one.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from common.microbatches import cut_padded
from common.models.adapters import check_fits, config_of, merge, split
from common.models.forward import Form, hidden_states
from common.models.loading import (
    LoadingError,
    loading_report,
    normaliser,
    refuse_quantised,
    refuse_unloaded,
)
from common.models.packed_attention import Packed
from common.models.positions import longest_row
from common.models.proof import SCALAR, Proof, prove
from common.text.tokenizers import local_checkpoint
from contracts.records import Score
from contracts.scoring import GOLDEN_FILE
from reward_service.isolate import finite, isolate
from reward_service.score_position import Reading, at_eos

WARM_UP = (1, 2, 3)  # token ids that every vocabulary has


class _Golden(BaseModel):
    token_ids: list[int]
    score: float = Field(allow_inf_nan=False)


_GOLDEN = TypeAdapter(list[_Golden])


def check_reward_model(path: str, key: str) -> None:
    """Refuse a checkpoint that cannot serve as a reward model, by its names and shapes alone.

    Args:
        key: of the configuration that names it.

    Raises:
        LoadingError: naming what is missing and what to write instead.
        OSError, ValueError: where no model can be loaded from there.
    """
    base, adapter = split(path)
    config = config_of(path)
    refuse_quantised(config, path, key)
    normaliser(config, path, key)
    # One label whatever the configuration says: a head of another shape is refused with its shape.
    model, info = loading_report(AutoModelForSequenceClassification, base, num_labels=1)
    refuse_unloaded(info, base, key, ("score.weight",) if adapter else (), model=model)
    if adapter:
        check_fits(model, adapter, key, base)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise LoadingError(
            f"{key}={path} must be a reward model with a linear layer `score` over a causal backbone; found "
            f"{type(model).__name__}; write a checkpoint of another class, or give its scores by a rule function"
        )


class RewardModel:
    """Raises as `check_reward_model`.

    Args:
        reading: where the score of a sequence is read.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "bfloat16",
        batch_tokens: int = 1024,
        max_tokens: int = 1024,
        reading: Reading = at_eos,
    ):
        on_cpu = not torch.cuda.is_available()
        check_reward_model(path, "path")
        base, adapter = split(path)
        config = config_of(path)
        config.num_labels = 1
        proof = prove_scores(config, on_cpu)
        self.layout = proof.layout
        self.model = AutoModelForSequenceClassification.from_pretrained(
            base,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=proof.attention,
            trust_remote_code=False,
        ).eval()
        if adapter:
            merge(self.model, adapter)  # scores cost what those of a whole model do
        if not on_cpu:
            self.model.cuda()
        self.head = self.model.score.float()  # in bfloat16 the rounding of this product would be the score's resolution
        self.mean, self.std = normaliser(config, path, "path")
        config = self.model.config
        self.vocab_size = config.get_text_config().vocab_size
        # Beyond, learned positions end, and RoPE turns by the longest item: for every item of a batch.
        self.positions = longest_row(config.get_text_config())
        self.batch_tokens = batch_tokens
        self.max_tokens = max_tokens
        self.reading = reading

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Score]:
        """Scores in the order given. An item that cannot be scored gets its reason; the others are unharmed.

        Identical sequences are computed once, so they tie exactly: in bfloat16 the same text in another batch differs in
        the second digit. Batches are sorted by length; longest x count is at most `batch_tokens`.
        """
        results: dict[tuple[int, ...], Score] = {}
        todo = []
        for key in sorted({tuple(s) for s in sequences}):
            problem = self._problem(key)
            if problem:
                results[key] = Score(None, problem)
            else:
                todo.append(key)
        for rows in cut_padded([len(key) for key in todo], self.batch_tokens):
            batch = [todo[r] for r in rows]
            results.update(zip(batch, map(self._normalised, isolate(self._forward, batch)), strict=True))
        return [results[tuple(s)] for s in sequences]

    def _problem(self, key: tuple[int, ...]) -> str | None:
        if not key:
            return "empty"
        if len(key) > self.max_tokens:
            return f"too_long: {len(key)} tokens, the limit is {self.max_tokens}"
        if min(key) < 0 or max(key) >= self.vocab_size:
            return "out_of_vocabulary"
        seen = len(self.reading(key)[0])  # which may be more than the key
        if self.positions is not None and seen > self.positions[0]:
            limit, said = self.positions
            return f"too_long: {seen} tokens as the model reads it, which has {limit} positions ({said})"
        return None

    def _normalised(self, score: Score) -> Score:
        if score.raw is not None:
            score.value = (score.raw - self.mean) / self.std
        return finite(score)

    @torch.inference_mode()
    def _forward(self, batch: list[tuple[int, ...]]) -> list[float]:
        device = self.head.weight.device
        seen = [self.reading(token_ids) for token_ids in batch]
        packed = Packed.of([token_ids for token_ids, _ in seen], device)
        places = [start + place for start, (_, place) in zip(packed.starts, seen, strict=True)]
        hidden = hidden_states(self.model, packed, self.layout).index_select(0, torch.tensor(places, device=device))
        return self.head(hidden.float()).squeeze(-1).tolist()


def prove_scores(config: Any, on_cpu: bool) -> Proof:
    """How a checkpoint with this configuration is scored as its own class scores.

    Raises:
        Unproven: there is no such way.
    """

    def scores(classifier: PreTrainedModel, form: Form, rows: list[list[int]]) -> torch.Tensor:
        packed, head = Packed.of(rows, classifier.device), classifier.get_submodule("score")
        return head(hidden_states(classifier, packed, form.layout).index_select(0, packed.last))[:, 0]

    plain = copy.deepcopy(config)
    plain.num_labels = 1
    return prove(SCALAR, plain, scores, "auto", on_cpu, trains=False)


def check_golden(path: str, score: Callable[[list[list[int]]], list[Score]], tolerance: float) -> None:
    """Warm up, and compare with the golden scores of the checkpoint at `path` where it has some: what its own training run
    said of a few texts. They catch what loads without an error and scores wrongly: another tokenizer's ids, a lost
    normaliser, a head that was not loaded, the wrong token read.

    Raises:
        RuntimeError: where an item has no score, the mean deviation is above `tolerance` (score units), or the golden
            scores cannot be read.
    """
    file = local_checkpoint(path) / GOLDEN_FILE
    try:
        rows = _GOLDEN.validate_json(file.read_bytes()) if file.exists() else []
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RuntimeError(f"{path}: {GOLDEN_FILE} has no golden scores: {where}: {first['msg']}") from None
    scores = score([row.token_ids for row in rows] or [list(WARM_UP)])
    failed = [s.error for s in scores if s.value is None and s.code != "too_long"]
    if failed:
        raise RuntimeError(f"{path}: no score for a first batch: {failed[0]}")
    gaps = [abs(s.value - row.score) for s, row in zip(scores, rows, strict=bool(rows)) if s.value is not None]
    if gaps and not math.fsum(gaps) / len(gaps) <= tolerance:
        raise RuntimeError(
            f"{path}: {GOLDEN_FILE} is missed by {math.fsum(gaps) / len(gaps):.3f} on average "
            f"(reward_service.golden_tolerance allows {tolerance}): this is not the model that was trained"
        )
