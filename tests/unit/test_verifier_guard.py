"""Verifiers that sleep, spin, grow, recurse, fork, exit, print and read, in real processes: each answers within its bound,
costs itself alone, and leaves nothing behind."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.text.encoding import item_of_text
from contracts.checks.validation import ConfigError, validate_service
from contracts.config import HttpConfig, RewardServiceConfig, ScorerConfig, TandemConfig
from contracts.plugins import names
from contracts.records import Prompt, Score, ScoringItem
from controller.data.inputs import Inputs
from controller.start_checks.row_checks import check_rows
from reward_service.kinds.function import FunctionError
from reward_service.kinds.verifier import VerifierPool, VerifierScorer
from reward_service.resolve import resolve
from reward_service.verifier import VERIFIERS, BadRow, Verifier, find_verifier
from reward_service.verifiers.math import expression
from tests.conftest import ROOT, SMOLLM, make_config

SLEEP = "98765.4321"  # seconds: by these the processes are found that were left behind
TIMEOUT_S = 1.0
STAND_INS = f"""
import os, signal, subprocess, sys, time
from reward_service.verifier import BadRow, Option, Verifier, column

def spawn(**options): return subprocess.Popen(["sleep", "{SLEEP}"], **options)
def spin():
    while True: pass
def recurse(): return recurse()
def fork():
    os.fork()
    return 1.0
def fork_and_sleep():
    if os.fork() == 0:
        os.setsid()
        time.sleep(60)
    return 1.0
def forks():
    for _ in range(5):
        if os.fork() == 0: spawn(); time.sleep(60)
    time.sleep(60)
def talk():
    print('{{"value": 0.25}}', flush=True); sys.stderr.write("x" * 100000); os.write(1, b'{{"value": 0.25}}\\n'); return 1.0
def read(): return 1.0 if sys.stdin.read() == "" and os.read(0, 10) == b"" else 0.0
def alarm(): signal.setitimer(signal.ITIMER_REAL, 0.2); return 1.0
def close(): os.closerange(3, 100); return 1.0
WAYS = {{
    "sleep": lambda: time.sleep(60), "spin": spin, "allocate": lambda: float(len(bytearray(3 << 30))), "recurse": recurse,
    "raise": lambda: 1 / 0, "exit": lambda: sys.exit(0), "quit": lambda: os._exit(0), "abort": os.abort, "close": close,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP), "fork": fork, "fork_and_sleep": fork_and_sleep, "talk": talk,
    "spawn": lambda: 1.0 if spawn() else 0.0, "spawn_away": lambda: 1.0 if spawn(start_new_session=True) else 0.0,
    "spawn_and_sleep": lambda: spawn(start_new_session=True) and time.sleep(60), "forks": forks, "read": read,
    "spawn_and_quit": lambda: spawn(start_new_session=True) and os._exit(0), "alarm": alarm,
    "nan": lambda: float("nan"), "none": lambda: None, "text": lambda: "1", "huge": lambda: 10**400, "bool": lambda: True,
    "parts": lambda: {{"score": 0.5, "format": 1}}, "no_score": lambda: {{"format": 1.0}},
    "nan_part": lambda: {{"score": 0.5, "format": float("nan")}},
}}

def read_row(row, options):
    answer = column(row, options["answer"])
    if answer == "bad": raise BadRow("answer must be good; write good")
    return answer

def verify(completion, right, options):
    return WAYS[completion]() if completion in WAYS else float(completion == right + options["more"])

MINE = Verifier(read=read_row, verify=verify, options={{"more": Option("", "a text", lambda v: isinstance(v, str))}})
NEEDS = Verifier(read=read_row, verify=verify, requires={{"no_such_module": "no-such-package"}})
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    monkeypatch.syspath_prepend(str(tmp_path))


def entry(name: str = "MINE", **keys: Any) -> ScorerConfig:
    keys = {"timeout_s": TIMEOUT_S, "memory_gib": 1.0, **keys}
    return ScorerConfig(kind="verifier", verifier=f"stand_ins:{name}", **keys)


@pytest.fixture
def pool(stand_ins: None) -> Iterator[Callable[..., VerifierPool]]:
    made: list[VerifierPool] = []
    before = workers()  # of a service that other tests have started

    def make(**keys: Any) -> VerifierPool:
        made.append(VerifierPool(entry(**keys)))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert left_behind() == []
    assert workers() - before == set()


def workers() -> set[psutil.Process]:
    below = psutil.Process().children(recursive=True)
    return {process for process in below if "reward_service.verifier_worker" in process.cmdline()}


def left_behind() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", SLEEP]]


def run(pool: VerifierPool, *completions: str, answer: Any = "right") -> list[Score]:
    items = [(completion, json.dumps({"answer": answer}), None) for completion in completions]
    return [score for future in pool.submit_items(items) for score in future.result(120)]


ENDED, LATE = "poison: its process ended", "timeout: the verifier took longer than 1 s"
OUTCOMES: dict[str, float | str] = {
    "sleep": LATE,
    "spin": LATE,
    "stop": LATE,
    "forks": LATE,
    "spawn_and_sleep": LATE,
    "allocate": "poison: MemoryError",
    "recurse": "poison: RecursionError",
    "raise": "poison: ZeroDivisionError",
    "exit": "poison: SystemExit",
    "quit": ENDED,
    "abort": ENDED,
    "close": ENDED,
    "spawn_and_quit": ENDED,
    "fork": 1.0,
    "fork_and_sleep": 1.0,
    "spawn": 1.0,
    "spawn_away": 1.0,
    "talk": 1.0,
    "read": 1.0,
    "alarm": 1.0,
    "nan": "non_finite",
    "huge": "non_finite: an integer beyond the range of float",
    "nan_part": "non_finite",
    "none": "not_applicable: None in place of a score",
    "text": "wrong_type: str instead of a number",
    "bool": 1.0,
    "no_score": "wrong_type: dict without a score",
    "parts": 0.5,
}


def test_each_costs_itself_alone_and_leaves_nothing_behind(pool: Callable[..., VerifierPool]) -> None:
    guarded = pool(batch_size=100)
    texts = [text for way in OUTCOMES for text in (way, "right", "wrong")]
    start = time.monotonic()
    scores = run(guarded, *texts)
    # Each that is ended costs its bound and a new process, which takes a second or two on a machine that is busy.
    assert time.monotonic() - start < len(OUTCOMES) * (TIMEOUT_S + 5)
    found = {text: score.error or score.value for text, score in zip(texts, scores, strict=True) if text in OUTCOMES}
    assert found == OUTCOMES
    neighbours = [score.value for text, score in zip(texts, scores, strict=True) if text not in OUTCOMES]
    assert neighbours == [1.0, 0.0] * len(OUTCOMES)
    assert left_behind() == []  # while the pool goes on
    (parts,) = run(guarded, "parts")
    assert (parts.value, parts.parts) == (0.5, {"format": 1.0})


def test_what_ends_two_processes_is_not_tried_again(pool: Callable[..., VerifierPool]) -> None:
    guarded = pool()
    errors = [run(guarded, "right", "quit", "right")[1].error for _ in range(3)]
    assert errors == [ENDED, ENDED, "poison: 2 processes of the verifier had to be ended"]
    assert run(guarded, "quit", answer="another")[0].error == ENDED  # of another row it is another item


def test_nothing_is_waited_for_beyond_the_deadline(pool: Callable[..., VerifierPool]) -> None:
    guarded = pool(timeout_s=30.0)
    start = time.monotonic()
    items = [(text, json.dumps({"answer": "right"}), None) for text in ("right", "sleep", "right")]
    scores = guarded.submit_items(items, deadline_s=1.0)[0].result(30)
    assert time.monotonic() - start < 10
    late = "timeout: no score before the deadline"
    assert [score.error or score.value for score in scores] == [1.0, late, late]
    assert run(guarded, "right")[0].value == 1.0


def test_processes_work_side_by_side(pool: Callable[..., VerifierPool]) -> None:
    guarded = pool(processes=2, batch_size=1, timeout_s=3.0)
    start = time.monotonic()
    run(guarded, "sleep", "spin")
    assert time.monotonic() - start < 5.9


def test_the_row_has_the_answer(pool: Callable[..., VerifierPool]) -> None:
    guarded = pool(options={"more": "!"}, answer="reward_model.ground_truth")
    nested = json.dumps({"reward_model": {"ground_truth": "x"}})
    plain = json.dumps({"reward_model.ground_truth": "y"})
    missing = (
        "bad_row: reward_model.ground_truth must be there and not null; write the column, or the name of another one"
    )
    items = [("x!", nested, None), ("y!", plain, None), ("x", nested, None), ("x!", "{}", None), ("x!", None, None),
             ("z!", None, "z"), ("z!", "[1]", None), ("z!", "no json", None), ("x!", nested, "label")]  # fmt: skip
    scores = guarded.submit_items(items)[0].result(30)
    no_object = "bad_row: row must be JSON of an object"
    assert [s.error or s.value for s in scores] == [1.0, 1.0, 0.0, missing, missing, 1.0, no_object, no_object, 1.0]


def test_a_row_that_does_not_fit_is_a_final_error(pool: Callable[..., VerifierPool]) -> None:
    (score,) = run(pool(), "right", answer="bad")
    assert (score.value, score.error, score.code) == (None, "bad_row: answer must be good; write good", "bad_row")


def test_the_scorer_reads_completions_rows_and_labels(stand_ins: None) -> None:
    from transformers import AutoTokenizer

    item = item_of_text(AutoTokenizer.from_pretrained(SMOLLM), "right")
    items = [
        ScoringItem(item.token_ids, 0, None, json.dumps({"answer": "right"})),
        ScoringItem((*item.token_ids[:1], 10**6, *item.token_ids[1:]), 0, "right"),
        ScoringItem(item.token_ids, 0, "right"),
        ScoringItem(item.token_ids, 0, "wrong"),
    ]
    scorer = VerifierScorer(entry(), str(SMOLLM))
    try:
        scores = asyncio.run(scorer.score(items, 30.0))
    finally:
        scorer._pool.close()
    assert [score.error or score.value for score in scores] == [1.0, "out_of_vocabulary", 1.0, 0.0]


def test_a_missing_package_is_named_at_the_start(stand_ins: None) -> None:
    needs = entry("NEEDS")
    (problem,) = resolve_kind().problems("reward_service.scorers.proxy", needs)
    assert problem == (
        "reward_service.scorers.proxy.verifier must be a verifier whose packages are installed, without no-such-package; "
        "found stand_ins:NEEDS; write pip install 'tandem-rlhf[verifiers]'"
    )
    with pytest.raises(FunctionError, match="needs no-such-package"):
        VerifierPool(needs)


def resolve_kind() -> Any:
    from reward_service.scorer_kind import scorer_kind

    return scorer_kind("verifier")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"verifier": "maths"}, "verifier must be one of choice, code, exact, json_schema, math, reasoning_gym, regex"),
        ({"verifier": None}, "verifier must be one of choice, code"),
        ({"verifier": "nothing:MINE"}, "No module named 'nothing'"),
        ({"verifier": "math", "options": {"box": True}}, r"options\.box must be an option of this verifier \(boxed\)"),
        ({"verifier": "math", "options": {"boxed": 1}}, r"options\.boxed must be true or false; found 1; write false"),
        ({"verifier": "math", "timeout_s": 4.0}, "timeout_s must be above 4, the seconds that the verifier takes"),
        ({"verifier": "code", "options": {"seconds": 10}}, r"timeout_s must be above 11\.5"),
        ({"verifier": "code", "options": {"memory_mib": 1.5}}, r"options\.memory_mib must be a whole number"),
        ({"verifier": "regex"}, r"options\.pattern must be set"),
        ({"verifier": "regex", "options": {"pattern": "("}}, r"options\.pattern must be a pattern of Python's re; found \("),
        ({"verifier": "choice", "options": {"letters": "AAB"}}, r"options\.letters must be different letters"),
        ({"verifier": "exact", "options": {"normalise": ["lower"]}}, r"options\.normalise must be a list of strip, case"),
        ({"verifier": "exact", "options": {"take": "first"}}, r"options\.take must be one of text, last_line, tag"),
        ({"verifier": "json_schema", "options": {"schema": {"type": "strin"}}}, r"options\.schema must be null or a JSON"),
        ({"verifier": "math", "processes": 0}, "processes must be at least 1"),
    ],
)  # fmt: skip
def test_what_is_configured_wrong_is_refused(keys: dict[str, Any], said: str) -> None:
    scorers = {"mine": ScorerConfig(kind="verifier", **keys)}
    with pytest.raises(ConfigError, match=said):
        validate_service(TandemConfig(reward_service=RewardServiceConfig(scorers=scorers, http=HttpConfig(port=8000))))


def test_a_version_covers_source_answer_and_options(stand_ins: None, tmp_path: Path) -> None:
    def version(**keys: Any) -> str:
        return resolve({"proxy": entry(**keys)}, RewardServiceConfig())["proxy"].version

    seen = [version(), version(answer="label"), version(options={"more": "!"})]
    assert version() == seen[0]
    (tmp_path / "stand_ins.py").write_text(STAND_INS + "changed = 1\n")
    seen.append(version())
    assert len(set(seen)) == 4
    ours = {name: ScorerConfig(kind="verifier", verifier=name) for name in names(VERIFIERS)}
    assert len({spec.version for spec in resolve(ours, RewardServiceConfig()).values()}) == 7


def test_rows_are_checked_with_their_place_before_a_start(tmp_path: Path) -> None:
    """What is said, worked out by hand."""
    config = make_config(SMOLLM, tmp_path)
    choice = ScorerConfig(kind="verifier", verifier="choice", answer="letter", options={"letters": "ABCD"})
    config.reward_service.scorers = {"proxy": choice}
    config.data.prompts.path = "p.jsonl"
    columns = [{"letter": "A"}, {"letter": "E" * 100}, {}, {"letter": None}, *[{"letter": "x y"}] * 4]
    prompts = [Prompt(n, "", (n,), json.dumps(row)) for n, row in enumerate(columns, start=1)]
    rule = "letter must be one letter of options.letters (ABCD); write the letter of the choice"
    missing = "letter must be there and not null; write the column, or the name of another one"
    where = "reward_service.scorers.proxy: data.prompts (p.jsonl),"
    with pytest.raises(ConfigError) as said:
        check_rows(config, Inputs({"prompts": prompts}))
    assert str(said.value).splitlines() == [
        f"{where} row 2: {rule}; found letter = '{'E' * 59}...",
        f"{where} row 3: {missing}; found letter = None",
        f"{where} row 4: {missing}; found letter = None",
        f"{where} row 5: {rule}; found letter = 'x y'",
        f"{where} row 6: {rule}; found letter = 'x y'",
        f"{where} and 2 more of 8 rows",
    ]
    check_rows(config, Inputs({"prompts": prompts[:1]}))


WORDS = "must be a number or an expression that math-verify reads"
BAD_ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("math", {"answer": "the cat"}, WORDS),
    ("math", {"answer": "12:30"}, WORDS),
    ("math", {"answer": "\\frac{"}, WORDS),
    ("math", {"answer": "0.\\overline{3}"}, WORDS),
    ("math", {"answer": [5]}, "answer must be a text or a number"),
    ("math", {"answer": True}, "answer must be a text or a number"),
    ("math", {"answer": float("inf")}, "answer must be a text or a number"),
    ("math", {"answer": " "}, "answer must be more than white space"),
    ("math", {"question": "5"}, "answer must be there"),
    ("choice", {"answer": "AB"}, "one letter of options.letters"),
    ("choice", {"answer": 1}, "one letter of options.letters"),
    ("exact", {"answer": []}, "an answer or a list of them"),
    ("exact", {"answer": {"a": 1}}, "answer must be a text or a number"),
    ("json_schema", {}, "schema must be there"),
    ("json_schema", {"schema": "{"}, "found a text that is no JSON"),
    ("json_schema", {"schema": {"type": "strin"}}, "schema must be a JSON schema"),
    ("json_schema", {"schema": {"$ref": "http://127.0.0.1:9/x"}}, "nothing is fetched"),
    ("json_schema", {"schema": {"$ref": "#/$defs/none"}}, "whose every $ref leads somewhere"),
    ("code", {}, "tests must be there"),
    ("code", {"tests": "assert f(1) =="}, "found what is no Python"),
    ("code", {"tests": "x = 1"}, "found no test"),
    ("code", {"tests": "add(1, 2) == 3"}, "found no test"),
    ("code", {"tests": "add(1, 2), 3"}, "found no test"),
    ("code", {"tests": "'''only words'''"}, "found no test"),
    ("code", {"tests": "assert f(1)\ndef test_g(fixture): assert g(fixture)"}, "found test_g, which a framework would have"),
    ("code", {"tests": "assert f(1)\nasync def test_g(): assert await g()"}, "found test_g, which a framework would have"),
    ("code", {"tests": "assert f(1)\nclass TestG:\n    def test_g(self): assert g()"}, "found TestG, which a framework"),
    ("code", {"tests": []}, "tests must be Python with asserts"),
    ("code", {"tests": [{"input": "1"}]}, "tests must be Python with asserts"),
    ("code", {"tests": {"inputs": ["1"], "outputs": []}}, "as many outputs as inputs"),
    *[
        ("code", {"tests": tests}, "found tests that call a function by its name, which are not run; write asserts")
        for tests in (
            [{"input": "[1,2]\n3", "output": "4", "testtype": "functional"}],
            json.dumps([{"input": "1", "output": "4", "testtype": "stdin", "metadata": {"func_name": "f"}}]),
            {"inputs": ["[1,2]\n3"], "outputs": ["4"], "fn_name": "f"},
            {"inputs": [[1, 2]], "outputs": [3], "fn_name": "f"},
            [{"type": "function_call", "fn_name": "f", "input": [1], "output": [2]}],
        )
    ],
    ("code", {"tests": {"inputs": ["1"], "outputs": ["4"], "fn_name": None}}, ""),
    ("code", {"tests": [{"input": "1", "output": "4", "testtype": "stdin", "metadata": {"func_name": None}}]}, ""),
    ("reasoning_gym", {"answer": "5"}, "metadata must be an object"),
    ("reasoning_gym", {"answer": "5", "metadata": {"source_dataset": "sums"}}, "name of a data set of reasoning_gym"),
    ("reasoning_gym", {"answer": "5", "metadata": {"source_dataset": "basic_arithmetic"}, "x": 1}, ""),
    ("reasoning_gym", {"answer": 5, "metadata": {"source_dataset": "basic_arithmetic"}}, "null or a text"),
]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["2^2^2", "2^{2^2}", "2^{{2^{2}}}", "2^(2^2)", "x^{(2^2)}", "(2^{3})^{100}", "2^{3!}", "3!!", "2^{12345}"]
)
def test_powers_of_powers_are_not_computed(text: str) -> None:
    assert expression(text) is None


@pytest.mark.parametrize("text", ["x^2y^3", "(x^2)^3", "x^{2}(y^{3})", "x^{10}-x^{5}", "\\frac{x^2}{y^2}", "3!"])
def test_powers_side_by_side_are(text: str) -> None:
    assert expression(text) is not None


@pytest.mark.parametrize(("name", "row", "said"), BAD_ROWS)
def test_rows_that_do_not_fit_are_named(name: str, row: dict[str, Any], said: str) -> None:
    verifier: Verifier = find_verifier(name)
    options = verifier.chosen(None, {})
    if not said:
        assert verifier.row_problem(row, options) is None
        return
    problem = verifier.row_problem(row, options)
    assert problem is not None
    assert said in problem
    with pytest.raises(BadRow):
        verifier.right(row, options)


def test_the_documented_verifier_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/verifiers.md").read_text(), re.DOTALL)
    (tmp_path / "my_verifiers").mkdir()
    (tmp_path / "my_verifiers/longest.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    documented = VerifierPool(ScorerConfig(kind="verifier", verifier="my_verifiers.longest:MINE"))
    try:
        row, none = json.dumps({"words": ["a", "abc", "ab"]}), json.dumps({"words": []})
        items = [("it is abc", row, None), ("abc it is", row, None), ("a b c d e abc", row, None), ("abc", none, None)]
        scores = [score for future in documented.submit_items(items) for score in future.result(30)]
    finally:
        documented.close()
    assert [(s.value, s.parts) for s in scores[:3]] == [
        (1.0, {"short": 1.0}),
        (0.0, {"short": 1.0}),
        (1.0, {"short": 0.0}),
    ]
    assert scores[3].error == "bad_row: words must be a list of words; write one or more"


def test_every_verifier_is_documented() -> None:
    page = (ROOT / "docs/verifiers.md").read_text()
    for name in names(VERIFIERS):
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        verifier = find_verifier(name)
        assert f"`{verifier.answer}`" in line
        assert all(f"`{option}`" in line for option in verifier.options)
