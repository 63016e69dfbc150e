"""What an environment may answer, the ones that are shipped, and the rehearsal before training starts."""

import copy
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from transformers import AutoTokenizer

from actors.environment import SingleTurn, TwoTurn, environment_maker
from contracts.checks.overrides import unknown_overrides
from contracts.checks.validation import ConfigError, validate
from contracts.config import EnvironmentConfig, TandemConfig
from contracts.environments import EnvironmentFault, Step, checked_ids, checked_step, is_import_path
from contracts.records import Prompt
from controller.start_checks.rehearsal import rehearse
from tests.conftest import ROOT, SMOLLM, make_config
from tests.unit.test_conf import composed

EOS = 2
VOCAB = 512
PROMPTS = [Prompt(i, "", (5, 6, 7 + i)) for i in range(6)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SMOLLM)


# ---- what an environment may answer


@pytest.mark.parametrize("ids", [[0, 511], (3,), np.array([4, 5], dtype=np.int64), range(3), []])
def test_token_ids_become_plain_integers(ids: Any) -> None:
    found = checked_ids(ids, VOCAB, "x")
    assert found == [int(token) for token in ids]
    assert all(type(token) is int for token in found)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, 512], "token 512, which is out of vocabulary: the model has tokens 0 to 511"),
        ([-1], "token -1, which is out of vocabulary"),
        (np.array([2**40]), f"token {2**40}, which is out of vocabulary"),
        ([1.0], "must hold integers; found 1.0 (float)"),
        ([True], "must hold integers; found True (bool)"),
        (["a"], "must hold integers; found 'a' (str)"),
        ("text", "must be a sequence of token ids; found 'text' (str)"),
        (None, "must be a sequence of token ids; found None (NoneType)"),
        (7, "must be a sequence of token ids; found 7 (int)"),
    ],
)
def test_other_token_ids_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(EnvironmentFault, match=re.escape(message)):
        checked_ids(ids, VOCAB, "x")


def test_a_step_becomes_plain_values() -> None:
    found = checked_step(Step(np.array([3]), np.float32(0.5), np.True_), VOCAB)
    assert found == Step([3], 0.5, True)
    assert (type(found.reward), type(found.done)) == (float, bool)
    assert checked_step(Step((), None, False), VOCAB) == Step([], None, False)
    assert checked_step(Step((), 1, False), VOCAB).reward == 1.0


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (([], 0.0, True), "step() must return a contracts.environments.Step; found"),
        (Step([512], 0.0, False), "the observation of step() holds token 512"),
        (Step([], math.nan, True), "must be finite; found nan"),
        (Step([], -math.inf, True), "must be finite; found -inf"),
        (Step([], "1", True), "must be a number or None; found '1' (str)"),  # type: ignore[arg-type]
        (Step([], [1.0], True), "must be a number or None; found [1.0] (list)"),  # type: ignore[arg-type]
        (Step([], None, 1), "`done` of step() must be true or false; found 1 (int)"),  # type: ignore[arg-type]
    ],
)
def test_other_steps_are_refused(step: Any, message: str) -> None:
    with pytest.raises(EnvironmentFault, match=re.escape(message)):
        checked_step(step, VOCAB)


def test_import_paths() -> None:
    assert all(is_import_path(path) for path in ("a:B", "a.b.c:D_1"))
    assert not any(is_import_path(path) for path in ("a", "a:", ":B", "a.b", "a/b:C", "a:B.c", "two_turn", "a b:C"))


# ---- the shipped ones


def test_single_turn_is_one_step() -> None:
    assert SingleTurn().reset(PROMPTS[1]) == (5, 6, 8)
    assert SingleTurn().step([4, EOS]) == Step((), None, True)


def test_two_turn_tells_its_line_once(tokenizer: Any) -> None:
    environment = TwoTurn(tokenizer, follow_up="And now shorter.")
    assert environment.reset(PROMPTS[0]) == (5, 6, 7)
    first, second = environment.step([30, EOS]), environment.step([31])
    assert (first.reward, first.done) == (0.0, False)
    assert tokenizer.decode(first.observation) == "\nAnd now shorter.\n"
    assert second == Step((), None, True)
    environment.reset(PROMPTS[1])
    assert not environment.step([30]).done
    assert TwoTurn(tokenizer, score_first=True).step([30]).reward is None


def test_two_turn_speaks_in_the_chat_template(tokenizer: Any) -> None:
    """Prompt, answer with its EOS and observation are what the template itself writes for the conversation."""
    turns = [{"role": "user", "content": "Hello."}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    turns += [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Shorter, please."}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    answer = tokenizer("Hi.", add_special_tokens=False)["input_ids"]
    for said in ([*answer, EOS], answer):  # an answer that was cut off is ended for it
        environment = TwoTurn(tokenizer, "Shorter, please.", chat=True)
        environment.reset(PROMPTS[0])
        told = list(environment.step(said).observation)
        assert prompt + tokenizer.decode([*said, *told]) == whole
    environment.reset(PROMPTS[0])
    assert (
        list(environment.step([*answer, 0]).observation) == told
    )  # as one that ended otherwise, told of the cut-off one


class SharedSettings:
    """As transformers' fast tokenizers: what a call asks for is a setting of the object."""

    def __call__(self, text: str, limit: int | None = None) -> str:
        return self._encode_plus(text, limit)

    def _encode_plus(self, text: str, limit: int | None) -> str:
        self.limit = limit
        time.sleep(1e-4)
        return text[: self.limit]


class Keeps(SingleTurn):
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


def test_what_one_conversation_asks_of_the_tokenizer_changes_nothing_of_another() -> None:
    shared = SharedSettings()
    make = environment_maker(EnvironmentConfig(name=f"{__name__}:Keeps"), lambda: shared)
    both: list[Any] = [make(), make()]
    with ThreadPoolExecutor(2) as threads:
        found = [
            threads.submit(one.tokenizer, "abcdef", limit)
            for _ in range(100)
            for one, limit in zip(both, (None, 3), strict=True)
        ]
    assert [one.result() for one in found] == ["abcdef", "abc"] * 100
    assert copy.deepcopy(both[0].tokenizer)("abcdef", 2) == "ab"


def test_an_import_path_leads_to_a_class(tokenizer: Any) -> None:
    config = EnvironmentConfig(name="actors.environment:TwoTurn", options={"follow_up": "x"})
    first, second = (environment_maker(config, lambda: tokenizer)() for _ in range(2))
    assert isinstance(first, TwoTurn)
    assert first is not second
    assert isinstance(environment_maker(EnvironmentConfig(), lambda: pytest.fail("needs no tokenizer"))(), SingleTurn)
    for name in ("no.such.module:Class", "actors.environment:Nothing"):
        with pytest.raises(EnvironmentFault, match=f"{name} cannot be imported"):
            environment_maker(EnvironmentConfig(name=name), lambda: tokenizer)


# ---- configuration


def test_both_configurations_of_the_group_are_valid() -> None:
    config = composed(["environment=two_turn", "data.chat=true"])
    assert config.environment.options == {
        "follow_up": "Say it again, better.",
        "chat": True,
        "score_first": False,
    }
    validate(config)
    assert composed(["environment=single_turn", "run_dir=x"]) == composed(["run_dir=x"])
    assert composed([]).environment == EnvironmentConfig()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["environment.name=two_tern"], "environment.name must be one of single_turn, two_turn, or the import path"),
        (["environment.name=two_tern"], "found two_tern; write two_turn"),
        (["environment.name=games"], "found games; write for example my_package.games:Guess"),
        (["+environment.options.size=9"], "environment.options must be empty with environment.name single_turn"),
        (
            ["environment=two_turn", "environment.options.chat=true"],
            "environment.options.chat must be data.chat (False)",
        ),
        (["environment.min_turn_tokens=-1"], "environment.min_turn_tokens must be 0 or more; found -1"),
        (
            ["environment=two_turn", "environment.min_turn_tokens=24"],
            "environment.min_turn_tokens must be below the longest turn (24); found 24; write 23 or less",
        ),
        (
            ["environment.min_turn_tokens=48", "evaluate.sampling.max_completion_tokens=32"],
            "environment.min_turn_tokens must be below the longest turn (32); found 48; write 31 or less",
        ),
        (["environment.max_turn_tokens=0"], "environment.max_turn_tokens must be null or at least 1; found 0"),
        (
            ["environment.reward=separate", "ppo.estimator=grpo", "ppo.samples_per_prompt=4"],
            "environment.reward must be cumulative or per_turn with ppo.estimator grpo",
        ),
        (
            ["environment.reward=separate", "ppo.sampling.min_completion_tokens=4"],
            "ppo.sampling.min_completion_tokens must be 0 with environment.reward separate: it counts from the start of a "
            "conversation; found 4; write environment.min_turn_tokens, which counts from the start of every turn",
        ),
        (["environment.reward=sum"], "environment.reward must be one of cumulative, per_turn, separate; found sum"),
    ],
)
def test_conflicts_are_named(overrides: list[str], message: str) -> None:
    assert unknown_overrides(overrides) == []
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(composed(overrides))


# ---- the rehearsal


@pytest.fixture
def config(small_vocab: Path, tmp_path: Path) -> TandemConfig:
    """512 tokens; 12 for a completion, 4 for a turn, 512 for the engine."""
    config = make_config(small_vocab, tmp_path)
    config.environment.max_turn_tokens = 4
    config.data.max_prompt_tokens = 20
    return config


class Scripted:
    """Ends after `turns` turns; subclasses are wrong in one thing each."""

    turns = 2

    def __init__(self, tokenizer: Any, note: int = 0):
        self.note, self.said = note, 0

    def reset(self, prompt: Prompt) -> Any:
        return prompt.token_ids

    def step(self, token_ids: list[int]) -> Any:
        assert all(0 <= token < VOCAB for token in token_ids)
        self.said += 1
        return Step([9, 10], 1.0, self.said == self.turns)


class OutOfVocabulary(Scripted):
    def step(self, token_ids: list[int]) -> Any:
        return Step([512512], None, False)  # the tiny models know 512 or 49152 tokens


class OutOfVocabularyAtTheEnd(Scripted):
    """The last observation is dropped, and yet it says that something is wrong."""

    def step(self, token_ids: list[int]) -> Any:
        return Step([VOCAB], None, True)


class BadReset(Scripted):
    def reset(self, prompt: Prompt) -> Any:
        return [*prompt.token_ids, 99999]


class EmptyReset(Scripted):
    def reset(self, prompt: Prompt) -> Any:
        return []


class LongReset(Scripted):
    def reset(self, prompt: Prompt) -> Any:
        return [4] * 21


class EndlessReset(Scripted):
    def reset(self, prompt: Prompt) -> Any:
        return [4] * 505


class TextObservation(Scripted):
    def step(self, token_ids: list[int]) -> Any:
        return Step("hello", None, False)  # type: ignore[arg-type]


class NanReward(Scripted):
    def step(self, token_ids: list[int]) -> Any:
        return Step([], math.nan, True)


class Endless(Scripted):
    turns = 1000


class SevenTurns(Scripted):
    """Seven turns of an EOS and two observed tokens each are too many for 12 tokens."""

    turns = 7


class Crashes(Scripted):
    def step(self, token_ids: list[int]) -> Any:
        raise KeyError("answer")


class Exits(Scripted):
    def step(self, token_ids: list[int]) -> Any:
        raise SystemExit("usage: tool \ud83d")


class FirstWord(Scripted):
    """Knows no answer without one."""

    def step(self, token_ids: list[int]) -> Any:
        _ = next(token for token in token_ids if token not in (0, EOS))
        return super().step(token_ids)


class Hangs(Scripted):
    def step(self, token_ids: list[int]) -> Any:
        time.sleep(5)
        return Step([], None, True)


class WrongArguments:
    def __init__(self) -> None: ...


def rehearsal(config: TandemConfig, tokenizer: Any, kind: type, deadline_s: float = 60.0, **options: Any) -> None:
    config.environment.name = f"{__name__}:{kind.__name__}"
    config.environment.options = options
    rehearse(config, tokenizer, {"ppo.sampling": PROMPTS}, set(), deadline_s)


def test_a_sound_environment_passes(config: TandemConfig, tokenizer: Any) -> None:
    rehearsal(config, tokenizer, Scripted, note=3)
    config.environment.name, config.environment.options = "two_turn", {}
    config.ppo.sampling.max_completion_tokens = 20
    config.model.path = str(SMOLLM)  # its observation has tokens beyond the tiny model's 512
    rehearse(config, tokenizer, {"ppo.sampling": PROMPTS, "evaluate.sampling": []}, set())
    config.environment.name = "single_turn"
    config.model.path = "no/such/model"  # nothing is loaded for what cannot go wrong
    rehearse(config, None, {"ppo.sampling": PROMPTS}, set())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OutOfVocabulary, "the observation of step() holds token 512512, which is out of vocabulary"),
        (OutOfVocabularyAtTheEnd, "the observation of step() holds token 512, which is out of vocabulary"),
        (BadReset, "reset() holds token 99999, which is out of vocabulary: the model has tokens 0 to 511"),
        (EmptyReset, "reset() must return at least one token"),
        (LongReset, "at most data.max_prompt_tokens (20) tokens"),
        (EndlessReset, "with 12 to sample they exceed engine.max_model_len (512)"),
        (TextObservation, "the observation of step() must be a sequence of token ids; found 'hello' (str)"),
        (NanReward, "the reward of step() must be finite; found nan"),
        (Endless, "a conversation must end within ppo.sampling.max_completion_tokens (12)"),
        (SevenTurns, "write a larger ppo.sampling.max_completion_tokens, a smaller environment.max_turn_tokens"),
        (Crashes, "KeyError: 'answer'"),
        (Exits, "SystemExit: usage: tool ?"),
        (FirstWord, "StopIteration"),
        (WrongArguments, "TypeError"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_faults_end_the_start_with_their_reason(config: TandemConfig, tokenizer: Any, kind: type, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        rehearsal(config, tokenizer, kind)
    assert f"environment.name={__name__}:{kind.__name__}: " in str(raised.value)


class Lengths(Scripted):
    """Remembers how long turns were."""

    found: ClassVar[set[int]] = set()

    def step(self, token_ids: list[int]) -> Any:
        self.found.add(len(token_ids))
        return super().step(token_ids)


@pytest.mark.parametrize(("least", "shortest"), [(0, 1), (2, 3), (3, 4)])
def test_turns_are_as_short_as_they_may_be(config: TandemConfig, tokenizer: Any, least: int, shortest: int) -> None:
    """The EOS alone, or `least` tokens and an EOS."""
    config.environment.min_turn_tokens = least
    Lengths.found.clear()
    rehearsal(config, tokenizer, Lengths)
    assert (min(Lengths.found), max(Lengths.found)) == (shortest, 4)


def test_options_that_the_environment_does_not_have(config: TandemConfig, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="unexpected keyword argument 'sise'"):
        rehearsal(config, tokenizer, Scripted, sise=3)


class Listens(Scripted):
    """Remembers what turns ended with that are an EOS alone."""

    ended: ClassVar[set[int]] = set()

    def step(self, token_ids: list[int]) -> Any:
        if len(token_ids) == 1:
            self.ended.add(token_ids[-1])
        return super().step(token_ids)


@pytest.mark.parametrize(("in_chat", "expected"), [(set(), {0}), ({"prompts"}, {0, 2}), ({"eval_prompts"}, {0})])
@pytest.mark.parametrize("chat", [True, False])
def test_turns_end_as_those_of_their_source_do(
    config: TandemConfig, in_chat: set[str], expected: set[int], chat: bool, tmp_path: Path
) -> None:
    """Text ends with 0, and what the chat template writes with 2 too; `data.chat` is not what says so."""
    shutil.copytree(config.model.path, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    config.model.path, config.data.chat = str(tmp_path / "model"), chat
    config.environment.name = f"{__name__}:Listens"
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    tokenizer.eos_token = "<|endoftext|>"
    Listens.ended.clear()
    rehearse(config, tokenizer, {"ppo.sampling": PROMPTS}, in_chat)
    assert Listens.ended == expected


def test_two_turn_with_too_little_room_says_what_to_write(config: TandemConfig, tokenizer: Any) -> None:
    config.environment.name, config.environment.max_turn_tokens = "two_turn", None
    config.model.path = str(SMOLLM)
    with pytest.raises(ConfigError, match=r"found no end after 1 turns of up to 12 tokens"):
        rehearse(config, tokenizer, {"ppo.sampling": PROMPTS}, set())


def test_an_environment_that_hangs_does_not_hang_the_start(config: TandemConfig, tokenizer: Any) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match="the rehearsal has not ended after 0 s"):
        rehearsal(config, tokenizer, Hangs, deadline_s=0.3)
    assert time.monotonic() - start < 3


# ---- the documentation


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The example of docs/environments.md, as the file that the text tells to write."""
    text = (ROOT / "docs/environments.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_environments.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda **options: EnvironmentConfig(name="my_environments:Echo", options=options)


def test_the_documented_example_runs(example: Callable[..., Any], config: TandemConfig, tokenizer: Any) -> None:
    environment = environment_maker(example(tries=2), lambda: tokenizer)()
    prompt = Prompt(0, "", tuple(tokenizer("the cat")["input_ids"]))
    assert environment.reset(prompt) == prompt.token_ids
    wrong, right = tokenizer("a dog")["input_ids"], [*tokenizer("the cat")["input_ids"], EOS]
    first = environment.step(wrong)
    assert (first.reward, first.done) == (0.0, False)
    assert tokenizer.decode(list(first.observation)) == "\nNo. Again:"
    assert environment.step(right) == Step([], 1.0, True)
    environment.reset(prompt)
    environment.step(wrong)
    last = environment.step(wrong)
    assert (last.reward, last.done) == (0.0, True)
    config.environment, config.model.path = example(tries=2), str(SMOLLM)
    config.environment.max_turn_tokens, config.ppo.sampling.max_completion_tokens = 4, 24
    rehearse(config, tokenizer, {"ppo.sampling": PROMPTS}, set())


def test_the_documented_commands_are_valid() -> None:
    text = (ROOT / "docs/environments.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "train.py" in line]
    assert len(lines) >= 2
    import shlex

    for line in lines:
        overrides = shlex.split(line, comments=True)[2:]
        assert unknown_overrides(overrides) == []
        validate(composed(overrides))
