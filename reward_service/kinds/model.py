"""A reward model: a checkpoint with one label (`reward_service/model.py`)."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.files.fingerprints import checkpoint_fingerprint
from common.text.tokenizers import local_checkpoint, vocabulary
from contracts.checks.check import Check, shown
from contracts.config import RewardServiceConfig, ScorerConfig
from contracts.records import Score, ScoringItem
from reward_service.request_batcher import RequestBatcher
from reward_service.score_position import EOS, LAST, NoHeader, chosen_read_at, has_tokenizer, make_reading
from reward_service.scorer_kind import Scorer, ScorerKind, ScorerSpec, version_of

CALLS = 4  # to a replica: enough for its batches
CALL_ITEMS = 32  # few enough to try one at a time if the replica dies


class Model(ScorerKind):
    is_reward_model = takes_place = True

    def checks(self, key: str, entry: ScorerConfig, service: RewardServiceConfig) -> list[Check]:
        read_at, append = entry.read_at, entry.append
        return [
            Check(bool(entry.path), f"{key}.path", "a checkpoint's directory or a hub id", entry.path, "its path"),
            Check(read_at in (None, EOS, LAST), f"{key}.read_at", "one of null, eos, last", read_at, "for example eos"),
            Check(
                append is None or (append != "" and read_at != EOS),
                f"{key}.append",
                f"null, or a text where {key}.read_at is last",
                f"{append!r} with read_at={shown(read_at)}",
                f"{key}.read_at=last, or append: null",
            ),
        ]

    def content(self, entry: ScorerConfig, memory: Path | None = None) -> str:
        return checkpoint_fingerprint(entry.path, memory=memory) if entry.path else ""

    def problems(self, key: str, entry: ScorerConfig) -> list[str]:
        """Its replicas start in a pipeline after SFT."""
        try:
            if entry.path and has_tokenizer(entry.path):
                make_reading(entry.path, entry.read_at, entry.append, entry.path)
        except NoHeader as error:
            return [f"{key}: {error}"]
        except (
            Exception
        ):  # whatever a library raises on a file that it cannot read: `spec` and the checks of models say it
            return []
        return []

    def spec(self, name: str, entry: ScorerConfig, service: RewardServiceConfig, tokenizer: str | None) -> ScorerSpec:
        from reward_service.model import check_reward_model

        path = entry.path or ""
        check_reward_model(path, "path")
        read_at = chosen_read_at(path, entry.read_at, entry.append)
        version = model_version(path, service.dtype, "" if read_at == EOS else f"{read_at} {entry.append}")
        if tokenizer is not None:
            own, ours = vocabulary(path), vocabulary(tokenizer)
            if own is not None and ours is not None and own != ours:  # no error would tell, and the scores mean nothing
                raise ValueError(f"{path} has another vocabulary than {tokenizer}, whose token ids are scored")
        if tokenizer is not None or has_tokenizer(path):
            make_reading(
                path, entry.read_at, entry.append, tokenizer or path
            )  # refuses here what no replica could read
        return ScorerSpec(
            name,
            entry,
            version,
            max_tokens=service.max_tokens,
            calls=CALLS * service.most_replicas,
            call_items=CALL_ITEMS,
            source=path,
            read_at=read_at,
        )

    def make(self, entry: ScorerConfig, service: RewardServiceConfig, tokenizer: str) -> Scorer:
        return ModelScorer(entry, service, tokenizer)


def model_version(path: str, dtype: str, reading: str = "") -> str:
    """Covers weights, configuration (the normaliser is part of it), tokenizer, chat template, the precision it is served in
    and where its score is read.

    Args:
        reading: how its scores are read, where that is not at the EOS.

    Raises:
        OSError: or a hub error, where there is no such checkpoint.
    """
    return version_of(dtype + reading, checkpoint_fingerprint(str(local_checkpoint(path))))


class ModelScorer(Scorer):
    """One reward model in a replica's process."""

    def __init__(self, entry: ScorerConfig, service: RewardServiceConfig, tokenizer: str):
        from reward_service.model import RewardModel, check_golden

        # One thread loads the model and runs every forward pass: a second pass would only contend for the same cores, and a
        # second thread would bring an OpenMP team of its own. The replica answers health checks meanwhile.
        thread = ThreadPoolExecutor(1)
        path = str(entry.path)
        reading = make_reading(path, entry.read_at, entry.append, tokenizer)
        arguments = (path, service.dtype, service.batch_tokens, service.max_tokens, reading)
        model = thread.submit(RewardModel, *arguments).result()
        thread.submit(check_golden, path, model.score, service.golden_tolerance).result()
        self._batcher = RequestBatcher(model.score, thread, service.batch_tokens)

    @property
    def busy_s(self) -> float:
        return self._batcher.busy_s

    async def score(self, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        return await self._batcher.score([item.token_ids for item in items], deadline_s)


KIND = Model()
