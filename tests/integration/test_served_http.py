"""The service over real HTTP: a real (tiny) model, rule functions in real processes; and what may happen to them."""

import signal
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from common.processes.network_interface import free_port
from contracts.config import ClusterConfig, HttpConfig, RewardServiceConfig
from reward_service.app import RewardService
from reward_service.http_client import HttpClient
from reward_service.resolve import ScorerError
from tests.conftest import SMOLLM
from tests.integration.conftest import TOKEN, replicas

SECRET = "xylophonesecret"  # in texts; must be in no log


@pytest.fixture
def url(reward_service: RewardService) -> str:
    return f"http://127.0.0.1:{reward_service.config.http.port}"


@pytest.fixture
def client(url: str) -> HttpClient:
    return HttpClient(url, TOKEN, budget_s=60)


def post(url: str, path: str, body: Any, token: str | None = TOKEN) -> requests.Response:
    return requests.post(
        url + path, json=body, headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=60
    )


def texts(count: int, seed: str = "") -> list[dict[str, Any]]:
    return [{"id": i, "text": f"{seed} text number {i} with some words"} for i in range(count)]


def test_every_protocol_gives_the_same_score(url: str, client: HttpClient) -> None:
    text = "A warm, funny film"
    native = client.score([{"text": text}])[0]
    assert native.value == pytest.approx((native.raw - 0.5) / 2.0)
    assert post(url, "/get_reward", {"query": [text]}).json()["rewards"] == [native.value]
    assert post(url, "/classify", {"input": text}).json()["data"][0]["probs"] == [native.raw]
    assert post(url, "/pooling", {"input": [text]}).json()["data"][0]["data"] == [native.raw]
    rule = client.score([{"text": text}], "odd")[0]
    both = client.score([{"text": text}], "both")[0]
    assert rule.value == len(text)
    values = [native.value, rule.value]
    assert both.value == pytest.approx(statistics.fmean(values) - 0.5 * statistics.pstdev(values))
    assert both.spread == pytest.approx(statistics.pstdev(values))


def test_models_say_their_versions_and_a_pin_holds(client: HttpClient, reward_service: RewardService) -> None:
    models = client.models()
    assert {m["id"]: m["version"] for m in models} == {
        name: spec.version for name, spec in reward_service.specs.items()
    }
    assert (
        client.score(texts(1), "proxy", reward_service.specs["proxy"].version)[0].version
        == reward_service.specs["proxy"].version
    )
    with pytest.raises(LookupError, match="410: proxy is served in version"):
        client.score(texts(1), "proxy", "0" * 16)
    with pytest.raises(LookupError, match="404"):
        client.score(texts(1), "nobody")


def test_chaos_a_replica_killed_under_load_loses_nothing(client: HttpClient) -> None:
    results: list[list[Any]] = []
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(client.score, texts(4, f"load {n}"), "proxy") for n in range(60)]
        time.sleep(0.3)
        [replica] = replicas("reward-proxy")
        replica.send_signal(signal.SIGKILL)
        results = [call.result(90) for call in calls]
    assert sum(score.value is None for scores in results for score in scores) == 0


def test_chaos_a_function_that_hangs_crashes_or_lies_harms_nobody_else(url: str, client: HttpClient) -> None:
    contents = ["hang", "good", "crash", "nan", "better"]
    start = time.monotonic()
    answer = post(url, "/v1/rewards", {"model": "odd", "items": [{"text": t} for t in contents]}).json()["items"]
    assert time.monotonic() - start < 10
    assert [(i.get("reward"), i.get("code"), i.get("retryable")) for i in answer] == [
        (None, "timeout", True), (4.0, None, None), (None, "poison", False), (None, "non_finite", False),
        (6.0, None, None),
    ]  # fmt: skip
    again = client.score([{"text": "hang"}], "odd")[0]
    assert (again.value, again.code) == (None, "poison")  # after two processes it is tried no more
    wrong = post(url, "/get_reward?model=few", {"query": ["a"]})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "wrong_count")
    assert client.score(texts(1), "proxy")[0].value is not None


def test_limits_are_statuses_and_memory_is_bounded(url: str, client: HttpClient) -> None:
    def memory() -> int:
        return sum(process.memory_info().rss for process in replicas("reward:"))

    before = memory()

    def stream() -> Iterator[bytes]:
        for _ in range(500):  # 500 MiB, and no content-length
            yield b" " * 2**20

    big = post(url, "/v1/rewards", {"items": [{"text": "x" * 2**21}]})
    assert (big.status_code, big.json()["error"]["code"]) == (413, "too_large")
    try:
        endless = requests.post(
            url + "/v1/rewards", data=stream(), headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60
        )
        assert endless.status_code == 413
    except requests.ConnectionError:
        pass  # closed while it was still being sent
    assert post(url, "/v1/rewards", {"items": texts(257)}).status_code == 413

    def flood(n: int) -> requests.Response:
        return post(url, "/v1/rewards", {"items": texts(200, f"flood {n}"), "model": "proxy"})

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(flood, range(32)))
    statuses = {a.status_code for a in answers}
    assert statuses <= {200, 503}
    assert 200 in statuses
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
    assert memory() - before < 300 * 2**20
    assert client.score(texts(1, "after"))[0].value is not None


def test_clients_that_leave_free_their_places_at_once(url: str, client: HttpClient) -> None:
    for n in range(4):
        with suppress(requests.ReadTimeout):
            body = {"items": texts(200, f"left {n} " + "word " * 80)}
            headers = {"Authorization": f"Bearer {TOKEN}"}
            requests.post(url + "/v1/rewards", json=body, headers=headers, timeout=(5, 0.3))
    time.sleep(1)
    text = requests.get(url + "/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["tandem_reward_queued_items"]) == 0
    assert float(values['tandem_reward_requests_total{route="/v1/rewards",status="499"}']) >= 1
    assert client.score(texts(1, "next"))[0].value is not None


def test_idle_connections_shut_nobody_out(url: str, client: HttpClient) -> None:
    port = int(url.rpartition(":")[2])
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(1200)]
    try:
        assert requests.get(url + "/healthz", timeout=5).status_code == 200
        assert client.score(texts(1, "beside them"))[0].value is not None
    finally:
        for connection in idle:
            connection.close()


def test_security_over_the_wire(url: str) -> None:
    assert requests.get(url + "/healthz", timeout=10).status_code == 200
    for path in ("/v1/models", "/readyz", "/metrics", "/docs", "/-/routes", "/nowhere"):
        assert requests.get(url + path, timeout=10).status_code in (401, 404), path
    for path in ("/v1/rewards", "/get_reward", "/classify", "/pooling"):
        for token in (None, "wrong"):
            assert post(url, path, {"items": texts(1), "query": ["a"], "input": "a"}, token).status_code == 401
    with pytest.raises(PermissionError):
        HttpClient(url, "wrong").score(texts(1))
    with_login = url.replace("http://", f"http://any:{TOKEN}@")
    assert requests.post(with_login + "/get_reward", json={"query": ["a film"]}, timeout=10).status_code == 200


def test_security_a_bind_beyond_loopback_needs_a_token(ray_runtime: None) -> None:
    config = RewardServiceConfig(http=HttpConfig(port=free_port(), host="0.0.0.0"))
    service = RewardService(config, ClusterConfig(), {}, str(SMOLLM))
    with pytest.raises(ScorerError, match=r"0\.0\.0\.0 is not served without a token_file"):
        service.start({})


def test_security_no_text_in_any_log(url: str, client: HttpClient) -> None:
    import ray

    folder = Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs"
    marker = f"the {SECRET} of this text"
    client.score([{"text": marker}, {"messages": [{"role": "assistant", "content": marker}]}])
    HttpClient(url, TOKEN, budget_s=3).score([{"text": marker}], "odd")
    post(url, "/v1/rewards", {"items": marker})
    post(url, "/classify", {"input": marker, "truncate_prompt_tokens": marker})
    requests.post(url + "/get_reward", data=marker.encode(), headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)
    time.sleep(1)
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert any("serve" in str(f) for f in files)
    assert [str(f) for f in files if SECRET.encode() in f.read_bytes()] == []
    assert [str(f) for f in files if TOKEN.encode() in f.read_bytes()] == []


def test_metrics_count_what_happened(url: str, client: HttpClient) -> None:
    client.score([{"text": "to be counted"}], "both")
    text = requests.get(url + "/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['tandem_reward_items_total{code="ok",scorer="both"}']) >= 1
    assert float(values['tandem_reward_ensemble_spread_count{scorer="both"}']) >= 1
    assert float(values["tandem_reward_queued_items"]) == 0
