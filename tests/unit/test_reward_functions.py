"""Rule functions in real processes: answers, and what happens to those that hang, crash, grow or talk."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from common.text.tokenizers import load_decoder
from contracts.config import ScorerConfig
from contracts.records import Score, ScoringItem
from contracts.scoring import RETRYABLE
from reward_service.isolate import Failed, isolate
from reward_service.kinds.function import FunctionError, FunctionPool, FunctionProcess, FunctionScorer, Text
from reward_service.scorer_kind import ThreadScorer, text_reader
from tests.conftest import SMOLLM

ROOT = Path(__file__).parents[2]
RULES = """
import asyncio, functools, os, sys, time, math
import numpy as np

def length(completions): return [float(len(c)) for c in completions]
def both(prompts, completions, labels):
    return [len(p) + len(c) / 10 + (l == "yes") for p, c, l in zip(prompts, completions, labels)]
def everything(**given): return [float(len(given))] * len(given["completions"])
def array(completions): return np.array([len(c) for c in completions], dtype=np.float32)
def spoken(completions):
    print("SECRET", completions); sys.stderr.write("SECRET"); os.write(1, b"SECRET\\n")
    return [1.0] * len(completions)
def odd(completions):
    answers = {"hang": lambda: time.sleep(60), "crash": lambda: os._exit(3), "raise": lambda: 1 / 0, "nan": lambda: math.nan,
               "none": lambda: None, "text": lambda: "1", "exit": lambda: sys.exit(2),
               "grow": lambda: float(len(bytearray(3 << 30)))}
    return [answers[c]() if c in answers else float(len(c)) for c in completions]
def few(completions): return [1.0]
def copied(completions):
    os.fork()
    return [float(len(c)) for c in completions]

async def asynchronous(completions): return [1.0] * len(completions)
async def asynchronous_generator(completions): yield 1.0
def generator(completions):
    for c in completions: yield float(len(c))
def mapped(completions): return map(len, completions)
def by_key(completions): return {c: 1.0 for c in completions}
def matrix(completions): return np.ones((len(completions), 2))
def one(completions): return 1.0
class Judge:
    async def __call__(self, completions): return [1.0] * len(completions)
judge = Judge()
partly = functools.partial(asynchronous)
def hidden(completions): return asynchronous(completions)
def run_it(function): return lambda completions: asyncio.run(function(completions))
@run_it
async def awaited(completions): return [1.0] * len(completions)
async def soon(completion): return 1.0
def items(completions):
    answers = {"async": soon, "generator": lambda c: (x for x in c), "set": lambda c: {1.0}, "bool": lambda c: True,
               "huge": lambda c: 10**400, "huger": lambda c: -10**5000, "largest": lambda c: 10**308,
               "array": lambda c: np.ones(2), "half": lambda c: np.half(2.0)}
    return [answers[c](c) if c in answers else float(len(c)) for c in completions]
"""


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "rules.py"
    path.write_text(RULES)
    return path


@pytest.fixture
def pool(rules: Path) -> Iterator[Callable[..., FunctionPool]]:
    made: list[FunctionPool] = []

    def make(name: str, **options: object) -> FunctionPool:
        entry = ScorerConfig(kind="function", function=f"{rules}:{name}", **{"timeout_s": 1.0, **options})  # type: ignore[arg-type]
        made.append(FunctionPool(entry))
        return made[-1]

    yield make
    for each in made:
        each.close()


def run(pool: FunctionPool, *texts: str | Text) -> list[Score]:
    given = [t if isinstance(t, tuple) else Text("", t) for t in texts]
    return [score for future in pool.submit(given) for score in future.result(30)]


def children() -> list[psutil.Process]:
    """Of pools in this process; those of a reward service that other tests share are further down."""
    ours = psutil.Process().children()
    return [p for p in ours if "reward_service.function_worker" in p.cmdline()]


def test_functions_get_what_they_name(pool: Callable[..., FunctionPool]) -> None:
    assert [s.value for s in run(pool("length"), "abc", "a")] == [3.0, 1.0]
    assert [s.value for s in run(pool("both", batch_size=2), Text("ab", "xyz", "yes"), Text("", "x"))] == [3.3, 0.1]
    # prompts, completions, labels, completion_ids, log_extra, log_metric
    assert [s.value for s in run(pool("everything"), "abc")] == [6.0]
    assert [s.value for s in run(pool("array", batch_size=4), "abc", "a")] == [3.0, 1.0]


def test_a_copy_that_a_function_makes_of_its_process_answers_nothing(pool: Callable[..., FunctionPool]) -> None:
    assert [s.value for s in run(pool("copied", batch_size=1), "a", "bb", "ccc", "dddd")] == [1.0, 2.0, 3.0, 4.0]


def test_what_a_function_prints_goes_nowhere(pool: Callable[..., FunctionPool], capfd: pytest.CaptureFixture) -> None:
    assert [s.value for s in run(pool("spoken"), "abc", "d")] == [1.0, 1.0]
    assert "SECRET" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("batch_size", [1, 8])
def test_each_failure_costs_its_own_item(pool: Callable[..., FunctionPool], batch_size: int) -> None:
    odd = pool("odd", batch_size=batch_size, memory_gib=1.0)
    scores = run(odd, "ab", "crash", "raise", "exit", "nan", "none", "text", "grow", "abc")
    assert [s.value for s in scores] == [2.0, None, None, None, None, None, None, None, 3.0]
    assert [s.error for s in scores[1:-1]] == [
        "poison: its process ended",
        "poison: ZeroDivisionError",
        "poison: SystemExit",
        "non_finite",
        "not_applicable: None in place of a score",
        "wrong_type: str instead of a number",
        "poison: MemoryError",
    ]


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("generator", "generator instead of a list: nobody runs through it, return list(...) of it"),
        ("mapped", "map instead of a list: nobody runs through it, return list(...) of it"),
        ("by_key", "dict instead of a list"),
        ("one", "float instead of a list"),
        ("matrix", "list instead of a number"),
    ],
)
def test_what_is_no_list_of_numbers_is_called_by_its_name(
    function: str, error: str, pool: Callable[..., FunctionPool]
) -> None:
    scores = run(pool(function, batch_size=2), "a", "bc")
    assert [(s.value, s.error) for s in scores] == [(None, f"wrong_type: {error}")] * 2


def test_an_async_generator_does_not_start(pool: Callable[..., FunctionPool]) -> None:
    with pytest.raises(FunctionError, match="asynchronous_generator: TypeError: it must return a list: nobody runs"):
        pool("asynchronous_generator")
    assert not children()


@pytest.mark.parametrize("function", ["asynchronous", "judge", "partly", "hidden", "awaited"])
def test_what_must_be_awaited_is(function: str, pool: Callable[..., FunctionPool]) -> None:
    assert [s.value for s in run(pool(function, batch_size=2), "a", "b")] == [1.0, 1.0]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_each_answer_that_is_no_number_costs_its_own_item(pool: Callable[..., FunctionPool], batch_size: int) -> None:
    items = pool("items", batch_size=batch_size)
    pid = {p.pid for p in children()}
    texts = ["ab", "async", "generator", "huge", "huger", "bool", "array", "set", "largest", "half", "abc"]
    scores = run(items, *texts)
    assert [s.value for s in scores] == [2.0, *[None] * 4, 1.0, *[None] * 2, 1e308, 2.0, 3.0]
    assert [s.error for s in scores if s.error] == [
        "wrong_type: coroutine instead of a number: nobody awaits it, await it in the function",
        "wrong_type: generator instead of a number: nobody runs through it, return list(...) of it",
        "non_finite: an integer beyond the range of float",
        "non_finite: an integer beyond the range of float",
        "wrong_type: list instead of a number",
        "wrong_type: set instead of a number",
    ]
    assert {p.pid for p in children()} == pid  # no process had to be ended


def test_a_function_that_hangs_is_ended_and_tried_twice(pool: Callable[..., FunctionPool]) -> None:
    odd = pool("odd", timeout_s=0.5)
    before = {p.pid for p in children()}
    start = time.monotonic()
    scores = run(odd, "hang", "ab")
    assert [s.error for s in scores] == ["timeout: the function took longer than 0.5 s", None]
    assert before.isdisjoint(p.pid for p in children())  # the process that hung is gone
    assert run(odd, "hang")[0].code == "timeout"
    assert time.monotonic() - start > 1.0
    processes = {p.pid for p in children()}
    assert [s.error for s in run(odd, "hang")] == ["poison: 2 processes of the function had to be ended"]
    assert {p.pid for p in children()} == processes  # nothing was started or ended for it
    assert [s.code for s in run(odd, "hang", "ab")] == ["poison", None]


def test_one_that_hangs_holds_up_nobody_else(pool: Callable[..., FunctionPool]) -> None:
    odd = pool("odd", processes=2, timeout_s=3.0)
    hanging = odd.submit([Text("", "hang")])
    start = time.monotonic()
    assert [s.value for s in run(odd, "ab", "abc")] == [2.0, 3.0]
    assert time.monotonic() - start < 1.5
    assert hanging[0].result(10)[0].code == "timeout"


def test_the_wrong_number_of_scores_is_none(pool: Callable[..., FunctionPool]) -> None:
    few = run(pool("few", batch_size=3), "a", "b", "c")
    assert [s.value for s in few] == [1.0, 1.0, 1.0]  # alone, each gets its one


def test_a_process_that_was_killed_is_started_again(pool: Callable[..., FunctionPool]) -> None:
    length = pool("length", batch_size=1)
    [process] = children()
    process.send_signal(signal.SIGKILL)
    process.wait(5)
    scores = run(length, "ab", "abc")
    assert scores[0].value is None
    assert scores[1].value == 3.0
    assert run(length, "ab")[0].value == 2.0


@pytest.mark.parametrize(
    ("function", "reason"),
    [("no_such", "AttributeError"), ("odd", None)],
)
def test_a_function_that_cannot_be_imported_says_why(rules: Path, function: str, reason: str | None) -> None:
    entry = ScorerConfig(kind="function", function=f"{rules}:{function}")
    if reason:
        with pytest.raises(FunctionError, match=reason):
            FunctionPool(entry)
    else:
        FunctionPool(entry).close()
    assert children() == []


def test_processes_end_with_a_replica_that_was_killed(rules: Path) -> None:
    """The pool in a process of its own, killed while the function hangs."""
    code = f"""
import psutil, time
from contracts.config import ScorerConfig
from reward_service.kinds.function import FunctionPool, Text
pool = FunctionPool(ScorerConfig(kind="function", function={f"{rules}:odd"!r}, timeout_s=60))
pool.submit([Text("", "hang")])
time.sleep(0.2)
print(psutil.Process().children()[0].pid, flush=True)
time.sleep(60)
"""
    replica = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert replica.stdout is not None
    worker = psutil.Process(int(replica.stdout.readline()))
    replica.send_signal(signal.SIGKILL)
    replica.wait(5)
    replica.stdout.close()
    gone, _ = psutil.wait_procs([worker], timeout=5)
    assert gone == [worker]


# ---- token ids


def test_a_token_id_that_is_no_token_costs_its_own_item(rules: Path) -> None:
    """-1 and 2**32 are beyond what the decoder takes; 49152 and 2**31 are ids of nothing, which it would leave out."""
    scorer = FunctionScorer(ScorerConfig(kind="function", function=f"{rules}:length"), str(SMOLLM))
    try:
        good = [ScoringItem((28, 2)), ScoringItem((28, 28, 2)), ScoringItem((), 0)]
        bad = [ScoringItem((28, number, 2)) for number in (-1, 49152, 2**31, 2**32, 10**400)]
        scores = asyncio.run(scorer.score([good[0], *bad, good[1]], 10.0))
    finally:
        scorer._pool.close()
    alone = [len(load_decoder(str(SMOLLM))(item.token_ids[:-1])) for item in good[:2]]
    assert [scores[0].value, scores[-1].value] == alone
    assert [(s.value, s.error) for s in scores[1:-1]] == [(None, "out_of_vocabulary")] * 5
    assert not {"out_of_vocabulary"} & RETRYABLE


def test_a_text_reader_of_a_kind_of_ones_own_costs_one_item() -> None:
    texts = text_reader(str(SMOLLM))
    scorer = ThreadScorer(lambda items: [float(len(text.completion)) for text in texts(items)])
    scores = asyncio.run(scorer.score([ScoringItem((28, 2)), ScoringItem((-1, 2)), ScoringItem((28, 2**40, 2))], 10.0))
    assert [s.error for s in scores] == [None, "out_of_vocabulary", "out_of_vocabulary"]


def test_a_text_alone_begins_behind_its_bos(tmp_path: Path) -> None:
    """Which nobody wrote; behind a prompt it would be part of what was sampled."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    template = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(tmp_path)
    ids, end = tokenizer("42", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    alone, behind = ScoringItem((bos, *ids, end)), ScoringItem((bos, *ids, end), 1)
    sampled = ScoringItem((*ids, bos, *ids, end), len(ids))
    assert [text.completion for text in text_reader(str(tmp_path))([alone, behind, sampled])] == [
        "42",
        "42",
        "<|im_start|>42",
    ]
    # Of a tokenizer that writes none, it is somebody's.
    assert text_reader(str(SMOLLM))([alone])[0].completion == "<|im_start|>42"


def test_a_process_that_does_not_start_again_says_nothing_against_an_item(
    pool: Callable[..., FunctionPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    length, starts = pool("length"), list[int]()
    length._idle.queue[0].end()

    def start(process: FunctionProcess) -> None:
        starts.append(1)
        raise FunctionError("no memory")

    monkeypatch.setattr(FunctionProcess, "start", start)
    scores = [score for future in length.submit([Text("", "a"), Text("", "b")]) for score in future.result(10)]
    assert {score.error for score in scores} == {"unavailable: its process does not start"}
    assert len(starts) == 1


def test_what_nobody_waits_for_any_more_is_not_called(pool: Callable[..., FunctionPool]) -> None:
    length = pool("length")
    late = [score for future in length.submit([Text("", "a")], -1.0) for score in future.result(10)]
    assert [s.error for s in late] == ["timeout: no score before the deadline"]


def test_one_that_hangs_in_a_batch_costs_one_time_out_more_not_one_a_half() -> None:
    calls: list[list[str]] = []

    def score(texts: list[str]) -> list[float]:
        calls.append(texts)
        if "hang" in texts:
            raise Failed("timeout: late", is_kill=True)
        return [float(len(text)) for text in texts]

    scores = isolate(score, [*["ab"] * 9, "hang", *["abc"] * 6])
    assert [s.code or s.value for s in scores] == [*[2.0] * 9, "timeout", *[3.0] * 6]
    assert sum("hang" in texts for texts in calls) == 2
