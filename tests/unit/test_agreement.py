"""Agreement of scorers with people: measures by hand and by scipy, the file, and the command with a rule and a judge."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from transformers import AutoTokenizer

from common.statistics import bootstrap_groups, bootstrap_mean
from contracts.config import DataConfig, SourceConfig, TandemConfig
from contracts.records import Score
from controller.data.datasets import load_prompts
from reward_service.agreement import GoldError, agreement, main, make_items, read_gold, weighted_kappa
from tests.conftest import SMOLLM
from tests.unit.test_judge_endpoint import likely
from tests.unit.test_reward_http_client import Scripted

MODEL = f"model.path={SMOLLM}"


def gold_file(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rated(*rows: tuple[str, str, float], **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": said, "score": score, **more} for prompt, said, score in rows]


def test_kappa_by_hand() -> None:
    # Gold 0 1 2 2, found 0 1 1 2: one neighbour in four, so 1/4 is observed. The margins are 1/4 1/4 1/2 and 1/4 1/2 1/4:
    # neighbours (0,1) 1/8, (1,0) 1/16, (1,2) 1/16, (2,1) 1/4; ends, times 4: (0,2) 1/4, (2,0) 1/2. In all 5/4.
    assert weighted_kappa([0, 1, 2, 2], [0, 1, 1, 2], 3) == pytest.approx(1 - (1 / 4) / (5 / 4))
    assert weighted_kappa([0, 1, 2], [0, 1, 2], 3) == pytest.approx(1.0)
    assert weighted_kappa([0, 1], [1, 0], 2) == pytest.approx(-1.0)
    assert math.isnan(weighted_kappa([1, 1], [1, 1], 3))


def test_kappa_of_a_known_table() -> None:
    """Two raters of 4 categories against the definition, term by term."""
    table = [[11, 3, 1, 0], [1, 9, 0, 1], [0, 1, 10, 0], [1, 2, 0, 10]]
    pairs = [(i, j) for i in range(4) for j in range(4) for _ in range(table[i][j])]
    n = len(pairs)
    seen = sum((i - j) ** 2 for i, j in pairs) / n
    chance = sum((i - j) ** 2 for i, _ in pairs for _, j in pairs) / n**2
    gold, found = map(list, zip(*pairs, strict=True))
    assert weighted_kappa(gold, found, 4) == pytest.approx(1 - seen / chance)


def test_the_bootstrap_draws_groups_whole() -> None:
    values = np.array([0.0, 1.0, 2.0, 5.0])
    each = bootstrap_groups(lambda rows: values[rows].mean(), [0, 1, 2, 3], 500, 7)
    assert each == bootstrap_mean(values, 500, 7)  # groups of one are rows
    two = bootstrap_groups(lambda rows: values[rows].mean(), [0, 0, 1, 1], 500, 7)
    assert (two.mean, two.low, two.high) == (2.0, 0.5, 3.5)  # one group or the other, or both: nothing else is drawn
    one = bootstrap_groups(lambda rows: values[rows].mean(), [3, 3, 3, 3], 500, 7)
    assert one.mean == 2.0
    assert math.isnan(one.low)
    assert math.isnan(bootstrap_groups(lambda rows: values[rows].mean(), [], 500, 7).mean)


def test_resamples_that_are_all_one_number_tell_no_limits(tmp_path: Path) -> None:
    """Perfect agreement of three prompts, and numbers that are one but for rounding."""
    gold = read_gold(gold_file(tmp_path / "gold.jsonl", rated(("p", "a", 1), ("q", "b", 2), ("r", "c", 3))))
    found = agreement(gold, [Score(1.0), Score(2.0), Score(3.0)], [1.0, 2.0, 3.0], 200, 1)
    for name in ("spearman", "kendall", "kappa"):
        assert found[name] == {"mean": pytest.approx(1.0), "low": None, "high": None}
    found = agreement(gold, [Score(1.0), Score(3.0), Score(2.0)], [1.0, 2.0, 3.0], 200, 1)
    for name in ("spearman", "kendall", "kappa"):
        assert found[name]["low"] < found[name]["mean"] < found[name]["high"]
    groups, noise = [0, 1, 2], np.array([0.0, 1e-9, -1e-9])
    almost = bootstrap_groups(lambda rows: 1 + noise[rows].sum(), groups, 200, 1)
    assert (almost.mean, math.isnan(almost.low), math.isnan(almost.high)) == (1.0, True, True)


def test_items_without_a_score_count_as_such_and_nothing_else(tmp_path: Path) -> None:
    rows = rated(("p", "a", 1), ("p", "b", 3), ("q", "c", 2), ("q", "d", 2), ("q", "e", 5), ("r", "f", 4))
    gold = read_gold(gold_file(tmp_path / "gold.jsonl", rows))
    assert gold.pairs == [(1, 0), (4, 2), (4, 3)]
    assert gold.prompts == [0, 0, 1, 1, 1, 2]
    values = [2.0, 2.0, 1.0, None, 4.6, 3.0]
    scores = [
        Score(v, None if v is not None else "unreadable: x", parts={"off_scale": 0.1} if v else None) for v in values
    ]
    found = agreement(gold, [*scores[:5], Score(3.0, parts={"late": 1.0})], [1.0, 2.0, 3.0, 4.0, 5.0], 200, 1)
    assert found["parts"] == {"off_scale": pytest.approx(0.1), "late": 1.0}  # each of those that have it
    found = agreement(gold, scores, [1.0, 2.0, 3.0, 4.0, 5.0], 200, 1)
    assert (found["rows"], found["items"], found["scored"], found["pairs"]) == (6, 6, 5, 2)
    assert found["without_score"] == {"unreadable": 1}
    assert found["pair_accuracy"]["mean"] == pytest.approx((0.5 + 1.0) / 2)  # a tie is half right
    assert found["spearman"]["mean"] == pytest.approx(spearmanr([1, 3, 2, 5, 4], [2, 2, 1, 4.6, 3]).statistic)
    # Kendall's tau-b by hand: of the 10 pairs (a, b) is tied, and of the others (a, c) alone disagrees.
    assert found["kendall"]["mean"] == pytest.approx((8 - 1) / math.sqrt(10 * 9))
    assert found["kappa"]["mean"] == pytest.approx(
        weighted_kappa([0, 2, 1, 4, 3], [1, 1, 0, 4, 2], 5)
    )  # 4.6 is nearest 5
    assert found["kappa"]["low"] <= found["kappa"]["mean"] <= found["kappa"]["high"]
    assert found["parts"] == {"off_scale": pytest.approx(0.1)}
    assert "kappa" not in agreement(gold, scores, None, 10, 1)
    assert "kappa" not in agreement(gold, scores, [1.0, 2.0, 3.0], 10, 1)  # a rating is beside the scale


def test_four_right_pairs_are_no_certainty_and_system_turns_tell_prompts_apart(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Go on", "system": f"Be {n}", "completion": c, "score": s}
        for n in "abcd"
        for c, s in (("x", 1), ("y", 2))
    ]
    gold = read_gold(gold_file(tmp_path / "gold.jsonl", rows))
    assert gold.prompts == [0, 0, 1, 1, 2, 2, 3, 3]
    assert gold.pairs == [(1, 0), (3, 2), (5, 4), (7, 6)]
    found = agreement(gold, [Score(float(row["score"])) for row in rows], None, 200, 1)["pair_accuracy"]
    assert (found["mean"], found["high"]) == (1.0, 1.0)
    assert found["low"] == pytest.approx(0.025**0.25)  # of four prompts


def test_nothing_scored_is_unknown(tmp_path: Path) -> None:
    gold = read_gold(gold_file(tmp_path / "gold.jsonl", rated(("p", "a", 1), ("p", "b", 3))))
    found = agreement(gold, [Score(None, "timeout: late")] * 2, [1.0, 3.0], 10, 1)
    unknown = {"mean": None, "low": None, "high": None}
    assert [found[name] for name in ("pair_accuracy", "spearman", "kendall", "kappa")] == [unknown] * 4
    assert found["without_score"] == {"timeout": 2}


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (["{"], "line 1: no object with completion, prompt, score or chosen, prompt, rejected"),
        (["[1]"], "line 1: no object with"),
        (['{"prompt": "p", "completion": "c"}'], "line 1: no object with"),
        (['{"prompt": "p", "completion": "c", "score": 1}', "", '{"prompt": "p", "chosen": "c", "rejected": "d"}'],
         "line 3: it has chosen, prompt, rejected, the first line completion, prompt, score"),
        (['{"prompt": "p", "completion": "c", "score": "1"}'], "line 1: score is no finite number"),
        (['{"prompt": "p", "completion": "c", "score": NaN}'], "line 1: score is no finite number"),
        (['{"prompt": "p", "completion": "c", "score": true}'], "line 1: score is no finite number"),
        (['{"prompt": "p", "completion": ["c"], "score": 1}'], "line 1: the prompt is a text or messages"),
        (['{"prompt": 7, "chosen": "c", "rejected": "d"}'], "line 1: the prompt is a text or messages"),
        ([], "no row"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_told_by_line(lines: list[str], error: str, tmp_path: Path) -> None:
    (tmp_path / "gold.jsonl").write_text("\n".join(lines))
    with pytest.raises(GoldError, match=error):
        read_gold(tmp_path / "gold.jsonl")


@pytest.mark.parametrize("chat", [False, True])
def test_items_are_those_of_ppos_prompts(chat: bool, tmp_path: Path) -> None:
    """With the row's system turn and tools where the template shows them, and its messages for who reads messages."""
    source = SourceConfig(path=str(tmp_path / "prompts.jsonl"))
    config = TandemConfig(data=DataConfig(chat=chat, prompts=source, prompt_words=None))
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    plain = {"prompt": "Is it göod?", "system": "Be brief."}
    asked = [{"role": "user", "content": "And now?"}]
    rows: list[dict[str, Any]] = [
        plain,
        {"prompt": asked, "system": "Be kind.", "tools": json.dumps(tools)},
        {"prompt": asked, "tools": tools},
    ]
    gold_file(tmp_path / "prompts.jsonl", rows)
    gold = read_gold(gold_file(tmp_path / "gold.jsonl", [{**row, "completion": "Yes.", "score": 1} for row in rows]))
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(tmp_path / "model")
    made = make_items(gold, config, str(tmp_path / "model"))
    prompts = load_prompts(source, config.data, tokenizer, 8, 4096)
    assert len(prompts) == 3
    assert [item.token_ids[: item.prompt_tokens] for item in made] == [prompt.token_ids for prompt in prompts]
    assert [item.messages for item in made] == [prompt.messages for prompt in prompts]
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it göod?"}]
    assert made[0].messages == (json.dumps(told, ensure_ascii=False) if chat else None)


def test_a_rule_function_and_its_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "p", "chosen": "short", "rejected": "a long text that goes on"},
            {"prompt": [{"role": "user", "content": "q"}], "chosen": "a longer text", "rejected": "brief"},
            {"prompt": "r", "chosen": "same", "rejected": "same"}]  # fmt: skip
    scorers = "+reward_service.scorers={brief: {kind: function, function: 'reward_service.rules:brevity'}}"
    gold = gold_file(tmp_path / "gold.jsonl", rows)
    assert main([MODEL, scorers, "--gold", str(gold), "--samples", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["scorer"], found["items"], found["scored"], found["pairs"]) == ("brief", 6, 6, 3)
    assert found["pair_accuracy"]["mean"] == pytest.approx(0.5)  # right, wrong, a tie
    assert "spearman" not in found
    assert main([MODEL, scorers, "--gold", str(gold), "--scorer", "none"]) == 2
    assert main([MODEL, scorers, "--gold", str(tmp_path / "none.jsonl")]) == 2
    assert main([MODEL, "--gold", str(gold)]) == 2
    errors = capsys.readouterr().err
    assert "--scorer must be one of brief; found none" in errors
    assert "No such file" in errors
    assert "reward_service.scorers must be set" in errors


@pytest.fixture
def server() -> Iterator[Scripted]:
    started = Scripted()
    yield started
    started.stop()


def test_a_judge_at_an_address(server: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(body: dict[str, Any]) -> Any:
        question = body["messages"][0]["content"]
        value = next((digit for digit in "12345" if f"<{digit}>" in question), "3")
        return likely(("x", 1.0) if "lost" in question else (value, 1.0))(body)

    server.script = [answer]
    rows = rated(*((f"p{i}", f"text <{i}>", i) for i in (1, 2, 3, 4, 5)), ("p6", "lost", 1), hint="a hint")
    judge = f"{{address: '{server.url}', model_name: m, rubric: '{{{{ completion }}}} {{{{ row.hint }}}}'}}"
    arguments = [MODEL, f"+reward_service.scorers={{judge: {{kind: judge, judge: {judge}}}}}"]
    gold = gold_file(tmp_path / "gold.jsonl", rows)
    assert main([*arguments, "--gold", str(gold), "--samples", "50"]) == 0
    table = capsys.readouterr().out
    assert "5 of 6 items have a score" in table
    assert "1 unreadable" in table
    assert "spearman       1.000 [unknown, unknown]" in table  # as it is in every resample of so few
    assert "kappa          1.000 [unknown, unknown]" in table
    assert "pair_accuracy  unknown [unknown, unknown], 0 pairs" in table
    assert {body["messages"][0]["content"] for body in server.bodies[1:]} >= {"text <1> a hint", "lost a hint"}
