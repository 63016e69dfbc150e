"""SIGHUP: whatever is in a file, what fails changes nothing and is told, and the service goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contracts.checks.validation import ConfigError
from contracts.config import ClusterConfig, HttpConfig, RewardServiceConfig, ScorerConfig
from reward_service.__main__ import read_config, reload
from reward_service.access import token_digests
from reward_service.app import RewardService
from reward_service.resolve import ScorerError, resolve

TOKEN = "a-token-for-tests-0123456789"
NO_TOKENS = [
    b"",
    b" \n",
    b"\xff\xfe\x00t",
    bytes(range(256)),
    b"short",
    "tökens-of-20-letters".encode(),
    b"a" * (2**20 + 1),
]
TORN = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"version": "1.0"}',
    b'{"a": ' + b"9" * 5000,
]


class Service(RewardService):
    """Up to where Serve comes in; what is left to it works."""

    def __init__(self, tokenizer: Path, **http: Any):
        super().__init__(RewardServiceConfig(http=HttpConfig(**http)), ClusterConfig(), {}, str(tokenizer))
        self.reloads: list[str] = []

    def count_reload(self, result: str) -> None:
        self.reloads.append(result)

    def update(self, scorers: dict[str, ScorerConfig], timeout_s: float) -> None:
        specs = resolve(scorers, self.config, self.tokenizer)
        self._front(specs)
        self._check_tokenizer()
        self.specs = specs


@pytest.fixture
def checkpoint(classifier: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classifier, tmp_path / "checkpoint"))


@pytest.mark.parametrize("content", NO_TOKENS)
def test_a_token_file_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(content)
    overrides = ["reward_service=http", "proxy_model=m", f"reward_service.http.token_file={file}"]
    with pytest.raises(ConfigError, match=r"reward_service\.http\.token_file must be a file with one token"):
        read_config(overrides)
    service = Service(tmp_path)
    said = reload(service, overrides, 1.0)
    assert said.startswith("nothing has changed: ")
    assert "reward_service.http.token_file must be" in said
    assert service.reloads == ["failed"]
    assert service.specs == {}


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("model.revision=12e4567", "model.revision must be a text; found 12e4567, which is read as inf; write"),
        ("cluster=nope", "In 'config': Could not find 'cluster/nope'; write one of laptop, multi_node"),
        ("model.path=${nope}/x", "model.path: Interpolation key 'nope' not found"),
        (
            "+reward_service.scorers={r: {kind: function, timeout_s: 5s}}",
            "+reward_service.scorers.r.timeout_s must be a number; found 5s; write for example 5.0 (the default)",
        ),
        (
            "reward_service.scorers.r.path=m",
            "Could not override 'reward_service.scorers.r.path'; reward_service.scorers.r",
        ),
    ],
)
def test_an_override_that_cannot_be_used_is_refused_with_the_reason(word: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(["reward_service=http", "proxy_model=m", word])
    assert str(caught.value).startswith(text)


def test_tokens_that_have_gone_open_nothing(tmp_path: Path) -> None:
    """Of a file that somebody empties between the check and its use, and of one that is no file."""
    (tmp_path / "tokens").write_text("")
    for path in (tmp_path / "tokens", tmp_path, tmp_path / "none"):
        with pytest.raises((OSError, ValueError)):
            token_digests(str(path))
        service = Service(tmp_path, port=8000, token_file=str(path))
        with pytest.raises(ScorerError, match=r"^reward_service\.http\.token_file="):
            service._front({})


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"])
def test_a_torn_checkpoint_changes_nothing(name: str, checkpoint: Path) -> None:
    service, overrides = Service(checkpoint), ["reward_service=http", f"proxy_model={checkpoint}"]
    assert reload(service, overrides, 1.0).startswith("now serving proxy (")
    before = service.specs
    for content in TORN:
        (checkpoint / name).write_bytes(content)
        said = reload(service, overrides, 1.0)
        assert "\n" not in said
        if name == "tokenizer_config.json" and content == b'{"version": "1.0"}':  # which says nothing of a tokenizer
            before = service.specs
            continue
        assert said.startswith("nothing has changed: "), content
        assert service.specs is before
        assert service.reloads.pop() == "failed"


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_a_file_that_is_half_written_changes_nothing(name: str, checkpoint: Path) -> None:
    service, overrides = Service(checkpoint), ["reward_service=http", f"proxy_model={checkpoint}"]
    whole = (checkpoint / name).read_bytes()
    for cut in (0.1, 0.5, 0.9, 0.999):
        (checkpoint / name).write_bytes(whole[: int(len(whole) * cut)])
        assert reload(service, overrides, 1.0).startswith("nothing has changed: ")
    (checkpoint / name).write_bytes(whole)
    assert reload(service, overrides, 1.0).startswith("now serving proxy (")


class Panic(BaseException):
    """As the panics of libraries in Rust: no Exception."""


@pytest.mark.parametrize(
    "fault", [KeyError("x"), TypeError("x"), MemoryError(), Panic("x"), SystemExit(1), RuntimeError("a\nb")]
)
def test_whatever_is_raised_on_the_way(fault: BaseException, checkpoint: Path) -> None:
    class Failing(Service):
        def update(self, scorers: dict[str, ScorerConfig], timeout_s: float) -> None:
            raise fault

    service = Failing(checkpoint)
    said = reload(service, ["reward_service=http", f"proxy_model={checkpoint}"], 1.0)
    assert said.startswith("nothing has changed: ")
    assert "\n" not in said
    assert service.reloads == ["failed"]


# ---- RewardService.update, with a stand-in for Serve


class Serve:
    """What Serve would run; `broken` applications do not start."""

    def __init__(self) -> None:
        self.run: list[str] = []
        self.deleted: list[str] = []
        self.broken: Callable[[Any], bool] = lambda target: False
        self.failing: set[str] = set()

    def run_many(self, targets: list[Any], wait_for_applications_running: bool) -> None:
        for target in targets:
            self.run.append(target.name)
            (self.failing.add if self.broken(target) else self.failing.discard)(target.name)

    def wait(self, names: set[str], timeout_s: float) -> None:
        if names & self.failing:
            raise RuntimeError("it does not start")


def test_a_front_that_does_not_start_is_taken_back(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reward_service import app

    serve = Serve()
    monkeypatch.setattr(app.serve, "run_many", serve.run_many)
    monkeypatch.setattr(app.serve, "delete", serve.deleted.append)
    monkeypatch.setattr(app.serve, "start", lambda **_: None)
    monkeypatch.setattr(app, "_wait", serve.wait)
    (tmp_path / "rules.py").write_text("def f(**_): return []\ndef g(**_): return []\n")
    scorers = {name: ScorerConfig(kind="function", function=f"{tmp_path}/rules.py:{name}") for name in "fg"}
    service = RewardService(RewardServiceConfig(), ClusterConfig(), {}, str(checkpoint))
    service.start({"f": scorers["f"]})
    first, before = service._served, service.specs
    serve.broken = lambda target: target.name == "reward" and target is not first
    with pytest.raises(RuntimeError, match="it does not start"):
        service.update(scorers, 1.0)
    assert serve.run[-1] == "reward"
    assert serve.failing == set()  # the first front is back
    assert [name.split("-")[1] for name in serve.deleted] == ["g"]
    assert service.specs is before
    serve.broken = lambda target: False
    service.update(scorers, 1.0)
    assert list(service.specs) == ["f", "g"]
