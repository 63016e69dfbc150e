"""Scores over HTTP for programs that are no Ray actors, with the retries of `reward_service.client`."""

import threading
import time
from typing import Any

import requests

from contracts.records import Score
from reward_service.client import Reply, wished_pause_s, with_retries

RETRIED = (408, 429)  # and every 5xx


class HttpClient:
    """Native protocol of the reward service. May be shared by threads."""

    def __init__(self, url: str, token: str | None = None, budget_s: float = 120.0, request_items: int = 64):
        self.url = url.rstrip("/")
        self.budget_s = budget_s
        self.request_items = request_items
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._local = threading.local()

    def score(self, items: list[dict[str, Any]], model: str | None = None, version: str | None = None) -> list[Score]:
        """Scores of items as `/v1/rewards` takes them, in order. After the budget, an item carries its last error.

        Raises:
            LookupError: there is no such model, or not in this version (404, 410).
            PermissionError: the token is not accepted (401).
            ValueError: the request itself is refused (400, 413), with the service's reason.
        """

        def attempt(rows: list[int], left_s: float) -> Reply:
            replies = []
            end = time.monotonic() + left_s
            for start in range(0, len(rows), self.request_items):
                part = [items[r] for r in rows[start : start + self.request_items]]
                replies.append(self._request(part, model, version, max(0.1, end - time.monotonic())))
            scores = [score for reply in replies for score in reply.scores]
            return Reply(scores, max(reply.retry_after_s for reply in replies))

        return with_retries(len(items), attempt, self.budget_s)

    def models(self) -> list[dict[str, Any]]:
        """The scorers with their versions and the hash of their tokenizer, as `/v1/models` has them.

        Raises:
            requests.RequestException: where the service cannot be reached or does not accept the token.
        """
        answer = self._session.get(f"{self.url}/v1/models", headers=self._headers, timeout=10)
        answer.raise_for_status()
        return answer.json()["data"]

    def _request(self, items: list[dict[str, Any]], model: str | None, version: str | None, left_s: float) -> Reply:
        body: dict[str, Any] = {"items": items, "deadline_ms": left_s * 1000}
        body |= {name: value for name, value in (("model", model), ("version", version)) if value is not None}
        try:
            answer = self._session.post(
                f"{self.url}/v1/rewards", json=body, headers=self._headers, timeout=(min(5.0, left_s), left_s + 5)
            )
            content = answer.json()
        except requests.RequestException as fault:  # refused, reset, late, or no JSON: another attempt may get through
            return _failed(items, f"unavailable: {type(fault).__name__}")
        if answer.status_code == 200:
            scores = [_score(item, content.get("version")) for item in content.get("items", [])]
            if len(scores) != len(items):
                return _failed(items, f"unavailable: {len(scores)} scores for {len(items)} items")
            return Reply(scores)
        error = content.get("error", {}) if isinstance(content, dict) else {}
        if answer.status_code in RETRIED or answer.status_code >= 500:
            code = error.get("code", "unavailable")
            return _failed(
                items,
                f"unavailable: HTTP {answer.status_code} {code}",
                wished_pause_s(answer.headers.get("Retry-After", "")),
            )
        kinds: dict[int, type[Exception]] = {401: PermissionError, 404: LookupError, 410: LookupError}
        raise kinds.get(answer.status_code, ValueError)(
            f"HTTP {answer.status_code}: {error.get('message', 'no reason')}"
        )

    @property
    def _session(self) -> requests.Session:
        """One a thread: sessions are not safe to share, and reuse connections."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        return self._local.session


def _failed(items: list[dict[str, Any]], error: str, retry_after_s: float = 0.0) -> Reply:
    return Reply([Score(None, error)] * len(items), retry_after_s)


def _score(item: dict[str, Any], version: str | None) -> Score:
    if item.get("status") != "ok":
        detail = f": {item['detail']}" if "detail" in item else ""
        return Score(None, f"{item.get('code', 'unavailable')}{detail}", version=version)
    scored = (item["reward"], None, item["raw"], version, item.get("spread"), item["cached"], item["truncated"])
    return Score(*scored, parts=item.get("parts"))
