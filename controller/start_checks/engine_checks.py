"""What must be true of the engines before anything trains: they compute the model, and go on to do so with new weights."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.engine_proof import EngineProof, EngineUnproven, prove_engine
from contracts.checks.validation import ConfigError
from contracts.config import ModelConfig, TandemConfig
from contracts.lora_roles import role_model
from contracts.methods import samples
from contracts.records import Prompt
from contracts.scorer_roles import CHECKPOINTS
from contracts.stages import checkpoint_keys
from learner.learner_actor import LearnerGroup

PROOFS = "proofs"  # folder in cache_dir
TOKENS = 64  # of prompts, that a real model is asked about
# Mean nats by which an engine may change when it is sent the weights that it has loaded. It is 0 where both ends round a
# checkpoint alike; 16 bits allow for what a class keeps in float32 and DeepSpeed rounds.
UNCHANGED = {"float32": 1e-4}
UNCHANGED_HALF = 0.02


class WeightsChanged(RuntimeError):
    """An engine computes something else after it was sent the weights that it had."""


def begin_proofs(config: TandemConfig) -> Callable[[], list[EngineProof]]:
    """Prove vLLM for every policy of the run, beside whatever else starts. Returns what waits for the proofs.

    Nothing is proved where no stage samples, and on GPUs, where vLLM's own transports load the weights.

    Raises (what is returned):
        ConfigError: vLLM cannot serve a model for training.
    """
    if not samples(config) or config.cluster.gpus_per_actor:
        return list
    policies = [key for key in checkpoint_keys().values() if key not in CHECKPOINTS]
    paths = dict.fromkeys([config.model.path, *(path for key in policies if (path := getattr(config, key)))])
    found: Future[list[EngineProof]] = Future()

    def work() -> None:
        try:
            models = [role_model(config.model, "policy").at(path) for path in paths]
            memory = Path(config.cache_dir, PROOFS)
            found.set_result([prove_engine(model, config.engine.max_model_len, memory) for model in models])
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=work, daemon=True).start()

    def wait() -> list[EngineProof]:
        try:
            return found.result()
        except EngineUnproven as error:
            raise ConfigError(str(error)) from error

    return wait


def first_publish(
    learner: LearnerGroup,
    backend: str,
    actors: list[Any],
    model: ModelConfig,
    prompts: list[Prompt],
    max_model_len: int,
    timeout_s: float,
) -> None:
    """Connect the learner to the actors, which sends them the weights that they have loaded from disk.

    Raises:
        ActorsMissing: an actor did not get them.
        WeightsChanged: with the numbers, where an actor computes something else from them.
    """
    ids = [token for prompt in prompts[:TOKENS] for token in prompt.token_ids]
    ids = ids[: min(TOKENS, max_model_len)]
    before = _logprobs(actors, [ids, ids[::-1]], timeout_s)
    learner.call("connect", backend, actors)[0].require_all()
    after = _logprobs(actors, [ids, ids[::-1]], timeout_s)
    limit = UNCHANGED.get(model.dtype, UNCHANGED_HALF)
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        change = float(np.abs(new - old).mean())
        if not change <= limit:
            raise WeightsChanged(
                f"{model.path}: actor {number} differs from itself by {change:.2g} nats a token (at most {limit:.2g}) after "
                "it was sent the weights that it had loaded: what the learner sends is not what vLLM reads from this "
                "checkpoint, or vLLM does not take it. Nothing has been trained"
            )


def _logprobs(actors: list[Any], rows: list[list[int]], timeout_s: float) -> list[np.ndarray]:
    """float64 [tokens] of every actor."""
    calls = [actor.token_logprobs.remote([(row, 1) for row in rows]) for actor in actors]
    return [np.concatenate(answer) for answer in ray.get(calls, timeout=timeout_s)]
