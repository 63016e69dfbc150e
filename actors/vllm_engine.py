"""A generation engine: one thread owns an in-process vLLM engine and runs commands between two decoding steps.

    submit / token_logprobs / control (any thread)          the thread inside `run`
      put a command, hold a Future     ── queue ──>   run every waiting command, then one step;
                                                      a finished request resolves its Future;
                                                      blocks on the queue only when no request is unfinished
                                                      or while a weight update is under way

vLLM's own asynchronous engine needs three processes and is a third slower to start; on two cores this matters. So does
the thread: the one that runs the engine must also have built it. OpenMP keeps a team of threads for each thread that ever
computed, and once there are more of them than cores it lets every one sleep between two loops: generation is a third slower.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from actors.weight_receiver import WeightReceiver
from common.models.adapters import lora_of, require_here, split, stored_adapter
from common.models.lora import scale
from common.processes.shared_memory import pack
from contracts.config import EngineConfig, LoraConfig, ModelConfig, SamplingConfig
from contracts.interfaces import EngineLostError
from contracts.records import Completion
from contracts.weights import LoadReport, Parameters, SegmentAddress, WeightsRefused, WeightUpdate

SUBMIT_S = 1.0  # for which the engine stands still at most, while requests are submitted together


class VLLMEngine:
    """Of a checkpoint, or of the directory of an adapter and its base. Raises what vLLM raises when the model cannot be
    loaded. One instance a process, `run` by the thread that made it."""

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        weight_transfer: str,
        on_cpu: bool,
        end_ids: tuple[int, ...],
        seed: int = 0,
        publish_timeout_s: float = 120.0,
    ):
        self._end_ids = list(end_ids)
        require_here(model.path)
        self._lora, (base, adapter) = model.lora, split(model.path)
        arguments: dict[str, Any] = {
            "model": base,
            "revision": model.revision,
            "trust_remote_code": model.trust_remote_code,
            "dtype": model.dtype,
            "max_model_len": config.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "tensor_parallel_size": config.tensor_parallel_size,
            "enforce_eager": config.enforce_eager,
            "seed": seed,
            "use_tqdm_on_load": False,  # an adapter reads the checkpoint again at every update
            # log p at the sampling temperature, as the learner computes it; the default ignores the temperature.
            "logprobs_mode": "processed_logprobs",
            "weight_transfer_config": {"backend": weight_transfer},
            "disable_log_stats": True,
            # A step that was launched before an update would give its tokens the version after it.
            "async_scheduling": False,
        }
        if on_cpu:
            arguments |= {
                "distributed_executor_backend": "uni",
                "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
                # A prompt cut in two steps rewinds the request's generator, which CPU generators cannot do (vLLM 0.32:
                # "CPU Generator does not use offset"); and the seeds are what makes a rollout repeatable.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, config.max_model_len),
            }
        else:
            arguments |= {
                "gpu_memory_utilization": config.gpu_memory_utilization,
                # Within a placement group vLLM would choose Ray, which takes no bundle with several GPUs.
                "distributed_executor_backend": "mp" if config.tensor_parallel_size > 1 else "uni",
            }
        options = EngineArgs(**arguments)
        # The samples of a group compute their prompt once. Not where a layer has a recurrent state: what vLLM has for those
        # wants prompts that may be cut.
        options.enable_prefix_caching = options.create_model_config().attn_type == "decoder"
        if options.enable_prefix_caching and on_cpu:
            options.block_size = 32  # tokens; whole blocks are shared, and the default is 128
        self._engine = LLMEngine.from_engine_args(options)
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = queue.SimpleQueue()
        self._requests: dict[str, Future[RequestOutput]] = {}
        self._ids = count()
        self._updating = False
        self._steps = 0
        self._lost: BaseException | None = None
        self._weights = WeightReceiver(self.exchange, publish_timeout_s)
        self._salts = count()
        self._set_version(0)
        if adapter:
            self._exchange(*pack(stored_adapter(adapter, model)), 0, lora_of(adapter))

    # ---- any thread

    def submit(self, token_ids: list[int], sampling: SamplingConfig, seed: int) -> "Future[Completion]":
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_completion_tokens,
            min_tokens=sampling.min_completion_tokens,  # before which it bans what stops it
            stop_token_ids=self._end_ids,
            seed=seed,
            logprobs=0,  # of the sampled token alone
            detokenize=True,
            output_kind=RequestOutputKind.FINAL_ONLY,  # else every step builds every request's output so far
        )
        return self._request(token_ids, params, _completion)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is submitted within starts in one decoding step, where that takes at most a second: the log-probabilities
        of a request depend in the last bits on its neighbours, and so do not depend on the time. An idle engine forgets
        what prefixes it has seen, on which they depend in the same way."""
        submitted = threading.Event()

        def hold() -> None:
            if not self._engine.has_unfinished_requests():
                self._forget_prefixes()
            submitted.wait(SUBMIT_S)

        self._call(hold)
        try:
            yield
        finally:
            submitted.set()

    def token_logprobs(self, sequences: list[tuple[list[int], int]]) -> list[list[float]]:
        """The last token is asked for as one that could follow the others: vLLM samples a token after every prompt, for
        which a sequence of `max_model_len` leaves no room."""

        def ask(ids: list[int], start: int) -> Future:
            last = ids[-1]
            params = SamplingParams(
                max_tokens=1, prompt_logprobs=0, logprob_token_ids=[last], temperature=1.0, detokenize=False
            )

            def read(out: RequestOutput) -> list[float]:
                # The first entry is the prompt's own token.
                before = [next(iter(e.values())).logprob for e in (out.prompt_logprobs or [])[start:] if e]
                assert out.outputs[0].logprobs
                return [*before, out.outputs[0].logprobs[0][last].logprob]

            return self._request(ids[:-1], params, read)

        waiting = [ask(ids, start) if start < len(ids) else None for ids, start in sequences]
        return [future.result() if future else [] for future in waiting]

    def pulse(self) -> int:
        """Decoding steps so far. An idle engine makes one for a canary, which nothing else shares a step with: the batch
        that a token is sampled in decides how it is rounded."""

        def run() -> int:
            if not (self._updating or self._engine.has_unfinished_requests()):
                request_id = str(next(self._ids))
                self._requests[request_id] = Future()
                params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
                self._engine.add_request(request_id, {"prompt_token_ids": [0]}, params)
                while request_id in self._requests:
                    self._step()
            return self._steps

        return self._call(run).result()

    def control(self, method: str, argument: dict[str, Any] | None = None) -> None:
        """One call of vLLM's weight-transfer protocol. No step runs between start_weight_update and
        set_weight_version, so requests see either the old weights or the new ones, and no token a version not its own."""

        def run() -> None:
            if method == "set_weight_version":
                assert argument is not None
                self._set_version(argument["version"])
                self._updating = False
                return
            if method == "start_weight_update":
                self._updating = True
            try:
                self._engine.collective_rpc(method, kwargs=argument or {})
            except BaseException as error:
                if self._updating:
                    self._lost = error  # some layers are new and some are old
                raise

        self._call(run).result()

    def connect_weights(self, publisher: str, address: SegmentAddress | None) -> bool:
        return self._weights.connect(publisher, address)

    def load_weights(self, update: WeightUpdate) -> LoadReport:
        return self._weights.load(update)

    def exchange(
        self, parameters: Parameters, buffer: torch.Tensor, version: int, lora: LoraConfig | None = None
    ) -> float:
        """All of one update between two decoding steps: adapters with `lora`, which is `model.lora` of an engine that has
        it. Returns the seconds that it took.

        Raises:
            WeightsRefused: they are no adapters on the checkpoint that the engine has loaded, which goes on.
        """
        return self._call(lambda: self._exchange(parameters, buffer, version, lora or self._lora)).result()

    # ---- the thread inside `run`

    def _exchange(self, parameters: Parameters, buffer: torch.Tensor, version: int, lora: LoraConfig | None) -> float:
        start = time.perf_counter()
        update: dict[str, Any] = {"parameters": parameters, "buffer": buffer}
        if lora is not None:
            check: Any = _misfit
            problem: Any = self._engine.collective_rpc(check, args=(parameters, lora))[0]
            if problem:
                raise WeightsRefused(f"version {version}: {problem}")
            update["lora_scale"] = scale(lora)
        try:
            self._engine.collective_rpc("start_weight_update")
            self._engine.collective_rpc("update_weights", kwargs={"update_info": update})
            self._engine.collective_rpc("finish_weight_update")
        except BaseException as error:
            self._lost = error  # some layers are new and some are old
            raise
        self._set_version(version)
        return time.perf_counter() - start

    def _set_version(self, version: int | str) -> None:
        self._engine.set_weight_version(str(version))
        self._forget_prefixes()

    def _forget_prefixes(self) -> None:
        """What is computed from now on uses no prefix that was computed before. vLLM's own way to do so wants an engine
        without requests; a salt that nobody had does it among them. Those that wait get it too. Those that run go on with
        what they have, and should they be interrupted and start again, they look for nothing: what they compute until then
        is from older weights in part, and has the salt that they began with."""
        # Counted, as versions come again, of another publisher.
        self._salt = f"{self._engine.get_weight_version()}.{next(self._salts)}"
        core: Any = self._engine.engine_core  # vLLM's clients are several; this one is in this process
        for request in core.engine_core.scheduler.requests.values():
            if request.num_computed_tokens > 0:
                request.skip_reading_prefix_cache = True
            else:
                request.cache_salt = self._salt
                request.block_hashes.clear()
                request.update_block_hashes()

    def _request(self, token_ids: list[int], params: SamplingParams, read: Callable[[RequestOutput], Any]) -> Future:
        result: Future = Future()
        request_id = str(next(self._ids))

        def add() -> None:
            raw: Future[RequestOutput] = Future()
            raw.add_done_callback(lambda done: _forward(done, result, read))
            self._requests[request_id] = raw
            try:
                prompt: Any = {"prompt_token_ids": token_ids, "cache_salt": self._salt}
                self._engine.add_request(request_id, prompt, params)
            except Exception as error:  # vLLM validates here; the caller of this one request must hear of it
                del self._requests[request_id]
                result.set_exception(error)

        def refused(queued: Future) -> None:  # the engine was lost before it came to this
            if error := queued.exception():
                result.set_exception(error)

        self._call(add).add_done_callback(refused)
        return result

    def _call(self, function: Callable[[], Any]) -> Future:
        done: Future = Future()
        self._commands.put((function, done))
        if self._lost is not None:
            self._fail_commands(self._lost)
        return done

    def _fail_commands(self, error: BaseException) -> None:
        while True:
            try:
                _, done = self._commands.get_nowait()
            except queue.Empty:
                return
            done.set_exception(error)

    def run(self) -> None:
        """Serve; returns never.

        Raises:
            EngineLostError: what ended the engine; every caller, waiting or to come, gets it too.
        """
        try:
            self._serve()
        except BaseException as error:
            self._lost = lost = EngineLostError(f"{type(error).__name__}: {error}")
            for future in self._requests.values():
                future.set_exception(lost)
            self._requests.clear()
            self._fail_commands(lost)
            raise lost from error

    def _serve(self) -> None:
        while self._lost is None:
            idle = self._updating or not self._engine.has_unfinished_requests()
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                self._step()
                continue
            function, done = command
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)
        raise self._lost

    def _step(self) -> None:
        self._steps += 1
        for output in self._engine.step():
            assert isinstance(output, RequestOutput)  # nothing is asked to pool
            if output.finished:
                self._requests.pop(output.request_id).set_result(output)


def _misfit(worker: Any, parameters: Parameters, lora: LoraConfig) -> str | None:
    return worker.weight_transfer_engine.misfit(parameters, lora)


def _forward(done: Future, result: Future, read: Callable[[Any], Any]) -> None:
    try:
        result.set_result(read(done.result()))
    except BaseException as error:
        result.set_exception(error)


def _completion(output: RequestOutput) -> Completion:
    sampled = output.outputs[0]
    token_ids = np.asarray(sampled.token_ids, dtype=np.int32)
    steps: Any = sampled.logprobs or []  # one for every token: None is only among those of prompts
    logprobs = [step[token].logprob for step, token in zip(steps, sampled.token_ids, strict=True)]
    versions = np.zeros(len(token_ids), dtype=np.int32)
    for span in sampled.weight_versions or []:
        versions[span.start : span.end] = int(span.version)
    return Completion(
        token_ids=token_ids,
        behavior_logprobs=np.asarray(logprobs, dtype=np.float32),
        policy_versions=versions,
        finish_reason=str(sampled.finish_reason),
        text=sampled.text,
    )
