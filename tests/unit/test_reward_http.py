"""Every protocol, status and limit of the HTTP side, with the real tokenizer and a stand-in for the replicas."""

import asyncio
import base64
import json
import logging
import math
import shutil
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from common.text.encoding import item_of_messages, item_of_text
from common.text.tokenizers import with_date
from contracts.config import HttpConfig, ScorerConfig
from contracts.records import Score, ScoringItem
from reward_service.__main__ import date_of, read_config
from reward_service.access import token_digests, token_of
from reward_service.encoder import Encoder
from reward_service.front import Front, FrontLimits
from reward_service.http import HttpService
from reward_service.replica_dispatcher import ReplicaDied
from reward_service.scorer_kind import ScorerSpec
from reward_service.service_metrics import Metrics

ROOT = Path(__file__).parents[2]
TOKEN = "correct-horse-battery-staple"
EOS = 2
TURNS = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "It is."}]
Answer = Callable[[list[ScoringItem]], Any]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(str(ROOT / ".cache/models/smollm2-135m-instruct"))


def by_length(items: list[ScoringItem]) -> list[Score]:
    """raw = number of tokens, reward = raw / 10; items that say "poison" (token 48587) have no score."""
    return [Score(len(i.token_ids) / 10, raw=float(len(i.token_ids))) for i in items]


class Server:
    """The HTTP side in this process."""

    def __init__(self, encoder: Encoder, answer: Answer = by_length, limits: FrontLimits | None = None, **http: Any):
        self.items: list[ScoringItem] = []
        self.answer = answer
        scorers = {
            "proxy": ScorerSpec("proxy", ScorerConfig(), "aaaa", "a", max_tokens=64, source="/models/proxy"),
            "rule": ScorerSpec("rule", ScorerConfig(kind="function"), "bbbb", "b"),
            "both": ScorerSpec("both", ScorerConfig(kind="ensemble"), "cccc", parts=("proxy", "rule")),
            "of_queries": ScorerSpec("of_queries", ScorerConfig(kind="function"), "dddd", "d", needs_seam=False),
            "models": ScorerSpec("models", ScorerConfig(kind="ensemble"), "eeee", parts=("proxy", "of_queries")),
        }
        self.front = Front(scorers, limits or FrontLimits(1000, 0, 5.0), self._call, Metrics())
        self.service = HttpService(self.front, encoder, HttpConfig(port=8000, **http), self._ready)
        self.missing: list[str] = []
        self.digests: tuple[str, ...] = ()

    async def _call(self, application: str, items: list[ScoringItem], deadline_s: float) -> list[Score]:
        if not items:  # is a replica there?
            return []
        self.items += items
        answer = self.answer(items)
        return await answer if isinstance(answer, Awaitable) else answer

    async def _ready(self) -> list[str]:
        return self.missing

    def run(self, *requests: tuple[str, Any], headers: dict[str, str] | None = None) -> list[httpx.Response]:
        """Answers of (path, JSON body | raw content | None for GET), sent one after another."""

        async def go() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.service.application(self.digests), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://service", headers=headers) as client:
                answers = []
                for path, body in requests:
                    if body is None:
                        answers.append(await client.get(path))
                    elif isinstance(body, bytes | AsyncIterator):
                        answers.append(await client.post(path, content=body))
                    else:
                        answers.append(await client.post(path, json=body))
                return answers

        return asyncio.run(go())

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
        return self.run((path, body), headers=headers)[0]


def items(*contents: dict[str, Any]) -> dict[str, Any]:
    return {"items": list(contents)}


# ---- our own protocol


def test_native_answers_item_by_item(encoder: Encoder) -> None:
    server = Server(encoder)
    ids = list(item_of_text(encoder.tokenizer, "A fine film").token_ids)
    body = {
        "request_id": "r-1",
        "model": "proxy",
        "items": [
            {"id": "chat", "messages": TURNS, "finish_reason": "stop"},
            {"id": "plain", "text": "A fine film"},
            {"id": "ids", "token_ids": ids, "tokenizer_hash": encoder.hash},
            {"id": "again", "text": "A fine film"},
            {"id": "empty", "text": "  "},
            {"id": "long", "text": "word " * 100},
            {"id": "alien", "token_ids": ids, "tokenizer_hash": "0" * 16},
        ],
    }
    response = server.post("/v1/rewards", body)
    assert response.status_code == 200
    answer = response.json()
    assert (answer["request_id"], answer["model"], answer["version"]) == ("r-1", "proxy", "aaaa")
    chat = item_of_messages(encoder.tokenizer, TURNS)
    ok, errors = answer["items"][:4], answer["items"][4:]
    assert ok[0] == {
        "id": "chat", "status": "ok", "reward": len(chat.token_ids) / 10, "raw": float(len(chat.token_ids)),
        "tokens": len(chat.token_ids), "truncated": False, "cached": False,
    }  # fmt: skip
    assert [item["reward"] for item in ok[1:]] == [len(ids) / 10] * 3
    assert [(e["id"], e["status"], e["code"], e["retryable"]) for e in errors] == [
        ("empty", "error", "empty", False),
        ("long", "error", "too_long", False),
        ("alien", "error", "unreadable", False),
    ]
    assert server.items == [ScoringItem(tuple(ids)), chat]  # each content once, in the one form


def test_a_template_writes_the_day_of_the_configuration(tmp_path: Path) -> None:
    source = ROOT / ".cache/models/smollm2-135m-instruct"
    shutil.copy(source / "config.json", tmp_path)
    made = AutoTokenizer.from_pretrained(source)
    made.chat_template = "{{ 'Today: ' + strftime_now('%d %b %Y') }}\n" + made.chat_template

    def shown(day: str | None) -> str:
        encoder = Encoder(str(tmp_path), day)
        return str(encoder.tokenizer.decode(encoder.messages(TURNS).token_ids)).partition("\n")[0]

    made.save_pretrained(tmp_path)
    assert shown(None) == "Today: 01 Jan 2026"
    assert shown("2024-02-29") == "Today: 29 Feb 2024"
    with_date(made, "2025-12-31").save_pretrained(tmp_path)  # as training leaves it
    assert shown(None) == "Today: 31 Dec 2025"
    assert shown("2024-02-29") == "Today: 29 Feb 2024"


@pytest.mark.parametrize(("written", "day"), [([], None), (["model.template_date=2024-02-29"], "2024-02-29")])
def test_a_service_on_its_own_has_the_day_that_is_written(
    written: list[str], day: str | None, classifier: Path
) -> None:
    config, _ = read_config(["reward_service=http", f"proxy_model={classifier}", *written])
    assert date_of(config) == day


def test_every_end_token_of_the_model_is_one_eos(tmp_path: Path) -> None:
    """Of a checkpoint whose generation_config.json names two."""
    source = ROOT / ".cache/models/smollm2-135m-instruct"
    for file in source.iterdir():
        if file.suffix in (".json", ".txt", ".jinja"):
            shutil.copy(file, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    encoder = Encoder(str(tmp_path))
    server = Server(encoder)
    said = encoder.tokenizer("A fine film")["input_ids"]
    prompt, query = "<|im_start|>assistant\n", "<|im_start|>assistant\nIt is.{}"
    asked = {"query": [query.format(end) for end in ("", "<|im_end|>", "<|endoftext|>\n")], "prompts": [prompt] * 3}
    server.post("/get_reward", asked)
    (item,) = {item.token_ids for item in server.items}  # a client that decoded what it sampled, with its prompt
    assert encoder.tokenizer.decode(item) == query.format("<|im_end|>")
    server.items.clear()
    for end in ([], [EOS], [0], [0, EOS]):
        server.post("/v1/rewards", items({"token_ids": [*said, *end], "tokenizer_hash": encoder.hash}))
        server.post("/classify", {"input": encoder.tokenizer.decode([*said, *end])})
        server.post("/get_reward", {"query": [encoder.tokenizer.decode([*said, *end])]})
    assert {item.token_ids for item in server.items} == {(*said, EOS)}
    assert len(server.items) == 12


def test_native_options(encoder: Encoder) -> None:
    server = Server(encoder)
    raw = server.post("/v1/rewards", {"items": [{"text": "A film"}], "normalize": False}).json()["items"][0]
    assert raw["id"] == 0
    assert raw["reward"] == raw["raw"] == 3.0
    long = {"items": [{"text": "word " * 100}], "on_overflow": "truncate_left_keep_eos"}
    cut = server.post("/v1/rewards", long).json()["items"][0]
    assert (cut["status"], cut["truncated"], cut["raw"]) == ("ok", True, 64.0)
    assert server.items[-1].token_ids[-1] == EOS
    spread = server.post("/v1/rewards", {"model": "both", "items": [{"text": "A film"}]}).json()["items"][0]
    assert (spread["reward"], spread["spread"]) == (pytest.approx(0.3), 0.0)


def test_a_deadline_is_an_error_of_the_item(encoder: Encoder) -> None:
    server = Server(encoder, lambda given: asyncio.sleep(60))
    item = server.post("/v1/rewards", {"items": [{"id": 7, "text": "A film"}], "deadline_ms": 50}).json()["items"][0]
    assert item == {
        "id": 7, "status": "error", "code": "timeout", "retryable": True, "detail": "no score before the deadline",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"items": []}, "items: "),
        ({"items": [{"text": "a", "token_ids": [1]}]}, "items.0: an item has one of messages, text and token_ids"),
        ({"items": [{}]}, "items.0: an item has one of messages, text and token_ids"),
        ({"items": [{"text": "a"}], "modle": "proxy"}, "modle: Extra inputs are not permitted"),
        ({"items": [{"text": "a"}], "on_overflow": "truncate_right"}, "on_overflow: "),
        ({"items": [{"token_ids": ["a"]}]}, "items.0.token_ids.0: "),
        ([1], "the body must be a JSON object"),
        (b"{nonsense", "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"\xed\xa0\x80", "the body is not UTF-8"),
        (b'{"items": [{"text": "half of a pair: \\ud83d"}]}', "the body is not UTF-8, or has half of a surrogate pair"),
        (b'{"items": [{"text": "a", "id": "\\uDC00"}]}', "the body is not UTF-8, or has half of a surrogate pair"),
        (b'{"items": [{"text": "a", "\\udbff": 1}]}', "the body is not UTF-8, or has half of a surrogate pair"),
        (b'{"items": [{"token_ids": [' + b"9" * 5000 + b"]}]}", "the body has an integer of too many digits"),
        (b"[" * 200_000, "the body is "),
    ],
)
def test_what_cannot_be_read_is_named(encoder: Encoder, body: Any, message: str) -> None:
    response = Server(encoder).post("/v1/rewards", body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "bad_request"
    assert response.json()["error"]["message"].startswith(message)


def test_a_whole_surrogate_pair_is_a_character(encoder: Encoder) -> None:
    server = Server(encoder)
    answers = server.run(
        ("/v1/rewards", b'{"items": [{"text": "\\ud83d\\ude00"}]}'), ("/v1/rewards", items({"text": "😀"}))
    )
    assert [answer.json()["items"][0]["status"] for answer in answers] == ["ok", "ok"]
    assert len(set(server.items)) == 1


@pytest.mark.parametrize("path", ["/v1/rewards", "/get_reward", "/classify", "/pooling"])
def test_no_body_breaks_a_route(encoder: Encoder, path: str) -> None:
    """What is wrong anywhere in a body is a 400, never a 500."""
    good = {"items": [{"text": "a"}], "query": ["a"], "input": ["a"], "prompts": ["x"], "labels": ["y"]}
    wanted = {"/v1/rewards": ("items",), "/get_reward": ("query", "prompts", "labels")}.get(path, ("input",))
    for key in wanted:
        for value in ('"\\ud800"', '["\\ud800"]', '[{"\\ud800": 1}]', "9" * 5000, "[" + "9" * 5000 + "]"):
            body = {name: good[name] for name in wanted if name != key}
            raw = json.dumps(body)[:-1] + (", " if body else "") + f'"{key}": {value}' + "}"
            assert Server(encoder).post(path, raw.encode()).status_code == 400, raw[:80]


# ---- the exact payloads of others

QUERY = "<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\nIt is.<|im_end|>"


def test_openrlhf_payload(encoder: Encoder) -> None:
    """As `openrlhf/utils/agent.py` sends it, and what it reads of the answer (0.11.2)."""
    server = Server(encoder)
    prompt = QUERY.removesuffix("It is.<|im_end|>")
    payload = {"query": [QUERY, QUERY], "prompts": [prompt, prompt], "labels": ["yes", None]}
    response = server.post("/get_reward", payload)
    assert response.status_code == 200
    answer = response.json()
    tokens = len(server.items[0].token_ids)
    assert answer["rewards"] == answer["scores"] == [tokens / 10] * 2
    assert answer["extra_logs"] == {"raw": [float(tokens)] * 2}
    assert server.items[0].token_ids == tuple(encoder.tokenizer(QUERY)["input_ids"])
    assert server.items[0].prompt_tokens == len(encoder.tokenizer(prompt)["input_ids"])
    rule = server.post("/get_reward?model=rule", payload)
    assert rule.status_code == 200
    assert [i.label for i in server.items[1:]] == ["yes", None]
    both = server.post("/get_reward?model=both", payload).json()
    assert both["extra_logs"]["spread"] == [0.0, 0.0]


def test_a_query_that_does_not_begin_with_its_prompt_is_told(encoder: Encoder) -> None:
    """As where a tokenizer decodes one space more. A reward model sees both as one all the same."""
    server = Server(encoder)
    payload = {"query": ["2+2= 4", "<s> 2+2= 4"], "prompts": ["2+2=", "<s>2+2="]}
    refused = server.post("/get_reward?model=rule", payload)
    assert refused.status_code == 422
    assert refused.json()["error"] == {
        "code": "unreadable",
        "message": "1 of 2 items have no score; item 1: unreadable: the query does not begin with its prompt",
    }
    assert server.post("/get_reward", payload).status_code == 200
    assert server.post("/get_reward?model=both", payload).status_code == 422  # the rule is a part of it
    assert server.post("/get_reward?model=models", payload).status_code == 200  # whose parts are reward models
    assert server.post("/get_reward?model=of_queries", payload).status_code == 200
    assert server.post("/get_reward?model=rule", {"query": ["a"], "prompts": [[{"role": "user"}]]}).status_code == 200


def test_openrlhf_labels_may_be_any_json(encoder: Encoder) -> None:
    server = Server(encoder)
    payload = {"query": ["a"] * 4, "labels": ["5", 5, {"tests": [1, "ü"]}, None]}
    assert server.post("/get_reward?model=rule", payload).status_code == 200
    seen = {(i.label, i.row) for i in server.items}
    assert seen == {("5", None), (None, '{"label": 5}'), (None, '{"label": {"tests": [1, "ü"]}}'), (None, None)}
    assert server.post("/get_reward?model=rule", b'{"query": ["a"], "labels": [NaN]}').status_code == 400


def test_a_row_goes_to_the_scorer_and_parts_come_back(encoder: Encoder) -> None:
    def parts(items: list[ScoringItem]) -> list[Score]:
        return [Score(1.0, raw=1.0, parts={"format": 0.5}) if i.row else Score(0.0, raw=0.0) for i in items]

    server = Server(encoder, parts)
    row = {"b": [1, {"x": None}], "a": "ü"}
    answer = server.post("/v1/rewards", {"model": "rule", **items({"text": "a", "row": row}, {"text": "b"})}).json()
    assert [i.row for i in server.items] == ['{"a": "ü", "b": [1, {"x": null}]}', None]
    assert [found.get("parts") for found in answer["items"]] == [{"format": 0.5}, None]
    refused = server.post("/v1/rewards", b'{"items": [{"text": "a", "row": {"x": NaN}}]}')
    assert refused.status_code == 400
    assert "items.0" in refused.json()["error"]["message"]
    logs = server.post("/get_reward?model=rule", {"query": ["a", "b"], "labels": [5, None]}).json()["extra_logs"]
    assert logs == {"raw": [1.0, 0.0], "format": [0.5, None]}


def test_verl_payload(encoder: Encoder) -> None:
    """As `verl/experimental/reward_loop/reward_loop.py` sends it to vLLM (0.9.1): the text of the reward model's own chat
    template; the model's path is its name."""
    server = Server(encoder)
    prompt = encoder.tokenizer.apply_chat_template(TURNS, add_generation_prompt=False, tokenize=False)
    response = server.post("/classify", {"model": "/models/proxy", "input": prompt, "use_activation": False})
    assert response.status_code == 200
    score = response.json()["data"][-1]["probs"][-1]
    assert score == len(item_of_messages(encoder.tokenizer, TURNS).token_ids)
    assert server.items[0] == ScoringItem(item_of_messages(encoder.tokenizer, TURNS).token_ids)
    older = server.post("/classify", {"model": "/models/proxy", "input": prompt, "activation": False})
    assert older.json()["data"][-1]["probs"][-1] == score


def test_vllm_classify_and_pooling(encoder: Encoder) -> None:
    server = Server(encoder)
    several = {"model": "proxy", "input": ["A film", "A fine film"], "user": "u", "priority": 0}
    answer = server.post("/classify", several).json()
    assert answer["object"] == "list"
    assert answer["data"] == [
        {"index": 0, "label": "LABEL_0", "probs": [3.0], "num_classes": 1},
        {"index": 1, "label": "LABEL_0", "probs": [4.0], "num_classes": 1},
    ]
    assert answer["usage"]["prompt_tokens"] == 7
    activated = server.post("/classify", {"input": "A film", "use_activation": True}).json()
    assert activated["data"][0]["probs"] == [pytest.approx(1 / (1 + math.exp(-3)))]
    pooled = server.post("/pooling", {"input": "A film", "task": "classify"}).json()
    assert pooled["data"] == [{"index": 0, "object": "pooling", "data": [3.0]}]
    packed = server.post("/pooling", {"input": "A film", "encoding_format": "base64"}).json()["data"][0]["data"]
    assert struct.unpack("=f", base64.b64decode(packed)) == (3.0,)
    ids = encoder.tokenizer("A film")["input_ids"]
    assert server.post("/pooling", {"input": ids}).json()["data"][0]["data"] == [3.0]
    assert [d["data"] for d in server.post("/pooling", {"input": [ids, ids]}).json()["data"]] == [[3.0], [3.0]]
    chat = server.post("/classify", {"messages": TURNS}).json()["data"][0]["probs"]
    assert chat == [float(len(item_of_messages(encoder.tokenizer, TURNS).token_ids))]


def test_pitfall_truncation_takes_the_first_tokens_never_the_eos(encoder: Encoder) -> None:
    server = Server(encoder)
    for keep, left in ((-1, 64), (5, 5)):
        answer = server.post("/classify", {"input": "word " * 100, "truncate_prompt_tokens": keep})
        assert answer.json()["data"][0]["probs"] == [float(left)]
        assert server.items[-1].token_ids[-1] == EOS
    right = {"input": "word " * 100, "truncate_prompt_tokens": 5, "truncation_side": "right"}
    assert server.post("/classify", right).status_code == 400
    assert server.post("/classify", {"input": "word " * 100}).status_code == 422


@pytest.mark.parametrize("path", ["/get_reward", "/classify", "/pooling"])
@pytest.mark.parametrize(
    ("answer", "status", "code", "retry_after"),
    [
        (lambda given: [Score(None, "non_finite") for _ in given], 422, "non_finite", None),
        (lambda given: by_length(given)[:-1], 422, "wrong_count", None),
        (lambda given: asyncio.sleep(60), 504, "timeout", "1"),
        (lambda given: (_ for _ in ()).throw(ReplicaDied("x")), 422, "poison", None),
    ],
)
def test_where_items_have_no_errors_the_request_has(
    encoder: Encoder, path: str, answer: Answer, status: int, code: str, retry_after: str | None
) -> None:
    """A client of these protocols must never find a made-up reward in the place of a missing one."""
    server = Server(encoder, answer, FrontLimits(100, 0, 0.1))
    texts = ["A film", "A fine film"]
    response = server.post(path, {"query": texts} if path == "/get_reward" else {"input": texts})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.headers.get("retry-after") == retry_after
    assert "film" not in response.text


# ---- names and versions


def test_models_and_versions(encoder: Encoder) -> None:
    server = Server(encoder)
    models, right, wrong, gone, gone_too = server.run(
        ("/v1/models", None),
        ("/v1/rewards", {"model": "rule", "version": "bbbb", **items({"text": "a"})}),
        ("/v1/rewards", {"model": "nobody", **items({"text": "a"})}),
        ("/v1/rewards", {"model": "rule", "version": "b0", **items({"text": "a"})}),
        ("/classify", {"model": "proxy@a0", "input": "a"}),
    )
    assert [(m["id"], m["version"], m["kind"]) for m in models.json()["data"]] == [
        ("proxy", "aaaa", "model"), ("rule", "bbbb", "function"), ("both", "cccc", "ensemble"),
        ("of_queries", "dddd", "function"), ("models", "eeee", "ensemble"),
    ]  # fmt: skip
    assert models.json()["data"][0]["tokenizer_hash"] == encoder.hash
    assert (right.status_code, wrong.status_code) == (200, 404)
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "version_gone")
    assert "rule is served in version bbbb" in gone.json()["error"]["message"]
    assert gone_too.status_code == 410


# ---- limits


def test_too_much_of_anything(encoder: Encoder) -> None:
    server = Server(encoder, max_items=4, max_body_mib=0.01)

    async def endless() -> AsyncIterator[bytes]:
        while True:  # without a content-length
            yield b" " * 4096

    many = items(*[{"text": "a"}] * 5)
    big = items({"text": "a" * 20_000})
    statuses = [
        (r.status_code, r.json()["error"]["code"])
        for r in server.run(
            ("/v1/rewards", many), ("/classify", {"input": ["a"] * 5}), ("/get_reward", {"query": ["a"] * 5}),
            ("/v1/rewards", big), ("/v1/rewards", endless()),
        )
    ]  # fmt: skip
    assert statuses == [(413, "too_many_items")] * 3 + [(413, "too_large")] * 2
    assert server.service.bodies.pending == 0
    assert server.items == []


def test_overload_is_503_with_a_pause_and_harms_nobody_else(encoder: Encoder) -> None:
    async def slow(given: list[ScoringItem]) -> list[Score]:
        await asyncio.sleep(0.3)
        return by_length(given)

    server = Server(encoder, slow, FrontLimits(2, 0, 5.0))

    async def go() -> list[httpx.Response]:
        transport = httpx.ASGITransport(server.service.application(()))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            bodies = [items({"text": f"text {n}"}, {"text": f"other {n}"}) for n in range(3)]
            first = asyncio.create_task(client.post("/v1/rewards", json=bodies[0]))
            await asyncio.sleep(0.1)
            second = await client.post("/v1/rewards", json=bodies[1])
            third = await client.post("/classify", json={"input": "x"})
            return [await first, second, third, await client.post("/v1/rewards", json=bodies[2])]

    first, second, third, later = asyncio.run(go())
    assert [i["status"] for i in first.json()["items"]] == ["ok", "ok"]
    for rejected in (second, third):
        assert (rejected.status_code, rejected.json()["error"]["code"]) == (503, "overloaded")
        assert int(rejected.headers["retry-after"]) >= 1
    assert later.status_code == 200


def test_bodies_share_one_budget(encoder: Encoder) -> None:
    server = Server(encoder, max_body_mib=1, max_pending_mib=1)
    with server.service.bodies.room("another") as take:
        take(2**20)
        response = server.post("/v1/rewards", items({"text": "a"}))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert server.post("/v1/rewards", items({"text": "a"})).status_code == 200


# ---- access


@pytest.fixture
def guarded(encoder: Encoder, tmp_path: Path) -> Server:
    server = Server(encoder)
    (tmp_path / "tokens").write_text(f"{TOKEN}\nthe-next-one-0123456789\n")
    server.digests = token_digests(str(tmp_path / "tokens"))
    return server


def test_security_every_route_but_healthz_needs_the_token(guarded: Server) -> None:
    routes = [route.path for route in guarded.service.application(()).routes]
    assert {"/v1/rewards", "/get_reward", "/classify", "/pooling", "/v1/models", "/readyz", "/metrics"} < set(routes)
    bad = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer "}]
    bad += [{"Authorization": "Basic %%%"}, {"Authorization": "Basic " + base64.b64encode(b"x:wrong").decode()}]
    for path in [*routes, "/docs", "/openapi.json", "/nowhere"]:
        for headers in bad:
            for method in (None, {}):
                answer = guarded.run((path, method), headers=headers)[0]
                if path == "/healthz":
                    assert answer.status_code in (200, 405)
                else:
                    assert answer.status_code == 401, path
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert answer.json()["error"]["code"] == "unauthorized"
    assert guarded.items == []


@pytest.mark.parametrize("token", [TOKEN, "the-next-one-0123456789"])
def test_each_token_opens(guarded: Server, token: str) -> None:
    basic = base64.b64encode(f"any:{token}".encode()).decode()
    for authorization in (f"Bearer {token}", f"bearer {token}", f"Basic {basic}"):
        headers = {"Authorization": authorization}
        for path in ("/v1/models", "/readyz", "/metrics"):
            assert guarded.run((path, None), headers=headers)[0].status_code == 200
        assert guarded.post("/v1/rewards", items({"text": "a"}), headers).status_code == 200
        assert guarded.run(("/nowhere", None), headers=headers)[0].status_code == 404


def test_a_body_is_not_read_before_the_token_is(guarded: Server) -> None:
    read = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield b" " * 4096

    assert guarded.post("/v1/rewards", counted()).status_code == 401
    assert read <= 1


def test_tokens_are_compared_as_digests(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    digests = token_digests(str(tmp_path / "tokens"))
    assert TOKEN not in "".join(digests)
    assert token_of(f"Bearer {TOKEN}", digests) == digests[0]
    assert token_of("Bearer " + digests[0], digests) is None
    assert token_of(f"Bearer {TOKEN}", ()) is None
    assert token_digests(None) == ()


# ---- what is told about it


def test_health_readiness_and_metrics(encoder: Encoder) -> None:
    server = Server(encoder)
    server.missing = ["rule"]
    health, ready = server.run(("/healthz", None), ("/readyz", None))
    assert (health.status_code, ready.status_code, ready.json()["status"]) == (200, 503, "waiting for rule")
    server.missing = []
    server.run(("/v1/rewards", items({"text": "a"}, {"text": ""})), ("/secret/text", None), ("/readyz", None))
    text = server.run(("/metrics", None))[0].text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['tandem_reward_requests_total{route="/v1/rewards",status="200"}'] == "1.0"
    assert lines['tandem_reward_requests_total{route="/readyz",status="503"}'] == "1.0"
    assert lines['tandem_reward_requests_total{route="other",status="404"}'] == "1.0"
    assert lines['tandem_reward_items_total{code="ok",scorer="proxy"}'] == "1.0"
    assert lines['tandem_reward_version_info{scorer="both",version="cccc"}'] == "1.0"
    assert lines["tandem_reward_queued_items"] == "0.0"
    assert "secret" not in text


def test_security_no_text_in_logs(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes wrong, the text of a prompt or completion is in no record of any logger."""
    secret = "xylophone-secret"

    def breaks(given: list[ScoringItem]) -> list[Score]:
        raise ValueError(f"cannot score {secret}")  # ours, with the text in it

    server = Server(encoder, breaks)
    with caplog.at_level(logging.DEBUG):
        answers = server.run(
            ("/v1/rewards", items({"text": secret})),
            ("/v1/rewards", {"items": [{"text": secret, "oops": secret}]}),
            ("/classify", {"input": [secret, 5]}),
            ("/get_reward", {"query": [secret], "prompts": [secret, secret]}),
            ("/v1/rewards", f'{{"items": "{secret}'.encode()),
        )
    assert [a.status_code for a in answers] == [500, 400, 400, 400, 400]
    assert answers[0].json()["error"] == {"code": "internal", "message": "the service failed on this request"}
    assert secret not in caplog.text
    assert "ValueError at " in caplog.text
    assert all(secret not in json.dumps(a.json()) for a in answers)


# ---- scores that no answer can carry


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_a_score_that_is_no_number_costs_its_own_item(encoder: Encoder, number: float) -> None:
    def odd(given: list[ScoringItem]) -> list[Score]:
        return [Score(number, raw=1.0) if len(item.token_ids) > 3 else Score(1.0, raw=1.0) for item in given]

    answer = Server(encoder, odd).post("/v1/rewards", items({"text": "a"}, {"text": "a b c d e"}, {"text": "b"}))
    assert answer.status_code == 200
    assert [item.get("code", item.get("reward")) for item in answer.json()["items"]] == [1.0, "non_finite", 1.0]


def test_a_score_beyond_float32_is_no_base64(encoder: Encoder) -> None:
    server = Server(encoder, lambda given: [Score(1e300, raw=1e300) for _ in given])
    plain = server.post("/pooling", {"input": "a"})
    assert plain.json()["data"][0]["data"] == [1e300]
    packed = server.post("/pooling", {"input": "a", "encoding_format": "base64"})
    assert (packed.status_code, packed.json()["error"]["code"]) == (422, "non_finite")


def test_a_model_that_is_no_name_is_not_the_first_one(encoder: Encoder) -> None:
    assert Server(encoder).post("/get_reward", {"query": "a", "model": 5}).status_code == 400
