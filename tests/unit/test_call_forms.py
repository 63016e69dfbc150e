"""Reward functions as users of Tandem, TRL, verl and OpenRLHF write them, in real processes: what each is given, and what
becomes of what it answers."""

import asyncio
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.files.source_code import source_signature
from contracts.checks.check import leaves
from contracts.checks.overrides import unknown_overrides
from contracts.config import RewardServiceConfig, ScorerConfig, TandemConfig
from contracts.records import Score, ScoringItem, row_text
from reward_service.call_forms import ByName, OneByOne, Queries, UnknownForm, call_form
from reward_service.function_answers import Refused, plain_scores
from reward_service.kinds.function import FunctionError, FunctionPool, FunctionScorer, Text, form_in_source
from reward_service.scorer_kind import scorer_kind, text_reader
from tests.unit.test_joins import BOS, EOS, sentencepiece

RULES = '''
import asyncio, re

# ---- ours

def by_rows(texts, rows):
    return [float(row["answer"] == text) + row["tests"][0]["weight"] for text, row in zip(texts, rows)]

def by_labels(completions, labels):
    return [float(text == label) for text, label in zip(completions, labels)]

def by_label(completions, label, **kwargs):
    return [float(text == str(own)) for text, own in zip(completions, label)]

def in_columns(texts, rows):
    right = [float(text == row["answer"]) for text, row in zip(texts, rows)]
    return {"score": right, "length": [len(text) for text in texts], "said": texts}


# ---- TRL 1.16's documentation

def reward_func(completions, **kwargs):
    """Standard format: texts."""
    return [float(len(completion)) for completion in completions]

def reward_func_ids(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def format_reward_func(completions, **kwargs):
    """Conversational format: lists of messages."""
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    completion_contents = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, content) for content in completion_contents]
    return [1.0 if match else 0.0 for match in matches]

def boxed(completions, ground_truth, **kwargs):
    matches = [re.search(r"\\\\boxed\\{(.*?)\\}", completion) for completion in completions]
    contents = [match.group(1) if match else "" for match in matches]
    return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]

def math_reward_func(prompts, completions, task, **kwargs):
    """Multi-task: None where it does not apply."""
    return [float(c == "4") if t == "math" else None for c, t in zip(completions, task)]

async def judged_elsewhere(prompts, completions, **kwargs):
    async def one(text):
        await asyncio.sleep(3600 if text == "hang" else 0)
        return float(len(text))
    return await asyncio.gather(*map(one, completions))

def with_logs(completions, answer, log_extra=None, log_metric=None, trainer_state=None, **kwargs):
    right = [float(c == a) for c, a in zip(completions, answer)]
    log_extra("golden_answer", list(answer))
    log_extra("close", [0.5 * r for r in right])
    log_metric("accuracy", sum(right) / len(right))
    return right if trainer_state is None else None

def typed(completions: list[str], **kwargs):
    return [float(len(c)) for c in completions]

def asked(prompts, completions, **kwargs):
    return [float(len(p) if isinstance(p, str) else len(p[-1]["content"]) + 100) for p in prompts]

def optional(completions, bonus=(7.0,)):
    return [float(b) for b, _ in zip(bonus, completions)]

def names(completions, **kwargs):
    return {"score": [float(len(kwargs))] * len(completions), **{name: 1 for name in kwargs}}


# ---- verl's documentation

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if data_source != "openai/gsm8k":
        raise NotImplementedError(f"Reward function is not implemented for {data_source=}")
    return solution_str.strip() == ground_truth

def dapo(data_source, solution_str, ground_truth, extra_info):
    right = solution_str == ground_truth
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str, "index": extra_info["index"]}

begun = 0

async def compute_score_async(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    global begun
    begun += 1
    while begun < 20:  # until all of them are under way
        await asyncio.sleep(0)
    return {"score": float(solution_str == ground_truth)}

'''
OPENRLHF = """
# ---- OpenRLHF's documentation
import torch

def rewards_of_queries(queries, prompts, labels):
    return torch.tensor([float(query == prompt + label) for query, prompt, label in zip(queries, prompts, labels)])

def one_at_a_time(queries, originals, answers):
    return {"rewards": torch.tensor(float(queries[0] == originals[0] + answers[0]))}

def rewards_with_logs(queries, prompts, labels, **kwargs):
    reward = torch.tensor([float(query.endswith(str(label))) for query, label in zip(queries, labels)])
    return {"rewards": reward, "scores": reward / 2, "extra_logs": {"custom": reward.mean().item(), "each": reward + 1}}
"""


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forms") / "rules.py"
    path.write_text(RULES)
    path.with_name("openrlhf.py").write_text(OPENRLHF)  # torch takes seconds to import
    return path


@pytest.fixture
def score(rules: Path) -> Iterator[Callable[..., list[Score]]]:
    made: list[FunctionPool] = []

    def scores(name: str, *texts: Text, file: str = "rules.py", **options: Any) -> list[Score]:
        made.append(FunctionPool(ScorerConfig(kind="function", function=f"{rules.with_name(file)}:{name}", **options)))
        return [found for future in made[-1].submit(list(texts)) for found in future.result(30)]

    yield scores
    for pool in made:
        pool.close()


def text(completion: str, prompt: str = "Q", label: str | None = None, **columns: Any) -> Text:
    return Text(prompt, completion, label, row_text(columns) if columns else None)


def asked(completion: str, label: str | None = None, row: str | None = None) -> Text:
    return Text("2+3=", completion, label, row, query=f"2+3={completion}")


def said(scores: list[Score]) -> list[float | str | None]:
    return [score.value if score.error is None else score.error for score in scores]


# ---- ours


def test_texts_and_rows(score: Callable[..., list[Score]]) -> None:
    tests = [{"weight": 0.25, "name": 'ü\u2028"\n'}]
    scores = score("by_rows", text("5", answer="5", tests=tests), text("6", answer="5", tests=tests))
    assert said(scores) == [1.25, 0.25]
    assert [s.parts for s in scores] == [None, None]


def test_labels_are_the_items_own_or_the_rows(score: Callable[..., list[Score]]) -> None:
    assert said(score("by_labels", text("5", label="5"), text("5", label="6"), text("6"))) == [1.0, 0.0, 0.0]
    rows = [Text("Q", "5", None, '{"label": "5"}'), Text("Q", "5", "6", '{"label": "5"}')]
    assert said(score("by_labels", *rows)) == [1.0, 0.0]
    rows = [Text("Q", "6", "6", '{"labels": "5"}'), Text("Q", "5", None, '{"labels": "5"}')]
    assert said(score("by_labels", *rows)) == [1.0, 1.0]


def test_of_rows_with_label_and_labels_a_parameter_has_the_column_of_its_name(
    score: Callable[..., list[Score]],
) -> None:
    rows = ['{"label": 3, "labels": "5"}', '{"label": null, "labels": "5"}', '{"label": "5", "labels": null}']
    assert said(score("by_labels", *[Text("Q", "5", None, row) for row in rows])) == [1.0, 1.0, 0.0]
    assert said(score("by_labels", Text("Q", "6", "6", rows[0]))) == [1.0]  # an item's own comes first
    assert said(score("by_label", Text("Q", "3", None, rows[0]))) == [1.0]
    # OpenRLHF's third place is the column `label`, whatever the parameter is called.
    asked_for = [asked("3", None, '{"label": "3", "labels": "5"}')]
    assert said(score("rewards_of_queries", *asked_for, file="openrlhf.py")) == [1.0]


def test_parts_by_columns(score: Callable[..., list[Score]]) -> None:
    """`said` is of texts: no part."""
    scores = score("in_columns", text("5", answer="5"), text("66", answer="5"), batch_size=2)
    assert [(s.value, s.raw, s.parts) for s in scores] == [(1.0, 1.0, {"length": 1.0}), (0.0, 0.0, {"length": 2.0})]


# ---- TRL


def test_trls_standard_format(score: Callable[..., list[Score]]) -> None:
    assert said(score("reward_func", text("abc"), text(""))) == [3.0, 0.0]
    ids = [Text("Q", "a b", completion_ids=(5, 6, 7)), Text("Q", "a", completion_ids=(5,))]
    assert said(score("reward_func_ids", *ids)) == [3.0, 1.0]
    rows = [text(r"It is \boxed{5}", ground_truth="5"), text("5", ground_truth="5")]
    assert said(score("boxed", *rows, batch_size=2)) == [1.0, 0.0]


def test_trls_conversational_format_is_that_of_data_with_messages(score: Callable[..., list[Score]]) -> None:
    good, turns = "<think>a</think><answer>b</answer>", json.dumps([{"role": "user", "content": "Hello"}])
    chat = [Text("<|im_start|>...", said, messages=turns) for said in (good, "b")]
    assert said(score("format_reward_func", *chat)) == [1.0, 0.0]
    assert said(score("asked", chat[0], text("x", prompt="abc"))) == [105.0, 3.0]
    # One that says that it takes texts, and ours, get texts.
    assert said(score("typed", *chat)) == [float(len(good)), 1.0]
    assert said(score("by_labels", chat[1]._replace(label="b"))) == [1.0]


def test_none_of_trl_is_no_score(score: Callable[..., list[Score]]) -> None:
    rows = [text("4", task="math"), text("x", task="code"), text("5", task="math")]
    scores = score("math_reward_func", *rows, batch_size=3)
    assert said(scores) == [1.0, "not_applicable: None in place of a score", 0.0]


def test_an_async_function_is_awaited(score: Callable[..., list[Score]]) -> None:
    items = [text("a" * n) for n in range(20)]
    assert said(score("judged_elsewhere", *items, batch_size=32)) == [float(n) for n in range(20)]


def test_a_time_out_ends_what_is_awaited(score: Callable[..., list[Score]]) -> None:
    scores = score("judged_elsewhere", text("hang"), text("a"), timeout_s=0.5)
    assert said(scores) == ["timeout: the function took longer than 0.5 s", 1.0]


def test_what_a_function_logs_in_numbers_is_a_part(score: Callable[..., list[Score]]) -> None:
    scores = score("with_logs", text("5", answer="5"), text("6", answer="5"), batch_size=2)
    assert [s.value for s in scores] == [1.0, 0.0]
    assert [s.parts for s in scores] == [{"close": 0.5, "accuracy": 0.5}, {"close": 0.0, "accuracy": 0.5}]


def test_a_column_that_a_function_names_and_no_row_has(score: Callable[..., list[Score]]) -> None:
    """It costs its own items; a parameter with a default keeps it."""
    scores = score("boxed", text(r"\boxed{5}", ground_truth="5"), text("5", answer="5"), text("5"), batch_size=3)
    missing = "missing_column: the function needs ground_truth"
    assert said(scores) == [1.0, missing, missing]
    assert said(score("optional", text("a"), text("b", bonus=3), batch_size=2)) == [7.0, 3.0]


def test_what_kwargs_hold(score: Callable[..., list[Score]]) -> None:
    row = '{"answer": "5", "completion": "left out, as by TRL", "prompt_id": 3}'
    [found] = score("names", Text("Q", "x", None, row))
    assert found.parts is not None
    ours = {"prompts", "completion_ids", "labels", "log_extra", "log_metric"}
    assert set(found.parts) == {"answer", "prompt_id", *ours}


# ---- verl


def test_verls_compute_score(score: Callable[..., list[Score]]) -> None:
    nested = {
        "data_source": "openai/gsm8k",
        "reward_model": {"style": "rule", "ground_truth": "5"},
        "extra_info": {"index": 3},
    }
    flat = {"data_source": "openai/gsm8k", "ground_truth": "6"}
    alien = nested | {"data_source": "elsewhere"}
    items = [text(" 5 ", **nested), text("5", **flat), text("5", **alien), text("5", data_source="openai/gsm8k")]
    assert said(score("compute_score", *items, batch_size=4)) == [
        1.0,
        0.0,
        "poison: NotImplementedError",
        "missing_column: the function needs ground_truth (or reward_model with one)",
    ]
    label = Text("Q", "5", "5", row_text({"data_source": "openai/gsm8k"}))  # as HTTP gives it
    assert said(score("compute_score", label)) == [1.0]
    scores = score("dapo", text("5", **nested), text("6", **nested), batch_size=2)
    assert [(s.value, s.parts) for s in scores] == [
        (1.0, {"acc": 1.0, "index": 3.0}),
        (-1.0, {"acc": 0.0, "index": 3.0}),
    ]


def test_verls_async_compute_score_runs_for_all_items_of_a_call_at_once(score: Callable[..., list[Score]]) -> None:
    items = [text("5", data_source="a", ground_truth=str(n)) for n in range(20)]
    assert said(score("compute_score_async", *items, batch_size=32)) == [float(n == 5) for n in range(20)]


# ---- OpenRLHF


def test_openrlhfs_reward_func(score: Callable[..., list[Score]]) -> None:
    items = [asked("5", "5"), asked("5", None, '{"label": "6"}')]
    assert said(score("rewards_of_queries", *items, file="openrlhf.py", batch_size=2)) == [1.0, 0.0]
    items = [asked("5", None, '{"label": 5}'), asked("6", None, '{"label": 5}')]
    scores = score("rewards_with_logs", *items, file="openrlhf.py", batch_size=2)
    assert [s.value for s in scores] == [1.0, 0.0]
    # Calls begin with one item, so the mean of a call is the item's own here.
    assert [s.parts and sorted(s.parts) for s in scores] == [["custom", "each", "scores"]] * 2
    assert [(s.parts["scores"], s.parts["each"]) for s in scores if s.parts] == [(0.5, 2.0), (0.0, 1.0)]


def test_openrlhf_gives_one_item_by_place(score: Callable[..., list[Score]]) -> None:
    items = [asked("5", "5"), asked("6", "5"), asked("7", "7")]
    assert said(score("one_at_a_time", *items, file="openrlhf.py", batch_size=3)) == [1.0, 0.0, 1.0]


def test_a_query_is_prompt_and_completion_as_they_stand_together(tmp_path: Path) -> None:
    """Decoders of sentencepiece leave out the space that a text begins with: of each alone, "Name" and "a prime."."""
    tokenizer = sentencepiece("legacy")
    tokenizer.save_pretrained(tmp_path)
    prompt, said = tokenizer("Name", add_special_tokens=False)["input_ids"], [*tokenizer("a prime.")["input_ids"][1:]]
    read = text_reader(str(tmp_path), with_query=True)
    [found] = read([ScoringItem((*prompt, *said, EOS), len(prompt))])
    assert (found.prompt, found.completion, found.query) == ("Name", "a prime.", "Name a prime.")
    [alone] = read([ScoringItem((BOS, *said, EOS))])
    assert (alone.prompt, alone.completion, alone.query) == ("", "a prime.", "a prime.")


@pytest.mark.parametrize(("form", "query"), [("queries, prompts, labels", "Name a prime."), ("completions", "")])
def test_queries_are_decoded_for_functions_of_queries_alone(form: str, query: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece("legacy")
    tokenizer.save_pretrained(tmp_path)
    given, rules = form.split(",")[0], tmp_path / "rules.py"
    rules.write_text(f"def f({form}):\n    return [float(len(text)) for text in {given}]\n")
    scorer = FunctionScorer(ScorerConfig(kind="function", function=f"{rules}:f"), str(tmp_path))
    prompt, said = tokenizer("Name", add_special_tokens=False)["input_ids"], [*tokenizer("a prime.")["input_ids"][1:]]
    item = ScoringItem((*prompt, *said, EOS), len(prompt), "5")
    assert [text.query for text in scorer._texts([item])] == [query]
    assert [score.value for score in asyncio.run(scorer.score([item], 30.0))] == [len(query or "a prime.")]
    scorer._pool.close()


# ---- which form


@pytest.mark.parametrize(
    ("source", "form", "wants"),
    [
        ("def f(texts, rows): ...", ByName, ["completions", "rows"]),
        ("def f(completions): ...", ByName, ["completions", "messages"]),
        ("def f(completions: list[str]): ...", ByName, ["completions"]),
        ("def f(completions, labels): ...", ByName, ["completions", "labels", "rows"]),
        ("def f(completions, answer): ...", ByName, ["completions", "rows", "messages"]),
        (
            "def f(*, completions, **kwargs): ...",
            ByName,
            ["prompts", "completions", "labels", "rows", "messages", "completion_ids"],
        ),
        (
            "def f(data_source, solution_str, ground_truth, extra_info=None): ...",
            OneByOne,
            ["completions", "labels", "rows"],
        ),
        ("async def f(solution_str, ground_truth, **kwargs): ...", OneByOne, ["completions", "labels", "rows"]),
        ("def f(queries, prompts, labels): ...", Queries, ["prompts", "queries", "labels", "rows"]),
        ("def f(queries, prompts): ...", Queries, ["prompts", "queries"]),
    ],
)
def test_the_form_is_known_by_the_signature(source: str, form: type, wants: list[str], tmp_path: Path) -> None:
    """In the function and in its source alike; `wants` is all that is sent to its process."""
    made: dict[str, Any] = {}
    exec(source, made)
    (tmp_path / "rules.py").write_text(source)
    of_source = form_in_source(f"{tmp_path}/rules.py:f")
    for found in (call_form(inspect.signature(made["f"])), of_source):
        assert type(found) is form
        assert found.wants == wants


@pytest.mark.parametrize(
    ("signature", "why"),
    [
        ("(sentence)", "it takes no completions"),
        ("()", "it takes no completions"),
        ("(prompts)", "it takes no completions"),
        ("(completions, /)", "there is nothing to give it for 'completions'"),
        ("(completions, trainer_state)", "there is nothing to give it for 'trainer_state'"),
        ("(solution_str, ground_truth, tokenizer)", "there is nothing to give it for 'tokenizer'"),
        ("(queries, prompts, labels, images)", "there is nothing to give it for 'images'"),
        ("(data_sources, solution_strs, ground_truths, extra_infos)", "it takes no completions"),
    ],
)
def test_a_signature_that_is_none_of_them_is_refused_at_the_start(signature: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.py"
    path.write_text(f"def f{signature}: return []\nwrapped = f\n")
    with pytest.raises(UnknownForm) as from_source:
        form_in_source(f"{path}:f")
    assert form_in_source(f"{path}:wrapped") is None
    with pytest.raises(FunctionError) as from_process:
        FunctionPool(ScorerConfig(kind="function", function=f"{path}:wrapped"))
    for message in map(str, (from_source.value, from_process.value)):
        assert why in message
        for form in ("f(texts, rows)", "TRL's f(completions,", "verl's compute_score(", "OpenRLHF's reward_func("):
            assert form in message


def test_a_signature_read_off_the_source_is_that_of_the_function(tmp_path: Path) -> None:
    source = "def f(a, /, b, c=1, *more, d, e='x', **rest): ..."
    (tmp_path / "rules.py").write_text(source)
    made: dict[str, Any] = {}
    exec(source, made)
    found = source_signature(f"{tmp_path}/rules.py:f")
    assert found is not None
    expected = inspect.signature(made["f"])
    kinds = [(p.name, p.kind, p.default is p.empty) for p in expected.parameters.values()]
    assert [(p.name, p.kind, p.default is p.empty) for p in found.parameters.values()] == kinds


# ---- what is answered


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ([1, None, 2.5], [1, None, 2.5]),
        ([{"score": 1, "format": True, "why": "text", "none": None}], [{"score": 1, "format": 1.0}]),
        ([{"score": None, "format": 1.0}, 2.0], [None, 2.0]),
        ({"score": [1.0, None], "a": [1, 2]}, [{"score": 1.0, "a": 1}, None]),
        ({"rewards": 0.5, "scores": 1.0}, [{"score": 0.5, "scores": 1.0}]),
        # Names as those who log write them: none costs the score.
        ([{"score": 1, "pass@1": 1.0, 2: 0.5, "": 3}], [{"score": 1, "pass_1": 1.0, "2": 0.5, "_": 3}]),
        ([{"score": 1, "a/b": 1, "a b": 2, "a_b": 3}], [{"score": 1, "a_b": 3}]),
        ({"rewards": [1.0, 0.0], "extra_logs": {"x/y": [1, 2]}}, [{"score": 1.0, "x_y": 1}, {"score": 0.0, "x_y": 2}]),
        ({"rewards": (1.0, 0.0), "extra_logs": {"m": 0.5}}, [{"score": 1.0, "m": 0.5}, {"score": 0.0, "m": 0.5}]),
    ],
)
def test_answers(answer: Any, plain: list) -> None:
    assert plain_scores(answer, len(plain), {}) == plain


def test_what_is_logged_under_any_name_is_a_part() -> None:
    assert plain_scores([1.0], 1, {"acc/strict": [0.5]}) == [{"score": 1.0, "acc_strict": 0.5}]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ([{"format": 1.0}], "wrong_type: dict without a score"),
        ([{"score": "1"}], "wrong_type: str instead of a number"),
        ({"score": [1.0, 2.0], "a": [1]}, "wrong_count: 1 values of a part for 2 scores"),
        (1.0, "wrong_type: float instead of a list"),
        ([{"score": 1.0, "a": 10**400}], "non_finite: an integer beyond the range of float"),
    ],
)
def test_answers_that_are_none(answer: Any, error: str) -> None:
    with pytest.raises(Refused) as caught:
        plain_scores(answer, 1, {})
    assert str(caught.value) == error


# ---- docs/coming_from.md


def page() -> str:
    return (Path(__file__).parents[2] / "docs/coming_from.md").read_text()


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("boxed_is_right", text(r"\boxed{5}", ground_truth="5"), text("5", ground_truth="5")),
        ("reward_func", asked("5", None, '{"label": "5"}'), asked("6", None, '{"label": "5"}')),
        ("compute_score", text("5", reward_model={"ground_truth": "5"}), text("6", reward_model={"ground_truth": "5"})),
    ],
)
def test_the_pages_functions_run(name: str, right: Text, wrong: Text, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page(), re.DOTALL)
    [block] = [block for block in blocks if f"def {name}(" in block]
    (tmp_path / "rules.py").write_text(block)
    assert form_in_source(f"{tmp_path}/rules.py:{name}") is not None
    pool = FunctionPool(ScorerConfig(kind="function", function=f"{tmp_path}/rules.py:{name}"))
    try:
        found = [score for future in pool.submit([right, wrong]) for score in future.result(60)]
    finally:
        pool.close()
    assert [score.value for score in found] == [1.0, 0.0]


def test_every_key_of_the_page_is_one_of_the_configuration() -> None:
    """Of the tables the last column; of the text every `key` of a section, and every override of a command."""
    keys = {leaf.key for leaf in leaves(TandemConfig())} | {
        f"reward_service.scorers.proxy.{leaf.key}" for leaf in leaves(ScorerConfig())
    }
    rows = [line.split("|") for line in page().splitlines() if line.startswith("| ")]
    cells = [row[-2] for row in rows if len(row) == 7 and row[-2].strip() != "Tandem"]
    named = [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]
    spans = re.findall(r"(?<![\w.-])`((?:data|ppo|reward_service|engine)\.[\w.]+)", re.sub(r"\| [^\n]*\n", "", page()))
    commands = [
        word for block in re.findall(r"```bash\n(.*?)```", page(), re.DOTALL) for word in block.split() if "=" in word
    ]
    assert len(named) > 15
    assert len(spans) > 3
    assert [key for key in (*named, *spans) if key not in keys and not any(k.startswith(f"{key}.") for k in keys)] == []
    assert len(commands) > 8
    assert unknown_overrides(commands) == []


@pytest.mark.parametrize(
    ("source", "needs_seam"),
    [
        ("def f(queries, prompts, labels): return [float(query.endswith(labels[0])) for query in queries]", False),
        ("def f(queries, prompts, labels): return [len(q) - len(p) for q, p in zip(queries, prompts)]", True),
        ("def f(queries, asked, labels): return [query[len(asked[0]):] for query in queries]", True),
        ("async def f(queries): return [1.0 for _ in queries]", False),
        ("from functools import cache\n@cache\ndef f(queries, prompts, labels): return []", True),  # an import tells
        ("def f(completions, **kwargs): return [1.0 for _ in completions]", True),
    ],
)
def test_functions_of_whole_queries_need_not_know_where_a_prompt_ends(
    source: str, needs_seam: bool, tmp_path: Path
) -> None:
    (tmp_path / "rules.py").write_text(source + "\n")
    entry = ScorerConfig(kind="function", function=f"{tmp_path / 'rules.py'}:f")
    assert scorer_kind("function").spec("f", entry, RewardServiceConfig(), None).needs_seam == needs_seam
