"""A judge of our own: a vLLM engine in the replica's process, the only module of this room that drives vLLM.

It is no `actors.vllm_engine`: its weights stay, nothing is submitted between two decoding steps, and a call is one batch.
All of its methods run in the thread that made it, as OpenMP keeps a team of threads for each that ever computed.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.llm_engine import LLMEngine

from common.text.encoding import DataError
from common.text.tokenizers import load_tokenizer
from contracts.config import JudgeConfig, ModelConfig
from reward_service.isolate import Failed
from reward_service.judging.questions import Questions
from reward_service.judging.scale import Reading, Scale, expected, written

LATE = "timeout: no answer of the judge before the deadline"


class VLLMJudge:
    """Raises what vLLM raises where the model cannot be loaded, and ValueError where its answers cannot be told apart."""

    def __init__(self, judge: JudgeConfig, scale: Scale, rubric: str, dtype: str):
        assert judge.model is not None
        self._judge, self._scale = judge, scale
        tokenizer = load_tokenizer(judge.model, ModelConfig(path=judge.model))
        self._questions = Questions(judge, scale, tokenizer, rubric)
        engine = judge.engine
        arguments: dict[str, Any] = {
            "model": judge.model,
            "dtype": dtype,
            "max_model_len": engine.max_model_len,
            "max_num_seqs": engine.max_num_seqs,
            "enforce_eager": engine.enforce_eager,
            "distributed_executor_backend": "uni",
            # What is in the cache would decide how a prompt's sums are rounded, and so a score on what was asked before.
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "async_scheduling": False,  # as of the rollout engines: nothing is prepared ahead of one batch
        }
        if current_platform.is_cpu():
            arguments |= {
                "kv_cache_memory_bytes": int(engine.kv_cache_gib * 2**30),
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, engine.max_model_len),
            }
        else:
            arguments |= {"gpu_memory_utilization": engine.gpu_memory_utilization}
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._ids = count()
        self.counts: Counter[str] = Counter()

    def read(self, questions: list[str], expires: float) -> list[Reading | Failed]:
        """A reading of each question, or why there is none. What has none at `expires` (monotonic clock) is a time-out."""
        if self._judge.max_tokens:
            params = self._params(self._judge.max_tokens, stop_token_ids=self._questions.end_ids)
            first = self._generate(
                [self._encoded(self._questions.ask, question) for question in questions], params, expires
            )
            prompts: list[list[int] | Failed] = [
                said if isinstance(said, Failed) else self._encoded(self._questions.ask_again, question, said.text)
                for question, said in zip(questions, first, strict=True)
            ]
        else:
            prompts = [self._encoded(self._questions.ask, question) for question in questions]
        if self._judge.read == "probabilities":
            params = self._params(1, logprob_token_ids=self._questions.first_ids, detokenize=False)
        else:
            choice = StructuredOutputsParams(choice=list(self._scale.answers))
            params = self._params(self._scale.longest + 1, structured_outputs=choice)
        return [self._reading(answer) for answer in self._generate(prompts, params, expires)]

    @staticmethod
    def _encoded(encode: Callable[..., list[int]], *texts: str) -> list[int] | Failed:
        try:
            return encode(*texts)
        except DataError as fault:  # what a template makes of one text is that item's error
            return Failed(f"unreadable: {type(fault).__name__} in the judge's chat template")

    def _reading(self, answer: CompletionOutput | Failed) -> Reading | Failed:
        try:
            if isinstance(answer, Failed):
                raise answer
            if self._judge.read == "text":
                return written(self._scale, answer.text)
            assert answer.logprobs  # of one token, which is sampled and counts for nothing
            found = answer.logprobs[0]
            probabilities = [math.exp(found[token].logprob) for token in self._questions.first_ids]
            return expected(self._scale, probabilities, self._judge.min_on_scale)
        except Failed as fault:
            return fault

    @staticmethod
    def _params(max_tokens: int, **more: Any) -> SamplingParams:
        """Greedy: what is asked twice is answered alike. Log-probabilities are those at temperature 1 nevertheless."""
        return SamplingParams(max_tokens=max_tokens, temperature=0.0, output_kind=RequestOutputKind.FINAL_ONLY, **more)

    def _generate(
        self, prompts: list[list[int] | Failed], params: SamplingParams, expires: float
    ) -> list[CompletionOutput | Failed]:
        """All at once. What is Failed already stays so."""
        found: list[CompletionOutput | Failed] = [p if isinstance(p, Failed) else Failed(LATE) for p in prompts]
        longest = self._judge.engine.max_model_len - int(params.max_tokens or 0)
        waiting: dict[str, int] = {}
        try:
            for row, ids in enumerate(prompts):
                if isinstance(ids, Failed):
                    continue
                if len(ids) > longest:
                    found[row] = Failed(f"too_long: {len(ids)} tokens, judge.engine.max_model_len leaves {longest}")
                    continue
                request_id = str(next(self._ids))
                self._engine.add_request(request_id, {"prompt_token_ids": ids}, params)
                waiting[request_id] = row
                self.counts.update(requests=1, prompt_tokens=len(ids))
            while waiting and time.monotonic() < expires:
                for output in self._engine.step():
                    assert isinstance(output, RequestOutput)  # nothing is asked to pool
                    if output.finished and output.request_id in waiting:
                        answer = output.outputs[0]
                        found[waiting.pop(output.request_id)] = answer
                        self.counts["completion_tokens"] += len(answer.token_ids)
        finally:
            if waiting:
                self.counts["failed_requests"] += len(waiting)
                self._engine.abort_request(list(waiting))
        return found
