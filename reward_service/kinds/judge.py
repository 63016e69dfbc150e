"""A language model that writes: it is shown a rubric, and its score is read off the probabilities or the text of its answer.

    item ─> rubric ─> question(s) ─> engine of our own, or an address ─> reading(s) ─> score
                      pairwise: two, one in each order

docs/judges.md.
"""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common.error_text import error_lines
from common.files.fingerprints import checkpoint_fingerprint
from common.text.encoding import readable
from common.text.tokenizer_proof import check_tokens
from common.text.tokenizers import load_tokenizer, local_checkpoint
from contracts.checks.check import Check
from contracts.config import JudgeConfig, ModelConfig, RewardServiceConfig, ScorerConfig
from contracts.records import Score, ScoringItem
from reward_service.isolate import Failed
from reward_service.judging.endpoint import TOP, Endpoint, read_token
from reward_service.judging.questions import Questions
from reward_service.judging.rubric import NoColumn, Rubric, columns_of, is_text, read_rubric
from reward_service.judging.scale import Reading, scale_of
from reward_service.scorer_kind import Scorer, ScorerKind, ScorerSpec, text_reader, version_of

CALLS = 2  # to an engine: one waits while the other is answered
TOKENS = 128  # of which vLLM gives log-probabilities at most
# What decides no value, or counts with its content.
NO_PART = ("address", "model", "rubric", "token_file", "concurrency", "timeout_s", "engine")


class Judge(ScorerKind):
    def has_place(self, entry: ScorerConfig) -> bool:
        return entry.judge.model is not None

    def checks(self, key: str, entry: ScorerConfig, service: RewardServiceConfig) -> list[Check]:
        key, judge = f"{key}.judge", entry.judge
        is_pair = judge.mode == "pairwise"
        given = [name for name in ("model", "address") if getattr(judge, name)]
        rubric = _reason(Rubric, judge.rubric, judge.mode) if is_text(judge.rubric) or not judge.rubric else None
        return [
            Check(len(given) == 1, f"{key}.model", f"given, or {key}.address, and not both", given, "one of the two"),
            Check(
                not judge.address or _is_base_url(judge.address),
                f"{key}.address",
                "the base URL of a server, without a user, a query or a fragment",
                # A password in it stays out of every log.
                (judge.address or "").rpartition("@")[2],
                "for example http://127.0.0.1:8000/v1, and the token into token_file",
            ),
            Check(
                bool(judge.model_name) == bool(judge.address),
                f"{key}.model_name",
                "the server's name of the model, with an address and only there",
                judge.model_name,
                "the name that the server's /v1/models has" if judge.address else "null",
            ),
            Check(
                bool(judge.address) or judge.token_file is None,
                f"{key}.token_file",
                "null without an address",
                judge.token_file,
                "null",
            ),
            Check(rubric is None, f"{key}.rubric", "a template that shows what is judged, or a file", rubric,
                  "{{ first }} and {{ second }} into it" if is_pair else "{{ completion }} into it"),
            Check(
                bool(judge.reference) == is_pair,
                f"{key}.reference",
                "a column of the row where mode is pairwise, else null",
                judge.reference,
                "the column with the completion to compare with" if is_pair else "null",
            ),
            Check(
                not judge.model or judge.max_tokens < judge.engine.max_model_len,
                f"{key}.max_tokens",
                f"below {key}.engine.max_model_len ({judge.engine.max_model_len})",
                judge.max_tokens,
                "fewer tokens, or a longer max_model_len",
            ),
            *_scale_checks(key, judge),
        ]  # fmt: skip

    def problems(self, key: str, entry: ScorerConfig) -> list[str]:
        """What is at an address is asked, once."""
        found = [f"{key}.judge.{problem}" for problem in _unreadable(entry.judge)]
        if not found and entry.judge.address:
            try:
                _probe(entry.judge)
            except ValueError as error:
                return [f"{key}.judge.{error}"]
        return found

    def content(self, entry: ScorerConfig, memory: Path | None = None) -> str:
        judge = entry.judge
        weights = checkpoint_fingerprint(str(local_checkpoint(judge.model)), memory=memory) if judge.model else ""
        return version_of(read_rubric(judge).source, weights)

    def spec(self, name: str, entry: ScorerConfig, service: RewardServiceConfig, tokenizer: str | None) -> ScorerSpec:
        judge = entry.judge
        if problems := list(_unreadable(judge)):
            raise ValueError("; ".join(f"judge.{problem}" for problem in problems))
        settings = {key: value for key, value in asdict(judge).items() if key not in NO_PART}
        source = f"{service.dtype}" if judge.model else str(judge.address)
        return ScorerSpec(
            name,
            entry,
            version_of(self.content(entry), source, json.dumps(settings, sort_keys=True)),
            # At an address each item is a call of its own, which waits for no other.
            calls=(CALLS if judge.model else judge.concurrency) * service.most_replicas,
            call_items=judge.engine.max_num_seqs if judge.model else 1,
            source=judge.model or judge.model_name,
        )

    def row_check(self, entry: ScorerConfig) -> Callable[[dict[str, Any]], str | None] | None:
        rubric = read_rubric(entry.judge)

        def problem(row: dict[str, Any]) -> str | None:
            try:
                ask(entry.judge, rubric, row, None, "-", "-")
            except NoColumn as fault:
                return str(fault)
            except Failed:  # it may be of these texts
                return None
            return None

        return problem

    def make(self, entry: ScorerConfig, service: RewardServiceConfig, tokenizer: str) -> Scorer:
        return JudgeScorer(entry.judge, service.dtype, tokenizer)


def _is_base_url(address: str) -> bool:
    try:
        parts = urlsplit(address)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError:  # a port that is none
        return False
    return is_whole and "@" not in parts.netloc and not parts.query and not parts.fragment


def _scale_checks(key: str, judge: JudgeConfig) -> Iterator[Check]:
    is_pair = judge.mode == "pairwise"
    answers = [answer.strip() for answer in judge.scale]
    rule = "two different answers or more, or empty"
    yield Check(
        not answers or (len(answers) > 1 and len(set(answers)) == len(answers) and all(answers)),
        f"{key}.scale", rule, judge.scale, "for example [1, 2, 3, 4, 5]",
    )  # fmt: skip
    try:
        scale = scale_of(judge)
    except ValueError:
        instead = "for example judge.values=[1, 0, 0.5]" if is_pair else "for example judge.values=[1, 0]"
        yield Check(False, f"{key}.values", "the number of each answer that is none itself", judge.values, instead)
        return
    count, values = len(scale.answers), list(scale.values)
    yield Check(len(values) == count, f"{key}.values", f"{count} numbers, one an answer, or empty", values, "as many")
    least, most = (0.0, 1.0) if is_pair else (-math.inf, math.inf)
    are_finite = all(math.isfinite(value) and least <= value <= most for value in values)
    bounds = "in [0, 1], the share of the first" if is_pair else "finite numbers"
    yield Check(are_finite, f"{key}.values", bounds, values, "for example [1, 0]")
    most_answers = TOP if judge.address else TOKENS
    few = judge.read == "text" or count <= most_answers
    yield Check(
        few, f"{key}.scale", f"at most {most_answers} answers, of which probabilities are given", count, "fewer"
    )
    if judge.address and judge.read == "probabilities":
        firsts = [answer.strip()[:1] for answer in scale.answers]
        yield Check(
            len(set(firsts)) == count,
            f"{key}.scale",
            "answers with different first characters, as the first token of each is read",
            list(scale.answers),
            "for example [1, 2, 3, 4, 5], or judge.read=text",
        )


def _reason(function: Any, *arguments: Any) -> str | None:
    """Why it raises what is to be said to the user."""
    try:
        function(*arguments)
    except (OSError, ValueError, KeyError) as error:
        return error_lines(error)[0][:200]
    return None


def _unreadable(judge: JudgeConfig) -> Iterator[str]:
    """What is wrong with the files that are named, each with its key."""
    if reason := _reason(read_rubric, judge):
        yield f"rubric={judge.rubric[:80]!r}: {reason}"
    if reason := _reason(read_token, judge.token_file):
        yield f"token_file={judge.token_file}: {reason}"
    if judge.model and (reason := _reason(_questions, judge)):
        yield f"model={judge.model}: {reason}"


def _questions(judge: JudgeConfig) -> Questions:
    """As the engine asks them. Raises what the tokenizer does, and ValueError."""
    assert judge.model
    tokenizer = load_tokenizer(judge.model, ModelConfig(path=judge.model))
    check_tokens(judge.model, tokenizer)
    return Questions(judge, scale_of(judge), tokenizer, read_rubric(judge).source)


def _probe(judge: JudgeConfig) -> None:
    """Raises ValueError. In a thread: whoever asks may have an event loop already."""
    endpoint = Endpoint(judge, scale_of(judge))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, endpoint.probe()).result()


class JudgeScorer(Scorer):
    """One judge in a replica's process.

    Raises:
        OSError, ValueError: the files cannot be read, or the address does not answer as it should.
    """

    def __init__(self, judge: JudgeConfig, dtype: str, tokenizer: str):
        self._judge, self._scale = judge, scale_of(judge)
        self._rubric = read_rubric(judge)
        self._texts = text_reader(tokenizer, with_controls=False)
        self._since = 0.0
        if judge.model:
            from reward_service.judging.vllm_judge import VLLMJudge

            self._thread = ThreadPoolExecutor(1)
            arguments = (judge, self._scale, self._rubric.source, dtype)
            self._engine = self._thread.submit(VLLMJudge, *arguments).result()
        else:
            _probe(judge)
            self._endpoint = Endpoint(judge, self._scale)

    @property
    def busy_s(self) -> float:
        return time.monotonic() - self._since if self._since else 0.0

    def take_counts(self) -> dict[str, int]:
        counting = self._engine if self._judge.model else self._endpoint
        taken, counting.counts = counting.counts, Counter()
        return dict(taken)

    async def close(self) -> None:
        if not self._judge.model:
            await self._endpoint.close()

    async def score(self, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        expires = time.monotonic() + deadline_s
        asked: list[list[str]] = []
        unasked: dict[int, Score] = {}
        for index, item in enumerate(items):
            try:
                asked.append(self._ask(item))
            except Failed as fault:  # it is of this item alone
                unasked[index] = Score(None, str(fault))
        readings = iter(await self._read([question for questions in asked for question in questions], expires))
        found = iter([score_of([next(readings) for _ in questions]) for questions in asked])
        return [unasked[index] if index in unasked else next(found) for index in range(len(items))]

    def _ask(self, item: ScoringItem) -> list[str]:
        """The question on an item; pairwise with the completion first, and second. Raises Failed."""
        (text,) = self._texts([item])
        prompt = readable(json.loads(text.messages)) if text.messages else text.prompt
        return ask(self._judge, self._rubric, columns_of(text.row), text.label, prompt, text.completion)

    async def _read(self, questions: list[str], expires: float) -> list[Reading | Failed]:
        if not questions:
            return []
        if not self._judge.model:
            return await self._endpoint.read(questions, expires)

        def timed() -> list[Reading | Failed]:
            self._since = time.monotonic()
            found = self._engine.read(questions, expires)
            self._since = 0.0
            return found

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, timed)
        except Exception:
            self._since = -math.inf  # it answers no more: the health check has the replica replaced
            raise


def ask(
    judge: JudgeConfig, rubric: Rubric, row: dict[str, Any], label: str | None, prompt: str, completion: str
) -> list[str]:
    """The question on a completion; pairwise two, with it first and second. Raises Failed, NoColumn where a row lacks what
    it is to have."""
    if judge.mode == "pointwise":
        return [rubric(row, label, prompt=prompt, completion=completion)]
    reference = row.get(str(judge.reference))
    if not isinstance(reference, str):
        code = "bad_row" if judge.reference in row else "missing_column"
        raise NoColumn(f"{code}: {judge.reference}, judge.reference, with a text to compare with")
    pairs = ((completion, reference), (reference, completion))
    return [rubric(row, label, prompt=prompt, first=first, second=second) for first, second in pairs]


def score_of(readings: list[Reading | Failed]) -> Score:
    """Of an item. Pairwise the mean over both orders, of which each reads the share of the first: what the judge prefers of
    a place cancels (Zheng 2023, arXiv 2306.05685, section 3.4), and `order_gap` says how far the two are apart."""
    failed = [str(reading) for reading in readings if isinstance(reading, Failed)]
    if failed:
        return Score(None, failed[0])
    found = [reading for reading in readings if isinstance(reading, Reading)]
    values = [reading.value for reading in found]
    parts = {}
    if len(values) == 2:
        values[1] = 1 - values[1]
        parts["order_gap"] = abs(values[0] - values[1])
    off = [reading.off_scale for reading in found if reading.off_scale is not None]
    if off:
        parts["off_scale"] = math.fsum(off) / len(off)
    value = math.fsum(values) / len(values)
    return Score(value, raw=value, parts=parts or None)


KIND = Judge()
