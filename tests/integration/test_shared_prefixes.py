"""Prompts that an engine computes once for several requests: a real vLLM, in float32, whose log-probabilities are held
against those of its own `token_logprobs`, which looks for no prefix."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine_proof import packed
from contracts.config import EngineConfig, ModelConfig, SamplingConfig
from contracts.records import Completion
from tests.conftest import make_tiny_model
from tests.forked_engine import beside_engine

SAMPLING = SamplingConfig(max_completion_tokens=150, min_completion_tokens=149)
BLOCK = 32  # tokens, which requests share as a whole
VOCABULARY = 2048


@pytest.fixture(scope="module")
def paths(engine_environment: None, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("prefixes")
    return [
        make_tiny_model(folder / str(seed), torch.float32, tied=True, vocab_size=VOCABULARY, seed=seed)
        for seed in (0, 1)
    ]


class Watched:
    """An engine, and what vLLM says of its requests."""

    def __init__(self, path: Path, kv_cache_gib: float, max_num_seqs: int):
        from actors.vllm_engine import VLLMEngine

        options = EngineConfig(max_num_seqs=max_num_seqs, max_model_len=512, kv_cache_gib=kv_cache_gib)
        self.engine = VLLMEngine(
            ModelConfig(path=str(path), dtype="float32"), options, "shared_memory", on_cpu=True, end_ids=()
        )
        core: Any = self.engine._engine.engine_core
        self.scheduler = core.engine_core.scheduler
        self.interrupted = 0
        self._cached: dict[str, int] = {}  # tokens, by request
        step, preempt = self.engine._engine.step, self.scheduler._preempt_request

        def watched_step() -> list[Any]:
            outputs = step()
            self._cached |= {out.request_id: out.num_cached_tokens for out in outputs}
            return outputs

        def watched_preempt(*args: Any, **kwargs: Any) -> None:
            self.interrupted += 1
            preempt(*args, **kwargs)

        self.engine._engine.step = watched_step  # type: ignore[method-assign]
        self.scheduler._preempt_request = watched_preempt

    def start(self, prompts: list[list[int]]) -> "list[Future[Completion]]":
        with self.engine.together():
            return [self.engine.submit(prompt, SAMPLING, seed) for seed, prompt in enumerate(prompts)]

    def cached(self) -> list[int]:
        """Tokens that requests found computed, in the order in which they came, since the last call."""
        found, self._cached = self._cached, {}
        return [found[key] for key in sorted(found, key=int)]

    def gap(self, prompts: list[list[int]], completions: list[Completion], version: int) -> float:
        """Largest difference, in nats, of what was recorded under `version` from what the engine says now."""
        pairs = list(zip(prompts, completions, strict=True))
        asked = [([*prompt, *done.token_ids.tolist()], len(prompt)) for prompt, done in pairs]
        now = self.engine.token_logprobs(asked)
        self.cached()
        of_version = [
            np.abs(c.behavior_logprobs - n)[c.policy_versions == version] for (_, c), n in zip(pairs, now, strict=True)
        ]
        return float(np.concatenate(of_version).max())


def said(path: Path, scenario: Callable[[Watched], Any], kv_cache_gib: float = 1 / 16, seqs: int = 4) -> Any:
    """What `scenario` returns beside an engine in a process of its own."""
    watched: list[Watched] = []

    def make() -> Any:
        watched.append(Watched(path, kv_cache_gib, seqs))
        return watched[0].engine

    return beside_engine(make, lambda _: scenario(watched[0]))


def prompt(seed: int, tokens: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, tokens).tolist()


def finish(waiting: "list[Future[Completion]]") -> list[Completion]:
    return [future.result(timeout=120) for future in waiting]


def test_a_group_computes_its_prompt_once_and_a_turn_the_turns_before_it_not_again(paths: list[Path]) -> None:
    def scenario(watched: Watched) -> dict[str, Any]:
        group = [prompt(0, 300)] * 4
        done = finish(watched.start(group))
        cached = watched.cached()
        longer = [*group[0], *done[0].token_ids.tolist(), 7, 8, 9]
        turn = watched.engine.submit(longer, SamplingConfig(max_completion_tokens=20), 5)
        turns = [turn.result()]
        cached_turn = watched.cached()
        gaps = [watched.gap(group, done, 0), watched.gap([longer], turns, 0)]
        finish(watched.start(group[:2]))
        return {"cached": cached, "turn": cached_turn, "gaps": gaps, "again": watched.cached()}

    found = said(paths[0], scenario)
    assert found["cached"] == [0, 288, 288, 288]  # nine blocks of 32
    assert found["turn"] == [448]  # of 300 + 150 tokens; the last one sampled was computed by nobody
    assert max(found["gaps"]) < 1e-3
    assert found["again"] == [0, 288]  # an idle engine begins anew


def test_nothing_from_older_weights_is_shared(paths: list[Path]) -> None:
    """Eight of one prompt, four at a time: an update comes when four run and four wait. Then the same version again, of
    other weights."""

    def scenario(watched: Watched) -> dict[str, Any]:
        group = [prompt(1, 300)] * 8
        waiting = watched.start(group)
        while watched.engine.pulse() < 20:
            pass
        watched.engine.exchange(*packed(paths[1]), 1)
        done = finish(waiting)
        cached = watched.cached()
        versions = [sorted(set(c.policy_versions.tolist())) for c in done]
        new = watched.gap(group[4:], done[4:], 1)
        waiting = watched.start(group)
        begun = watched.engine.pulse()
        while watched.engine.pulse() < begun + 20:
            pass
        watched.engine.exchange(*packed(paths[0]), 1)
        done = finish(waiting)
        return {"cached": cached, "versions": versions, "new": new, "same": watched.gap(group[4:], done[4:], 1)}

    found = said(paths[0], scenario)
    assert found["cached"] == [0, 288, 288, 288, 0, 288, 288, 288]
    assert found["versions"] == [[0, 1]] * 4 + [[1]] * 4
    assert found["new"] < 1e-3
    assert found["same"] < 1e-3


def test_what_is_interrupted_starts_again_from_the_weights_of_now(paths: list[Path]) -> None:
    """No room for all four to the end: one is interrupted after an update, and what it computes again has no older part."""

    def scenario(watched: Watched) -> dict[str, Any]:
        group = [prompt(seed, 100) for seed in (2, 2, 3, 3)]
        waiting = watched.start(group)
        while watched.engine.pulse() < 20:
            pass
        before = watched.interrupted
        watched.engine.exchange(*packed(paths[1]), 1)
        done = finish(waiting)
        again = watched.interrupted
        under_new = watched.engine.token_logprobs(
            [([*p, *c.token_ids.tolist()], len(p)) for p, c in zip(group, done, strict=True)]
        )
        ends = [float(np.abs(c.behavior_logprobs - n)[-1]) for c, n in zip(done, under_new, strict=True)]
        return {"before": before, "again": again, "ends": ends}

    found = said(paths[0], scenario, kv_cache_gib=22 * BLOCK * 2 * 2 * 64 * 4 / 2**30)
    assert found["before"] == 0
    assert found["again"] > 0
    assert min(found["ends"]) < 1e-3 < max(found["ends"])
