"""A verifier: completions are compared with the right answers of their rows, in processes that can be ended
(docs/verifiers.md)."""

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.files.code_digest import foreign_digest, function_digest
from contracts.checks.check import Check
from contracts.config import RewardServiceConfig, ScorerConfig
from contracts.plugins import Kind, UnknownPlugin, import_path, names
from contracts.records import Score, ScoringItem
from reward_service.isolate import KILLS, Failed, Quarantine, isolate
from reward_service.kinds.function import CALL_S, FunctionError, FunctionPool, FunctionProcess, process_checks
from reward_service.scorer_kind import Scorer, ScorerKind, ScorerSpec, text_reader, version_of
from reward_service.verifier import EXTRA, VERIFIERS, find_verifier

Item = tuple[str, str | None, str | None]  # completion, row, label


class VerifierKind(ScorerKind):
    def checks(self, key: str, entry: ScorerConfig, service: RewardServiceConfig) -> list[Check]:
        try:
            found = find_verifier(entry.verifier or "")
            own = found.option_checks(f"{key}.options", entry.options)
            if all(check.holds for check in own):
                least = found.least_timeout_s(found.chosen(entry.answer, entry.options))
                rule = f"above {least:g}, the seconds that the verifier takes for itself"
                own.append(Check(entry.timeout_s > least, f"{key}.timeout_s", rule, entry.timeout_s, "more"))
        except UnknownPlugin as error:
            rule = f"one of {', '.join(names(VERIFIERS))}, or package.module:NAME"
            named = f"{entry.verifier} ({error})" if ":" in (entry.verifier or "") else entry.verifier
            own = [Check(False, f"{key}.verifier", rule, named, "for example math")]
        return [*own, *process_checks(key, entry, service)]

    def problems(self, key: str, entry: ScorerConfig) -> list[str]:
        missing = find_verifier(entry.verifier or "").missing()
        rule = f"a verifier whose packages are installed, without {', '.join(missing)}"
        instead = f"pip install 'tandem-rlhf[{EXTRA}]'"
        return [Check(False, f"{key}.verifier", rule, entry.verifier, instead).message] if missing else []

    def named_code(self, entry: ScorerConfig) -> list[tuple[Kind, str]]:
        return [(VERIFIERS, entry.verifier)] if entry.verifier else []

    def content(self, entry: ScorerConfig, memory: Path | None = None) -> str:
        """Its source, and the releases of the packages that it compares with."""
        return foreign_digest(_path(entry)) + _releases(entry)

    def spec(self, name: str, entry: ScorerConfig, service: RewardServiceConfig, tokenizer: str | None) -> ScorerSpec:
        settings = json.dumps([entry.answer, entry.options], sort_keys=True, default=str)
        return ScorerSpec(
            name,
            entry,
            version_of(str(entry.verifier), function_digest(_path(entry)) + _releases(entry), settings),
            calls=entry.processes * service.most_replicas,
            call_items=entry.batch_size,
            call_s=CALL_S,  # what is in one call waits for the slowest of it
            source=entry.verifier,
        )

    def row_check(self, entry: ScorerConfig) -> Callable[[dict[str, Any]], str | None] | None:
        verifier = find_verifier(entry.verifier or "")
        options = verifier.chosen(entry.answer, entry.options)
        return None if verifier.missing() else lambda row: verifier.found_problem(row, options)

    def make(self, entry: ScorerConfig, service: RewardServiceConfig, tokenizer: str) -> Scorer:
        return VerifierScorer(entry, tokenizer)


def _path(entry: ScorerConfig) -> str:
    return import_path(VERIFIERS, entry.verifier or "")


def _releases(entry: ScorerConfig) -> str:
    found = find_verifier(entry.verifier or "")
    packages = sorted(set(found.requires.values()) - set(found.missing()))
    return json.dumps({package: version(package) for package in packages})


class VerifierScorer(Scorer):
    """The pool of a verifier, which sees completions and rows."""

    def __init__(self, entry: ScorerConfig, tokenizer: str):
        self._texts = text_reader(tokenizer)
        self._pool = VerifierPool(entry)

    async def score(self, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        readable: dict[int, Item] = {}
        scores: dict[int, Score] = {}
        for index, item in enumerate(items):
            try:
                (text,) = self._texts([item])
                readable[index] = (text.completion, text.row, text.label)
            except Failed as fault:  # it is of this item alone
                scores[index] = Score(None, str(fault))
        answers = await asyncio.gather(
            *map(asyncio.wrap_future, self._pool.submit_items(list(readable.values()), deadline_s))
        )
        found = (score for answer in answers for score in answer)
        return [scores[index] if index in scores else next(found) for index in range(len(items))]


class VerifierProcess(FunctionProcess):
    runs = "verifier"

    @property
    def _name(self) -> str:
        return str(self._entry.verifier)

    def _module(self) -> list[str]:
        entry = self._entry
        options = json.dumps(dict(entry.options))
        return ["reward_service.verifier_worker", self._name, entry.answer or "", options, str(entry.memory_gib)]

    def verified(self, items: list[Item], expires: float) -> Iterator[Score]:
        """A Score an item, each within `timeout_s`. Raises Failed at the item that ends it; the process is then ended."""
        self._send(json.dumps(items))
        for _ in items:
            left = max(0.0, expires - time.monotonic())
            try:
                reply = self._read(min(self._entry.timeout_s, left))
            except Failed:
                self.end()
                if left < self._entry.timeout_s and time.monotonic() >= expires:
                    raise Failed("timeout: no score before the deadline") from None
                raise
            yield _score(reply)


def _score(reply: dict[str, Any]) -> Score:
    if "error" in reply:
        return Score(None, reply["error"])
    (score,) = isolate(lambda _: [reply["found"]], [None])
    return score


class VerifierPool(FunctionPool):
    """As that of a function, but each item has an answer of its own, and what ends a process costs that item alone."""

    process = VerifierProcess

    def __init__(self, entry: ScorerConfig):
        self._kills: Quarantine[Item] = Quarantine()
        super().__init__(entry)

    def submit_items(self, items: list[Item], deadline_s: float = math.inf) -> list:
        """Futures of the scores of each `batch_size` items, in order. Nothing begins after the deadline."""
        size, expires = self._entry.batch_size, time.monotonic() + deadline_s
        return [self._threads.submit(self._scores, items[i : i + size], expires) for i in range(0, len(items), size)]

    def _scores(self, items: list[Item], expires: float) -> list[Score]:
        process = self._idle.get()
        assert isinstance(process, VerifierProcess)
        scores: list[Score] = []
        try:
            while left := items[len(scores) :]:
                known = [item in self._kills for item in left]
                if time.monotonic() > expires:
                    scores += [Score(None, "timeout: no score before the deadline")] * len(left)
                elif known[0]:
                    scores.append(Score(None, f"poison: {KILLS} processes of the verifier had to be ended"))
                else:
                    self._go_on(process, left[: known.index(True)] if True in known else left, expires, scores)
        finally:
            self._idle.put(process)
        return scores

    def _go_on(self, process: VerifierProcess, items: list[Item], expires: float, scores: list[Score]) -> None:
        """Append the scores of `items`, up to the first one that ends the process."""
        before = len(scores)
        try:
            for score in process.verified(items, expires):
                scores.append(score)
        except FunctionError:  # nothing is known against the item
            scores.append(Score(None, "unavailable: its process does not start"))
        except Failed as fault:
            if fault.is_kill:
                self._kills.count(items[len(scores) - before])
            scores.append(Score(None, str(fault)))


KIND = VerifierKind()
