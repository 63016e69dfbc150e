"""What a row says: its prompt, completion and tools, from the columns of our formats and of other people's.

    columns ──Shape──> our columns ──parts, pair_parts──> Parts(prompt, completion, tools)

Every value is checked; one that cannot be used costs its row (LeftOut). Texts stay as they are, with all their spaces.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from common.error_text import error_lines
from common.text.encoding import LeftOut, Turn, Turns, as_turns
from contracts.config import DataConfig, SourceConfig
from controller.data.prompts import first_words

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}
ASKS, ANSWERS = "\n\nHuman:", "\n\nAssistant:"
SPEAKERS = {ASKS: "user", ANSWERS: "assistant"}  # of a transcript as hh-rlhf has it
SPEAKER = re.compile(f"({'|'.join(SPEAKERS)})")
LOOKS_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
# KTO's label says of a completion whether it is a good one; LLaMA-Factory calls it kto_tag.
LABELS = ("label", "kto_tag")
GOOD = {"true", "1", "1.0", "desirable", "chosen"}
BAD = {"false", "0", "0.0", "-1", "-1.0", "undesirable", "rejected"}
SPEAKER_KEYS = ("role", "from")
EQUAL = "chosen equals rejected"
DIFFERENT = "chosen and rejected answer different prompts"


class Parts(NamedTuple):
    prompt: str | Turns  # "" where there is none
    completion: str | Turns
    tools: list | None


@dataclass(frozen=True)
class Shape:
    """Columns of a known data set that stand for ours."""

    columns: tuple[str, ...]
    ours: Callable[[SourceConfig], tuple[str, ...]]
    convert: Callable[[dict, SourceConfig], dict]
    also: tuple[str, ...] = ()  # columns that a prompt is made of too, where they are there

    def fits(self, columns: Iterable[str], source: SourceConfig) -> bool:
        """Also where ours are named as its own, as `prompt_column=instruction`."""
        return set(self.columns) <= set(columns) and not set(self.ours(source)) & set(columns) - set(self.columns)


def _renamed(row: dict, names: dict[str, str]) -> dict:
    """With theirs under our names; a column that is missing in the row stays missing."""
    return {**row, **{ours: row[theirs] for ours, theirs in names.items() if theirs in row}}


def _instructed(row: dict, source: SourceConfig) -> dict:
    """LLaMA-Factory's join of instruction and input, behind the turns of its `history`."""
    asked = row.get("instruction")
    if asked and row.get("input"):
        asked = f"{_text(asked, 'instruction')}\n{_text(row['input'], 'input')}"
    if history := _parsed(row.get("history") or None, "history"):
        if not isinstance(history, list) or not all(isinstance(both, list) and len(both) == 2 for both in history):
            raise LeftOut(
                "history is no list of instructions with their answers",
                f"found {history!r:.40}; write such lists, or give the column another name",
            )
        spoken = zip(("user", "assistant") * len(history), (said for both in history for said in both), strict=True)
        asked = [{"role": role, "content": said} for role, said in [*spoken, ("user", asked)]]
    return {**row, source.prompt_column: asked} if "instruction" in row else row


def _alpaca(row: dict, source: SourceConfig) -> dict:
    return _renamed(_instructed(row, source), {source.completion_column: "output"})


def _sharegpt(row: dict, source: SourceConfig) -> dict:
    return _renamed(row, {source.messages_column: "conversations"})


def _sharegpt_pair(row: dict, source: SourceConfig) -> dict:
    """LLaMA-Factory's: each side is one turn, or its text."""
    sides = dict(zip(pair_columns(source), ("chosen", "rejected"), strict=True))
    renamed = _renamed(row, {source.prompt_column: "conversations", **sides})
    return {**renamed, **{ours: [side] for ours in sides if isinstance(side := renamed.get(ours), dict)}}


def _asked_pair(row: dict, source: SourceConfig) -> dict:
    """Orca's."""
    return _renamed(row, {source.prompt_column: "question"})


def pair_columns(source: SourceConfig) -> tuple[str, str]:
    return source.chosen_column, source.rejected_column


def _comparison(row: dict, source: SourceConfig) -> dict:
    """openai/summarize_from_feedback: `choice` is the number of the better summary."""
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    if isinstance(summaries, dict):  # as `datasets` shows a sequence of structures
        texts = summaries.get("text")
        summaries = [{"text": one} for one in texts] if isinstance(texts, list) else None
    if choice not in (0, 1) or not isinstance(summaries, list) or len(summaries) != 2 or not isinstance(info, dict):
        raise LeftOut("a comparison needs info, two summaries and the choice 0 or 1", f"found choice {choice!r}")
    better, worse = (
        one.get("text") if isinstance(one, dict) else None for one in (summaries[::-1] if choice else summaries)
    )
    asked = info.get("post") or info.get("article")
    return {**row, source.prompt_column: asked, source.chosen_column: better, source.rejected_column: worse}


SHAPES = (
    Shape(("info", "summaries", "choice"), pair_columns, _comparison),
    Shape(("instruction", "chosen", "rejected"), lambda s: (s.prompt_column,), _instructed, ("input", "history")),
    Shape(("question", "chosen", "rejected"), lambda s: (s.prompt_column,), _asked_pair),
    Shape(("instruction", "output"), lambda s: (s.prompt_column, s.completion_column), _alpaca, ("input", "history")),
    Shape(("conversations", "chosen", "rejected"), lambda s: (s.prompt_column,), _sharegpt_pair),
    Shape(("conversations",), lambda s: (s.messages_column,), _sharegpt),
)


def shape_of(columns: Iterable[str], source: SourceConfig) -> Shape | None:
    """The known data set whose columns these are, where they are not ours."""
    return next((shape for shape in SHAPES if shape.fits(columns, source)), None)


def columns_read(form: str, source: SourceConfig, shape: Shape | None, in_chat: bool, is_labelled: bool) -> set[str]:
    """The columns that say something in a format; the others are nobody's."""
    pair = pair_columns(source)
    read = {
        "text": (source.text_column,),
        "prompt": (source.prompt_column,),
        "prompt_completion": (source.prompt_column, source.completion_column),
        "messages": (source.messages_column,),
        "pair": (*pair, source.prompt_column, *(f"score_{column}" for column in pair)),
        "rated": (source.text_column, source.prompt_column, source.ratings_column, source.rating_column),
    }[form]
    known = {*read, *(("system", "tools") if in_chat else ()), *(LABELS if is_labelled else ())}
    return known | ({*shape.columns, *shape.also} if shape else set())


def prompt_columns(form: str, source: SourceConfig, shape: Shape | None) -> set[str]:
    """The columns that a prompt is made of."""
    of_prompt = {
        "text": {source.text_column},
        "rated": {source.text_column, source.prompt_column},
        "messages": {source.messages_column},
    }.get(form, {source.prompt_column})
    return of_prompt | ({shape.columns[0], *shape.also} if shape else set())


# ---- values


def _cell(row: dict, column: str) -> Any:
    """Raises LeftOut where there is nothing; a null is no fault of the row's."""
    if row.get(column) is None:
        raise LeftOut(f"no {column}", bad=column not in row)
    return row[column]


def _text(value: Any, what: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise LeftOut(f"{what} is not a text", f"found {type(value).__name__}")
    if not value.strip() and not may_be_empty:
        raise LeftOut(f"empty {what}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise LeftOut(f"{what} is not valid Unicode", "a lone surrogate")
    return value


def _parsed(value: Any, what: str) -> Any:
    """A list, or one as JSON, as CSV cells and many tables hold it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise LeftOut(f"{what} is a text but no JSON", f"{error_lines(error)[0]} in {value[:40]!r}") from None


def _turn(given: Any, column: str) -> Turn:
    """A checked message with all its keys, in our form."""
    turn = dict(given) if isinstance(given, dict) else {}
    if "from" in turn and "role" not in turn:  # ShareGPT
        speaker = turn.pop("from")
        turn["role"] = SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        turn["content"] = turn.pop("value", None)
        if turn["role"] == "function_call":
            turn |= {"role": "assistant", "content": None, "tool_calls": _calls(turn["content"])}
    turn = {key: value for key, value in turn.items() if value is not None}
    if turn.get("role") not in ROLES:
        raise LeftOut(f"{column}: a message needs a role of {', '.join(ROLES)}", f"found {turn.get('role')!r}")
    if turn.get("weight", 1) not in (0, 1):
        raise LeftOut(f"{column}: the weight of a message must be 0 or 1", f"found {turn['weight']!r}")
    calls = bool(turn.get("tool_calls"))
    if "content" not in turn and not calls:
        raise LeftOut(f"no content in {column}")
    turn["content"] = _text(turn.get("content", ""), f"content in {column}", calls or turn["role"] == "tool")
    return turn


def _calls(value: Any) -> list[dict]:
    """Of a ShareGPT turn: a call, or a list of those that are made at once."""
    said = _parsed(value, "a function_call")
    calls = said if isinstance(said, list) else [said]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise LeftOut("a function_call is a JSON object, or a list of them", f"found {value!r:.40}")
    return [{"type": "function", "function": call} for call in calls]


def _turns(value: Any, column: str) -> Turns:
    value = _parsed(value, column) if not isinstance(value, str) or value.strip() else []
    if not isinstance(value, list):
        raise LeftOut(f"{column} is no list of messages", f"found {type(value).__name__}")
    if not value:
        raise LeftOut(f"empty {column}")
    return [_turn(turn, column) for turn in value]


def _content(row: dict, column: str) -> str | Turns:
    """A text, or checked messages, which may be stored as JSON."""
    value = _cell(row, column)
    if isinstance(value, dict):  # one message, as in ShareGPT's pairs
        value = [value]
    if isinstance(value, list) or (isinstance(value, str) and _may_be_messages(value)):
        return _turns(value, column)
    return _text(value, column)


def _may_be_messages(text: str) -> bool:
    """Whether a text is JSON of messages, whole or broken. An answer may be JSON too, where nobody speaks."""
    found = LOOKS_LIKE_MESSAGES.match(text)
    if found is None or found[1] in SPEAKER_KEYS:
        return found is not None
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return all(isinstance(one, dict) and any(key in one for key in SPEAKER_KEYS) for one in said)


def _tools(row: dict) -> list | None:
    value = row.get("tools")
    if value is None or value == "":
        return None
    tools = _parsed(value, "tools")
    tools = [_parsed(tool, "a tool") for tool in tools] if isinstance(tools, list) else [tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise LeftOut("tools must be a list of JSON schemas", f"found {value!r:.40}")
    return tools or None


def ratings(row: dict, source: SourceConfig) -> list[float]:
    several = row.get(source.ratings_column) is not None
    column = source.ratings_column if several else source.rating_column
    values = row.get(column)
    if isinstance(values, str):  # a CSV cell holds a list as JSON
        with suppress(json.JSONDecodeError):  # then the check below names the text
            values = json.loads(values)
    values = values if several and isinstance(values, list) else [values]
    if not values:
        raise LeftOut(f"empty {column}")
    return [_number(value, column) for value in values]


def _number(value: Any, column: str) -> float:
    if isinstance(value, str):  # as 4.50 of a CSV file, where not all cells are as JSON writes them
        with suppress(ValueError):  # then the check below names the text
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LeftOut(f"{column} is not a number", f"found {value!r}")
    if not abs(value) <= sys.float_info.max:
        raise LeftOut(f"{column} is not finite", f"found {value:.20}" if isinstance(value, float) else "a huge integer")
    return float(value)


# ---- a row


class Traits(NamedTuple):
    """What all rows of a source have in common."""

    prompted: bool = False  # one has a prompt, so that a row without is no text to be cut
    repeats: bool = False  # the sides of its pairs begin with their prompt


def parts(row: dict, form: str, source: SourceConfig, data: DataConfig, words: int | None, traits: Traits) -> Parts:
    """Of a row with one completion; of a pair the chosen side.

    Args:
        words: of a text that are its prompt.
    """
    if form == "messages":
        return _framed(row, "", _turns(_cell(row, source.messages_column), source.messages_column), data)
    if form == "prompt":
        return _framed(row, _asked(row, source, data), "", data)
    column = {"prompt_completion": source.completion_column, "pair": source.chosen_column}.get(form, source.text_column)
    said = _said(row, column, data, is_text=form == "text")
    prompt: str | Turns = ""
    if form == "pair" and _is_whole_transcript(said):  # also next to a column with its prompt
        end = list(SPEAKER.finditer(said))[-1].end()
        if not said.endswith(ANSWERS, 0, end):
            raise LeftOut("the last turn is not the assistant's")
        prompt, said = said[:end], _text(said[end:], column)
    # UltraFeedback's form: chosen and rejected are whole conversations next to a prompt column that repeats the start.
    elif form == "prompt_completion" or (form != "text" and not _is_whole(said) and traits.prompted):
        prompt = _asked(row, source, data)
        if isinstance(said, str) and isinstance(prompt, list) and isinstance(row[source.prompt_column], str):
            said = said.removeprefix(" ")  # as of every turn of a transcript
        if form == "pair" and traits.repeats and isinstance(said, str) and _repeats(row, source):
            said = _text(said.removeprefix(str(prompt)), column)
    elif isinstance(said, str):
        prompt, said = first_words(said, words)
        said = said.lstrip() if prompt and data.chat else said  # the space of the cut belongs to neither turn
    return _framed(row, prompt, said, data)


def traits_of(rows: Iterable[dict], source: SourceConfig) -> Traits:
    """Sides repeat where those of most pairs of texts begin with the prompt, which stands in a column of its own too: those
    of a few do by chance, as "Hello!" answers "Hello"."""
    rows = list(rows)
    known = [found for row in rows if (found := _repeats(row, source)) is not None]
    return Traits(any(row.get(source.prompt_column) is not None for row in rows), 2 * sum(known) > len(known))


def _repeats(row: dict, source: SourceConfig) -> bool | None:
    """Of one pair; None where these are not three texts."""
    found = [row.get(column) for column in (source.prompt_column, *pair_columns(source))]
    prompt, *sides = [text for text in found if isinstance(text, str) and text] or [""]
    return all(side.startswith(prompt) for side in sides) if len(sides) == 2 else None


def pair_parts(
    row: dict, source: SourceConfig, data: DataConfig, words: int | None, traits: Traits
) -> tuple[Parts, Parts]:
    """Chosen and rejected, with the prompt that both share.

    Raises:
        LeftOut: where they are equal, or answer different prompts.
    """
    columns = pair_columns(source)
    chosen, rejected = (_said(row, column, data) for column in columns)
    if chosen == rejected:
        raise LeftOut(EQUAL, bad=False)
    prompts: list[str | Turns]
    answers: list[str | Turns]
    if _is_whole(chosen) and _is_whole(rejected):
        at = _shared(chosen, rejected)
        prompts, answers = [chosen[:at]], [chosen[at:], rejected[at:]]
        is_pair = all(answer and answer[0]["role"] == "assistant" for answer in (chosen[at:], rejected[at:]))  # type: ignore[index]
    elif _is_whole(chosen) or _is_whole(rejected):
        raise LeftOut(DIFFERENT)
    elif _is_whole_transcript(chosen) and _is_whole_transcript(rejected):
        spoken = [SPEAKER.split(side) for side in (chosen, rejected)]
        if any(side[-2] != ANSWERS for side in spoken):
            raise LeftOut("the last turn is not the assistant's")
        at = _shared(*spoken)
        said = ["".join(side[at:]) for side in spoken]
        prompts, answers = ["".join(spoken[0][:at])], [*said]
        is_pair = at > 0 and spoken[0][at - 1] == ANSWERS and all(map(str.strip, said))
    else:
        sides = [parts({**row, columns[0]: row[column]}, "pair", source, data, words, traits) for column in columns]
        prompts, answers = [side.prompt for side in sides], [side.completion for side in sides]
        is_pair = prompts[0] == prompts[1] and isinstance(chosen, str) == isinstance(rejected, str)
    if not is_pair:
        raise LeftOut(DIFFERENT)
    first, second = (_framed(row, prompts[0], answer, data) for answer in answers)
    return first, second


def preference(row: dict, source: SourceConfig) -> float:
    """P(chosen beats rejected): 1, or 1/2 where the scores beside them are equal."""
    columns = [f"score_{column}" for column in pair_columns(source)]
    if any(row.get(column) is None for column in columns):
        return 1.0
    better, worse = (_number(row[column], column) for column in columns)
    if better < worse:
        raise LeftOut(f"{columns[0]} is below {columns[1]}", f"{better:g} < {worse:g}")
    return 0.5 if better == worse else 1.0


def refuses_answers(rows: Iterable[dict]) -> bool:
    """Whether the rows have KTO's label, which says of a completion whether it is a good one: elsewhere it may be an
    answer, as in OpenRLHF's data."""
    labels = {label for row in rows if (label := _label(row))}
    return bool(labels) and labels <= GOOD | BAD


def is_refused_answer(row: dict) -> bool:
    """Whether KTO's label says that the completion is a bad one."""
    return _label(row) in BAD


def _label(row: dict) -> str:
    return next((str(row[name]).lower() for name in LABELS if row.get(name) is not None), "")


def _said(row: dict, column: str, data: DataConfig, is_text: bool = False) -> str | Turns:
    """What a column says; in chat the turns of a transcript."""
    found = _text(_cell(row, column), column) if is_text else _content(row, column)
    return _transcript(found, column) if data.chat and _is_transcript(found) else found


def _asked(row: dict, source: SourceConfig, data: DataConfig) -> str | Turns:
    found = _said(row, source.prompt_column, data)
    # The prompt of a transcript ends where the assistant is to speak.
    ends_open = isinstance(found, list) and isinstance(row[source.prompt_column], str) and not found[-1]["content"]
    return found[:-1] if ends_open else found


def _is_whole(said: str | Turns) -> TypeGuard[Turns]:
    """Whether it is a conversation from its beginning, not only what answers a prompt."""
    return isinstance(said, list) and said[0]["role"] in ("system", "user")


def _is_whole_transcript(said: str | Turns) -> TypeGuard[str]:
    return isinstance(said, str) and said.startswith(ASKS)


def _is_transcript(said: str | Turns) -> TypeGuard[str]:
    """Whether it is a text of hh-rlhf's form: turns after "\\n\\nHuman:" and "\\n\\nAssistant:"."""
    return isinstance(said, str) and SPEAKER.match(said) is not None


def _transcript(said: str, column: str) -> Turns:
    """The turns of a transcript; the last one may be empty, where the assistant is to speak."""
    _, *spoken = SPEAKER.split(said)
    pairs = list(zip(spoken[::2], spoken[1::2], strict=True))
    turns = [{"role": SPEAKERS[who], "content": words.removeprefix(" ")} for who, words in pairs]
    for turn in turns[:-1]:
        _text(turn["content"], f"turn in {column}")
    return turns


def _shared(first: list, second: list) -> int:
    """How many items both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _framed(row: dict, prompt: str | Turns, completion: str | Turns, data: DataConfig) -> Parts:
    """With the row's `system` turn and `tools`, where a chat template shows them."""
    if (
        isinstance(completion, list)
        and completion
        and not (completion[-1]["content"] or completion[-1].get("tool_calls"))
    ):
        raise LeftOut("empty answer")
    in_chat = isinstance(prompt, list) or isinstance(completion, list) or (data.chat and bool(prompt))
    if not in_chat:
        return Parts(prompt, completion, None)
    first = (as_turns(prompt, "user") if prompt else completion)[0]
    if row.get("system") and first["role"] != "system":  # type: ignore[index]
        system = [{"role": "system", "content": _text(row["system"], "system")}]
        prompt = [*system, *as_turns(prompt, "user")] if prompt else prompt
        completion = completion if prompt else [*system, *completion]  # type: ignore[misc]
    return Parts(prompt, completion, _tools(row))
