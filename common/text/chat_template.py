"""What a chat template writes around an answer, found out from the template itself.

    <|im_start|>user\\nName a prime.<|im_end|>\\n <|im_start|>assistant\\n   Seven.<|im_end|>   \\n
    └──────────────── prompt: up to here the policy is shown ───────────┘ └─ sampled ─┘└ layout

Nothing is assumed of it: not that turns end in the tokenizer's EOS (base Qwen, Gemma and Phi-3 have another token), not that
it has a generation prompt, not that it shows earlier answers as they were given (Qwen3 and DeepSeek-R1 drop their thinking).
"""

import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache, partial
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from common.text.template_turns import turn_starts
from contracts.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Turn = dict[
    str, Any
]  # {"role": ..., "content": ...} and what else the template knows: tool_calls, reasoning_content, ...
Turns = list[Turn]


MAX_RENDERED_TURNS = 1_000_000  # of one conversation, a few seconds
SAID = (
    "\ue000"  # a character that no template writes; Python writes it otherwise, where a template has it print an object
)
MARK = f"call{secrets.token_hex(16)}n"  # begins what stands for a call; unknown to whoever writes messages


class DataError(ValueError):
    """A message for the user: the rule, the value found and what to write instead."""


class LeftOut(DataError):
    """One row cannot be used. `bad` rows count against `data.max_bad_rows`; the others are merely unsuitable."""

    def __init__(self, reason: str, detail: str = "", bad: bool = True) -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.bad = reason, bad


class Calls(NamedTuple):
    """How a template takes tool calls."""

    end: str | None = None  # the token that ends an answer with them
    as_text: bool = False  # arguments are JSON in a text; else an object
    null_content: bool = False  # of an answer without a text; else ""
    marked: str = "name"  # the part of a call that is sure to be shown


class Form(NamedTuple):
    """How a template frames an answer."""

    opening: str  # the answer's header, of a template that writes no generation prompt itself; else ""
    ends: tuple[str, ...]  # tokens that end an answer, one with tool calls included
    calls: Calls


def template_name(tokenizer: "Tokenizer") -> str:
    return f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"


def render(tokenizer: "Tokenizer", turns: Turns, tools: list | None = None, ask: bool = False) -> str:
    """What the template writes for `turns`; with `ask` and its generation prompt after them.

    Raises:
        DataError: without a chat template.
        LeftOut: where the template refuses these turns.
    """
    if not tokenizer.chat_template:
        raise DataError("data.chat: the tokenizer has no chat template; write data.chat: false and plain text columns")
    import jinja2

    try:
        shown = tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=False, add_generation_prompt=ask, strftime_now=_day(tokenizer).strftime
        )
    # A template reads what it likes of a row: what is of another type there fails as Python does.
    except (jinja2.exceptions.TemplateError, TypeError, AttributeError, ValueError, KeyError) as error:
        raise LeftOut("refused by the chat template", str(error)) from None
    return str(shown)


def _day(tokenizer: "Tokenizer") -> date:
    return date.fromisoformat(tokenizer.init_kwargs.get("template_date", ModelConfig.template_date))


def template_form(tokenizer: "Tokenizer") -> Form:
    """How the tokenizer's template frames an answer.

    Raises:
        DataError: where it ends an answer with no token of its own, so that sampling could not stop.
    """
    return _form(tokenizer, repr(tokenizer.chat_template), tokenizer.eos_token)


@lru_cache(8)
def _form(tokenizer: "Tokenizer", template: str, eos: str) -> Form:
    ask: Turns = [{"role": "user", "content": "-"}]
    try:
        whole = render(tokenizer, [*ask, {"role": "assistant", "content": SAID}])
    except LeftOut:  # some want a system's turn
        ask = [{"role": "system", "content": "-"}, *ask]
        whole = render(tokenizer, [*ask, {"role": "assistant", "content": SAID}])
    head, answer, tail = whole.partition(SAID)
    end = first_of(tail, _controls(tokenizer))
    if not answer or end is None:
        raise DataError(
            f"data.chat: {template_name(tokenizer)} must end an answer with a token of its own, so that sampling can stop; "
            f"it writes {whole.replace(SAID, 'ANSWER')!r}. Give another template, or write data.chat: false"
        )
    plain, prompt = render(tokenizer, ask), render(tokenizer, ask, ask=True)
    # Spaces before an answer are a part of its first token, as "▁Seven" or "ĠSeven".
    opening = head[len(prompt) :].rstrip(" ") if prompt == plain and head.startswith(prompt) else ""
    calls = _calls(tokenizer, ask, prompt, end)
    return Form(opening, (end,) if calls.end in (None, end) else (end, str(calls.end)), calls)


def _calls(tokenizer: "Tokenizer", ask: Turns, prompt: str, end: str) -> Calls:
    """How the template takes calls: the first form of these in which it shows them.

    Most write arguments as JSON themselves; DeepSeek's join them with texts, and its first ones show calls only where the
    content is null.
    """
    for marked, as_text, null_content in product(("arguments", "name"), (False, True), (False, True)):
        form = Calls(None, as_text, null_content, marked)
        tails = [found for count in (2, 1) if (found := _behind_calls(tokenizer, ask, prompt, form, count))]
        if tails:
            return form._replace(end=next(filter(None, (_end_of_calls(tokenizer, *each, end) for each in tails)), None))
    return Calls()


def _behind_calls(tokenizer: "Tokenizer", ask: Turns, prompt: str, form: Calls, count: int) -> tuple[str, str] | None:
    """What the template writes of an answer of `count` calls, up to the marked part of the last one and behind it; None
    where it does not show that."""
    given = {"arguments": {"a": "-", "b": "-"}, "name": "-"}
    calls = []
    for number in range(count):
        mark = f"{SAID}{number}"
        function = given | {form.marked: mark if form.marked == "name" else {"a": mark, "b": mark}}
        calls.append({"id": f"call0000{number}", "type": "function", "function": function})
    turn = prepared({"role": "assistant", "content": "", "tool_calls": calls}, [], form)
    try:
        whole = render(tokenizer, [*ask, turn])
    except LeftOut:
        return None
    said, shown, tail = whole.rpartition(f"{SAID}{count - 1}")
    return (said[_shared(said, prompt) :], tail) if shown else None


def _end_of_calls(tokenizer: "Tokenizer", said: str, tail: str, end: str) -> str | None:
    """The token that ends an answer which calls tools (gpt-oss: `<|call|>`), where `tail` follows what it has `said`.

    Control tokens may stand around the parts of a call and behind it (Ministral 3: `[ARGS]`, Gemma 4: quotes): where the
    `end` of other answers follows, that ends it, else the first one that has not stood in the answer before.
    """
    return end if end in tail else first_of(tail, [token for token in _controls(tokenizer) if token not in said])


def _controls(tokenizer: "Tokenizer") -> list[str]:
    """The tokenizer's control tokens."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def note_spelled(tokenizer: "Tokenizer", texts: Iterable[str], notes: "Notes | None") -> None:
    """Note the first control token that one row's texts spell."""
    if notes is not None and (found := next(filter(None, map(_any_control(tokenizer).search, texts)), None)):
        notes.spelled[found[0]] += 1


@lru_cache(8)
def _any_control(tokenizer: "Tokenizer") -> re.Pattern[str]:
    tokens = sorted(filter(None, _controls(tokenizer)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def first_of(text: str, tokens: list[str]) -> str | None:
    """The one of `tokens` that stands first in `text`; of several in one place the longest."""
    found = [(text.find(token), -len(token), token) for token in tokens if token and token in text]
    return min(found)[2] if found else None


def _shared(first: str, second: str) -> int:
    """How many characters both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


class Shown(NamedTuple):
    """A rendered conversation."""

    text: str  # up to the end of the last answer, without the layout behind it; or up to where an answer is to begin
    answers: list[tuple[int, int]]  # offsets of those that may train and of the last one, from prompt to end token
    rewritten: int  # answers that may train but are shown otherwise than they were given


def show(tokenizer: "Tokenizer", turns: Turns, tools: list | None, learnt: list[bool]) -> Shown:
    """Render a conversation and find the answers in it.

    An answer is where the template, asked for it, would let it begin, and ends with its end token. An earlier one counts
    only if it is shown as it was given. A template that writes turn by turn (common/text/template_turns.py) is rendered
    three times, however many turns; another one twice, and twice more up to each earlier answer.

    Args:
        learnt: of each turn, whether it may train.

    Raises:
        LeftOut: where the template prompts for the last answer otherwise than it writes it, drops a part of it
            (DeepSeek-R1's: thinking), ends it not at all or before its last call, or would have to write more than
            `MAX_RENDERED_TURNS`.
    """
    opening, ends, _ = template_form(tokenizer)

    def prompt(count: int) -> str:
        return render(tokenizer, turns[:count], tools, ask=True) + opening

    last = len(turns) - 1
    if turns[last]["role"] != "assistant":
        return Shown(prompt(len(turns)), [], 0)
    whole = render(tokenizer, turns, tools)
    asked = prompt(last)
    if not whole.startswith(asked):
        start = max(0, _shared(whole, asked) - 40)
        raise LeftOut(
            f"{template_name(tokenizer)} prompts for an answer otherwise than it writes it",
            f"the prompt is ...{asked[start:]!r}, with the answer it is ...{whole[start:]!r}; give answers the form that "
            "the prompt opens, or another template",
        )
    stop = _end_of(whole, len(asked), ends)
    if stop is None:
        raise LeftOut(
            f"{template_name(tokenizer)} does not end an answer where it is over",
            f"sampling stops at {' and '.join(ends)}, and it writes {whole[len(asked) :]!r:.160}; give another template, or "
            "calls in turns of their own",
        )
    if not _says(whole[:stop], len(asked), turns[last]["content"]):
        raise LeftOut(
            f"{template_name(tokenizer)} does not show an answer as it was given",
            f"of {turns[last]['content']!r:.80} it writes {whole[len(asked) : stop]!r:.80}; leave out of answers what it "
            "drops, as the thinking before </think>, or give another template",
        )
    earlier = [i for i in range(last) if turns[i]["role"] == "assistant" and learnt[i]]
    starts = turn_starts(tokenizer, turns, tools, _day(tokenizer).strftime, whole) if len(earlier) > 1 else {}
    others = [i for i in earlier if i not in starts]
    if (count := sum(2 * i + 1 for i in others)) > MAX_RENDERED_TURNS:
        raise LeftOut(
            "too many answers for its chat template",
            f"{template_name(tokenizer)} writes a turn by what follows it, so each of {len(others)} answers takes "
            f"renderings of its own, {count} turns in all, more than {MAX_RENDERED_TURNS}; divide the conversation, or give "
            "answers the weight 0",
        )
    found = []
    for index in earlier:
        if index in starts:
            at, ask, layout = starts[index], asked[starts[last] :], whole[starts[last + 1] :]
            alone = partial(str, whole[at : starts[index + 1]] + layout)
        else:
            at, ask, alone = 0, prompt(index), partial(render, tokenizer, turns[: index + 1], tools)
        found.append(_kept(asked, at, ask, alone, ends, turns[index]["content"]))
    answers = [place for place in found if place]
    return Shown(whole[:stop], [*answers, (len(asked), stop)], len(found) - len(answers))


def _says(shown: str, start: int, content: str | None) -> bool:
    """Whether a template has written a text in the answer from `start` on: all of it, but for space, which templates trim
    and put in. The prompt may have begun it, as with <think>."""
    said, written = "".join((content or "").split()), "".join(shown.split())
    at = written.rfind(said)
    return not said or (at >= 0 and at + len(said) > len("".join(shown[:start].split())))


def _kept(
    history: str, at: int, prompt: str, alone: Callable[[], str], ends: tuple[str, ...], content: str | None
) -> tuple[int, int] | None:
    """Where an earlier answer stands in `history`, if it stands there as it was given, and as the template writes it when it
    is the last.

    Args:
        prompt: from `at` on, what the policy is shown for this answer.
        alone: from `at` on, the conversation that ends with it.
        content: what was given.
    """
    if not history.startswith(prompt, at):
        return None
    given = alone()
    stop = _end_of(given, len(prompt), ends) if given.startswith(prompt) else None
    if stop is None or not history.startswith(given[:stop], at) or not _says(given[:stop], len(prompt), content):
        return None
    return at + len(prompt), at + stop


def _end_of(text: str, start: int, ends: tuple[str, ...]) -> int | None:
    """Where the answer from `start` on has ended, with nothing but layout behind it in `text`; None where it ends nowhere,
    or goes on to another end, as with a second call."""
    end = first_of(text[start:], list(ends))
    if end is None:
        return None
    stop = text.index(end, start) + len(end)
    *further, _ = re.split("|".join(map(re.escape, ends)), text[stop:])
    return None if any(map(str.strip, further)) else stop


@dataclass
class Notes:
    """What the chat template does with the conversations of one source."""

    template: str = ""
    rewritten: int = 0  # earlier answers that it shows otherwise than they were given; they do not train
    shown: set[str] = field(default_factory=set)  # keys and roles that reach the tokens
    hidden: Counter[str] = field(default_factory=Counter)  # those that do not -> conversations that have them
    spelled: Counter[str] = field(default_factory=Counter)  # control tokens -> rows whose texts spell them

    def lines(self) -> list[str]:
        """For the user; none where everything trains and is shown."""
        found = []
        if self.rewritten:
            found.append(
                f"{self.template} shows {self.rewritten} earlier answers otherwise than they were given; they do not train. "
                "To train on them, give each a row of its own that ends with it"
            )
        if self.spelled:
            tokens = ", ".join(f"{token} ({count} rows)" for token, count in self.spelled.most_common(3))
            found.append(
                f"WARNING: texts spell control tokens, which are encoded as the characters they are made of: {tokens}. "
                "Where a chat template has written these texts already, give messages in its place"
            )
        unseen = [f"{key} ({count} rows)" for key, count in self.hidden.items() if key not in self.shown]
        return [*found, f"{self.template} does not show {', '.join(unseen)}"] if unseen else found


def prepared(turn: Turn, ends: list[str], calls: Calls) -> Turn:
    """A turn as templates expect it. An answer's own end marker goes, as the template writes one."""
    kept = {key: value for key, value in turn.items() if key != "weight"}
    kept["content"] = content = turn.get("content") or ""  # Jinja would write null as "None"
    if turn["role"] == "assistant":
        kept["content"] = next((content.removesuffix(end) for end in ends if content.endswith(end)), content)
    if turn.get("tool_calls"):
        if not isinstance(turn["tool_calls"], list):
            raise LeftOut("tool_calls is no list", f"found {type(turn['tool_calls']).__name__}")
        kept["tool_calls"] = [_call(call, calls.as_text) for call in turn["tool_calls"]]
        kept["content"] = kept["content"] or (None if calls.null_content else "")
    else:  # some templates look for the key alone
        kept.pop("tool_calls", None)
    return kept


def _call(call: Any, as_text: bool) -> Any:
    """OpenAI's arguments are JSON in a text. Most templates write an object as JSON, and would write a text as a string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    given = function["arguments"]
    try:
        value = json.loads(given or "{}") if isinstance(given, str) else given
    except json.JSONDecodeError:
        raise LeftOut("the arguments of a tool call are not JSON", f"found {given[:40]!r}") from None
    if as_text:
        value = given if isinstance(given, str) and given else json.dumps(value or {}, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": value}}


def check_calls(tokenizer: "Tokenizer", turns: Turns, tools: list | None) -> None:
    """One rendering, in which every call is marked.

    Raises:
        LeftOut: where the template leaves out a call, which may be all that an answer is.
    """
    calls = [call for turn in turns for call in turn.get("tool_calls", ())]
    if not calls:
        return
    numbers, form = iter(range(len(calls))), template_form(tokenizer).calls
    marked = [
        turn | {"tool_calls": [_marked(call, f"{MARK}{next(numbers)}n", form) for call in turn["tool_calls"]]}
        if "tool_calls" in turn
        else turn
        for turn in turns
    ]
    try:
        found = {int(number) for number in re.findall(rf"{MARK}(\d+)n", render(tokenizer, marked, tools))}
    except LeftOut:  # for a template that looks at what is called
        return
    if lost := [call for number, call in enumerate(calls) if number not in found]:
        raise LeftOut(
            f"{template_name(tokenizer)} does not show tool_calls",
            f"{len(lost)} of {len(calls)}, the first is {json.dumps(lost[0], default=str)[:80]}; give another template or "
            "leave them out",
        )


def _marked(call: Any, mark: str, form: Calls) -> Any:
    """A call with `mark` in the part that the template is sure to show."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return mark
    given = function.get(form.marked)
    if form.marked == "name" or form.as_text:
        part: Any = f"{given}{mark}"
    else:
        part = {**(given if isinstance(given, dict) else {}), mark: mark}
    function = {**function, form.marked: part}
    return {**call, "function": function} if "function" in call else function


def note_unshown(tokenizer: "Tokenizer", turns: Turns, tools: list | None, notes: Notes | None) -> None:
    """Note the keys of these messages that the template does not show, and the roles; one rendering each, until it has been
    seen."""
    if notes is None:
        return
    keys = (
        {key for turn in turns for key, value in turn.items() if value}
        - {"role", "content", "tool_calls"}
        - notes.shown
    )
    roles = {turn["role"] for turn in turns if turn["content"] and turn["role"] != "assistant"}
    roles = {role for role in roles if _turns_of(role) not in notes.shown}
    is_new = bool(tools) and "tools" not in notes.shown
    if not keys and not roles and not is_new:
        return
    whole = render(tokenizer, turns, tools)
    for role in sorted(roles):
        others = [turn | {"content": "\ue000"} if turn["role"] == role else turn for turn in turns]
        if _needs(tokenizer, whole, others, tools):
            notes.shown.add(_turns_of(role))
        else:
            notes.hidden[_turns_of(role)] += 1
    for key in sorted(keys):
        if _needs(tokenizer, whole, [{k: v for k, v in turn.items() if k != key} for turn in turns], tools):
            notes.shown.add(key)
        else:
            notes.hidden[f"{key} of messages"] += 1
    if is_new:
        if _needs(tokenizer, whole, turns):
            notes.shown.add("tools")
        else:
            notes.hidden["tools"] += 1


def _turns_of(role: str) -> str:
    return f"turns of the role {role}"


def _needs(tokenizer: "Tokenizer", whole: str, turns: Turns, tools: list | None = None) -> bool:
    """Whether the template writes something else than `whole` for turns that lack something, or refuses them."""
    try:
        return render(tokenizer, turns, tools) != whole
    except LeftOut:
        return True
