"""A number or an expression, whatever form it is written in: numbers are compared exactly, everything else by math-verify.

The answer is what the completion says last: in \\boxed{...}, after "the answer is" or "####", else in its last line.
"""

import re
import threading
from fractions import Fraction
from typing import Any, NamedTuple

from reward_service.verifier import BadRow, Options, Row, Verified, Verifier, answer_text, flag
from reward_service.verifiers._amounts import amounts
from reward_service.verifiers._answers import TAG, answered, verdict
from reward_service.verifiers._quantities import MAX_DIGITS, Quantity, quantity, same, same_unit, unit_of

LIBRARY_S = 2  # of parsing, and of comparing: beyond, the answer has no score
MAX_CHARACTERS = 400
TOLERANCE = Fraction(1, 2 * 10**6)  # half of the sixth decimal
SAID = re.compile(
    r"(?P<final>final\s+)?(?P<word>answer|result|solution)\b(?:\s+(?:to|for|of)\b[^.\n:=]{0,60}?)?[\s*_]*"
    r"(?:\bis\b|:|=|\bequals\b|\bwould be\b)(?:\s*\bequal to\b)?[\s*_]*:?",
    re.IGNORECASE,
)
HASHES = re.compile(r"(?<!#)####(?!#)")  # of GSM8K; in Markdown, of a heading
# A heading's own number.
NUMBERED = re.compile(r"\d+[.)]\s+\S")
STEP = re.compile(r"\A\W*(?:step|part|case|method)\s+\d+\s*(?:[*_]*[:.)–-][*_]*(?=\s|$)|[*_]*$)", re.IGNORECASE)
# Said of an answer, and none; a heading.
REMARK = re.compile(
    r"(?:correct|right|confirmed|verified|reasonable|consistent|valid|clear)\b|[^\W\d]*$", re.IGNORECASE
)
WORDS = re.compile(r"[A-Za-z]{3,}")
# "It is 7", "it's 7": nobody writes products so, and the library would read I*t*i*s*7.
PROSE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2}(?:['’][a-z]+)?\s+\$?[A-Za-z\d]")
COMMANDS = re.compile(r"\\(?:begin|end)\s*\{\w+\}|\\[A-Za-z]+|_\{[A-Za-z]+\}")
# Functions that the library knows, behind a backslash alone; log2 and log10 say their base.
_NAMES = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log(?![0-9])|ln|lg|exp|sqrt|max|min|gcd|lcm"
NAME = re.compile(rf"\\(?:operatorname|mathrm)\s*\{{\s*({_NAMES})\s*\}}|(?<![A-Za-z\\])(?<!_\{{)({_NAMES})(?![A-Za-z])")
ROOT = re.compile(r"\\sqrt\s*\(((?:[^()]|\([^()]*\))*)\)")
# In Markdown; not x**2 + y**2, nor 2**(n + 1).
BOLD = re.compile(r"(?<![\w)\]}*])(\*\*|__)(?=[^\s*_])([^*_\n]+?)(?<=\S)\1(?![\w({\[*])")
END = re.compile(
    r"(?<=[^\s.\\])[.!?](?=\s|$)|[;\n]|,?\s+(?:because|since|as|which|where|so)\b|\s+\((?=\s*(?:[A-Za-z]{2}|[aA]\s))|,\s+(?=[A-Za-z]{3})"
)
FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[((?:(?!\\\[).)+?)\\\]|\\\(((?:(?!\\\().)+?)\\\)|(?<![\\$])\$([^$\n]+)(?<!\\)\$"
)
PLAIN = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ",
    "≥": r"\ge ", "∈": r"\in ", "√": r"\sqrt", "**": "^", "²": "^2", "³": "^3", "\u00a0": " ",
}  # fmt: skip
# Read as something else by the library: 0.\overline{3} as 0, 12:30 as 2/5, words as products of their letters.
UNREAD = re.compile(
    r"^\s*-0,\d|\\(?:cot|sec|csc)h\b|\\overline|\\dot\b|\\bar\b|\d\s*:\s*\d|\d\s+\d|(?<![A-Za-z\\])\d+[eE]\d|!\s*\d|[?#@~](?!\\)"
)
# Before a letter that is a factor: behind a number the library drops it as a unit (0.9: 3t is 3, 2ab is 2).
VARIABLE = re.compile(
    r"(?<=\d)\s*(?=[A-Za-z])|(?<=[})])\s*(?=[A-Za-z]{1,2}$)|(?<=(?<![A-Za-z\\])[A-Za-z])\s+(?=[A-Za-z](?![A-Za-z]))"
)
# What may take longer than anyone waits: powers of powers of large numbers, and factorials.
HUGE = re.compile(
    r"\^\s*\{?\s*-?\s*\d{5,}|\d{4,}\s*!|\^(?:\s*[{(])+[^{}()]*\^|\^\s*(?:\\?[A-Za-z]+|\d+)\s*\^|"
    r"\^[^+*/=,^]*[)}\]]\s*\^\s*\{?\s*\d{3,}|!\s*!|!\s*\^|\^\s*\{?\s*[({\d]*\d+\s*!"
)


# Before an argument without brackets: a power, or a base. \sin^2 x, \log_2 x.
FUNCTION = re.compile(
    r"(\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|\\(?:log|ln|lg|exp))((?:[_^](?:\{[^{}]*\}|\w))+)\s*([A-Za-z])(?![A-Za-z\d])"
)
UNIT_BEHIND = re.compile(
    r"(.*?)(?:\\[,;: !])*\s*\\(?:text|textrm|mathrm)\s*\{([^{}]*)\}(\s*\^\s*\{?[23]\}?)?", re.DOTALL
)
# 5m is five meters, or what 2m + 3m is.
FACTOR = re.compile(r"[\d}][A-Za-z](?:\s*\^\s*\{?\d\}?)?$")
ALTERNATIVES = re.compile(r",?\s+or\s+|\s*\\text\s*\{\s*or\s*\}\s*")
SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*")
MEMBER = re.compile(r"\A\s*\\?[A-Za-z]+\s*\\in(?![A-Za-z])")  # x \in (0,1)
# At the ends; at the last one a run is tried from its beginning alone.
SPACES = re.compile(r"\A(?:\s*\\[,;:! ])+|(?<!\s)(?<!\\[,;:! ])(?:\s*\\(?:[,;:! ]|\Z))+\Z")
SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|,\s*\\!)\s*(?=\d{3}(?!\d))")  # 10,\!080
BRACKETS = re.compile(r"(.*\S)\s+\(([^()]*)\)", re.DOTALL)
BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|,?\s*(?:or|and)\b)[\s$]*(?:[A-Za-z]\s*=)?[\s$]*")


class Right(NamedTuple):
    number: Quantity | None
    parsed: list[Any]  # of math-verify; beside a number where its unit may be a factor, else empty
    opening: str = ""  # its bracket, where it is in brackets as a whole
    unit: str = ""  # behind an expression


def clean(text: str) -> str:
    """Without what surrounds a formula, and with LaTeX in place of other signs."""
    text = SEPARATOR.sub("", text.strip())
    for _ in range(4):
        before = text
        text = SPACES.sub("", text.strip().strip("*_`")).strip()
        text = re.sub(r"^\\(?:left|displaystyle)\b|^(?:\\\[|\\\()\s*|\s*(?:\\\]|\\\))$|[.,;]$", "", text).strip()
        text = text[2:-2] if len(text) > 4 and text.startswith("$$") and text.endswith("$$") else text
        text = text[1:-1] if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1] else text
        inner = re.fullmatch(r"\\(?:text|textbf|mathbf|mathrm|boxed|fbox)\s*\{([^{}]*)\}", text)
        text = inner[1] if inner else text
        if text == before:
            break
    for sign, plain in PLAIN.items():
        text = text.replace(sign, plain)
    return text.strip()


def boxed(text: str) -> list[tuple[int, str]]:
    """(where, what is in it) of every \\boxed{...} that ends."""
    found = []
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            end += 1
        if not depth:
            found.append((match.start(), text[match.end() : end - 1]))
    return found


class Statement(NamedTuple):
    at: int
    text: str
    is_answer: bool = True  # it says so; "the result is" may be of one step
    is_fallback: bool = False  # a heading, with the way to the answer under it, or a step: the last line comes first


def statements(completion: str, last_at: int) -> list[Statement]:
    """Every answer that a completion states. `last_at`: where its last line begins."""
    found = [Statement(start, inner) for start, inner in boxed(completion)]
    found += [Statement(match.start(), match[1]) for match in TAG.finditer(completion)]
    for match in HASHES.finditer(completion):
        _, text, line = _behind(completion, match.end())
        if len(line) <= MAX_CHARACTERS and not NUMBERED.match(line) and readable(text):
            found.append(Statement(match.start(), text))
    for match in SAID.finditer(completion):
        at, text, _ = _behind(completion, match.end())
        is_answer = match["word"].lower() == "answer"
        is_label = match[0].rstrip(" *_\n").endswith(":") and not match["final"]
        is_heading = is_label and last_at > at and (not readable(text) or _is_working(text))
        is_step = not is_answer and not match["final"] and match.start() < last_at
        found.append(Statement(match.start(), text, is_answer, is_heading or is_step))
    return sorted(found, key=lambda statement: statement.at)


def _behind(completion: str, end: int) -> tuple[int, str, str]:
    """What is stated behind `end`: where, as far as its sentence goes, and the whole line."""
    rest = completion[end : end + 4 * MAX_CHARACTERS]
    at, rest = end + len(rest) - len(rest.lstrip()), rest.lstrip()
    text = formula(rest) if rest.startswith(("$", "\\", "*")) else sentence(rest)
    return at, text, rest.partition("\n")[0]


def _is_working(text: str) -> bool:
    """Whether it works a number out, 48/2 = 24, as an answer with its name, x = 24, does not."""
    left, equals, _ = clean(text).partition("=")
    return bool(equals) and not re.search("[A-Za-z]", COMMANDS.sub("", left))


def formula(rest: str) -> str:
    """The formula that a text begins with and, as far as its sentence goes, what follows it."""
    for start, end in (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("**", "**"), ("$", "$")):
        if rest.startswith(start) and (stop := rest.find(end, len(start))) > 0:
            inside = rest[len(start) : stop].strip()
            if start == "$" and inside[-1:].isalpha() and " " in inside:
                continue  # two amounts of money
            after = sentence(rest[stop + len(end) :].strip(" "))
            return inside if not after.strip(" .*") else f"{inside} {after.strip(' *')}"
    return sentence(rest)


def sentence(text: str) -> str:
    end = END.search(text)
    return text[: end.start()] if end else text


def candidates(completion: str, options: Options) -> list[str]:
    """What the answer may be: the last statement, as a whole and behind its last equals sign."""
    completion = BOLD.sub(r"\2", completion)
    boxes = boxed(completion)
    if options["boxed"]:
        return _sides(_last_boxes(completion, boxes)) if boxes else []
    lines = [line for line in completion.splitlines() if line.strip(" *_`$\\[]().")]
    last_line = lines[-1] if lines else ""
    said = statements(completion, completion.rindex(last_line))
    if boxes:  # a later sentence counts where it has an answer of its own
        later = [one.text for one in said if one.at > boxes[-1][0] and one.is_answer and readable(one.text)]
        return _sides(later[-1] if later else _last_boxes(completion, boxes))
    stated = [one.text for one in said if not one.is_fallback]
    if stated:
        return _read_off(next((text for text in reversed(stated) if not REMARK.match(text.strip())), stated[-1]))
    found = _read_off(STEP.sub("", last_line))
    return found if found or not said else _read_off(said[-1].text)


def _read_off(text: str) -> list[str]:
    """A formula, as a whole and behind its last equals sign, or else the only number of a sentence or behind that sign, or
    its only formula."""
    text = _without_remark(text)
    whole = _sides(text)
    if any(map(readable, whole)):
        return whole
    found = amounts(clean(text)) or (amounts(clean(text.rsplit("=", 1)[1])) if "=" in text else [])
    return found or _only_formula(text)


def _only_formula(text: str) -> list[str]:
    """Of a sentence that would have one number, were it one; with its unit."""
    found = list(FORMULA.finditer(text))
    if len(found) != 1:
        return []
    before, inside, behind = text[: found[0].start()], next(filter(None, found[0].groups())), text[found[0].end() :]
    if amounts(clean(f"{before}1{behind}")) != ["1"]:
        return []
    unit = rf"\text{{{behind.strip(' .')}}}" if unit_of(behind) else ""
    sides = [side + unit for side in _sides(inside)]
    return sides if any(map(readable, sides)) else []


def _without_remark(text: str) -> str:
    """Without brackets at the end that say how its number comes about: 72 clips (48 + 24). 2 (x + 1) is a product."""
    found = BRACKETS.fullmatch(clean(text))
    number = quantity(*amounts(found[1])) if found and amounts(found[1]) else None
    is_remark = number and any(equal(Right(number._replace(unit=""), []), side) for side in _sides(found[2]))  # type: ignore[index]
    return found[1] if found and is_remark else text


def _last_boxes(completion: str, boxes: list[tuple[int, str]]) -> str:
    """The last one, with those before that only a comma, "or" or "and" parts from it: several answers."""
    found, start = [boxes[-1][1]], boxes[-1][0]
    for at, inner in reversed(boxes[:-1]):
        end = completion.index("{", at) + len(inner) + 2
        if end > start or not BETWEEN_BOXES.fullmatch(completion[end:start]):
            break
        found, start = [inner, *found], at
    return ", ".join(found)


def _sides(text: str) -> list[str]:
    text = clean(text)
    sides = re.split(r"(?<![<>!\\])=|\\approx|≈", text)
    between = [re.sub(r"\([^()]*\)|,(?=\d{3}\b)", "", side) for side in sides[1:-1]]
    if len(sides) > 1 and (
        re.search(r"\bor\b", sides[0]) or any(re.search(r"\bor\b|\band\b|[,;]", s) for s in between)
    ):
        return [text]  # several equations
    return [text] if len(sides) == 1 else [text, clean(sides[-1])] if len(sides) == 2 else [clean(sides[-1])]


def readable(text: str) -> bool:
    return quantity(clean(text)) is not None or expression(text) is not None


def with_unit(text: str) -> tuple[str, str]:
    """An expression, and the unit in words that may stand behind it."""
    found = UNIT_BEHIND.fullmatch(clean(text))
    unit = unit_of(found[2] + (found[3] or "")) if found else None
    return (found[1], unit) if found and unit else (text, "")


def expression(text: str) -> str | None:
    """LaTeX of what is no plain number, where the library reads it as people do."""
    text = re.sub(r"_(\d)\s+", r"_{\1} ", with_unit(text)[0])
    text = re.sub(r"\s*(?:,\s*)?(?:\\text\s*\{\s*(?:or|and)\s*\}|\b(?:or|and)\b)\s*", ", ", clean(text))
    text = re.sub(r"\\[,;:!]|\\(?:displaystyle|limits)(?![A-Za-z])", " ", SIZE.sub(" ", text))
    text = re.sub(
        r"(?<![A-Za-z\\])(pi|infinity|infty)(?![A-Za-z])", lambda m: r"\pi " if m[1] == "pi" else r"\infty ", text
    )
    if not 0 < len(text) <= MAX_CHARACTERS or sum(map(str.isdigit, text)) > MAX_DIGITS // 2:
        return None
    text = NAME.sub(lambda m: f"\\{m[1]} " if m[1] else f"\\{m[2]}", text)
    while (rooted := ROOT.sub(r"\\sqrt{\1}", text)) != text:
        text = rooted
    text = re.sub(r"\A\s*0,(?=\d)", "0, ", text)  # two numbers; of 0,125 the library makes a decimal
    if text.count("{") != text.count("}") or "\\boxed" in text:
        return None
    if UNREAD.search(re.sub(r"\\times|\\cdot", "*", text)) or HUGE.search(text) or "\\text" in text or "$" in text:
        return None
    plain = COMMANDS.sub(" ", text)
    if PROSE.search(plain) or WORDS.search(plain):
        return None
    text = re.sub(r"\\([dt]?frac)\s*(\d)\s*([A-Za-z])", r"\\\1{\2}{\3}", FUNCTION.sub(r"\1\2(\3)", text))
    return VARIABLE.sub("*", text)


def _bound() -> int | None:
    """The library bounds itself by a signal, which the main thread alone can have."""
    return LIBRARY_S if threading.current_thread() is threading.main_thread() else None


def parsed(text: str) -> list[Any]:
    """By math-verify; empty where it cannot read it. Raises TimeoutError."""
    from math_verify import LatexExtractionConfig, parse
    from math_verify.errors import TimeoutException

    latex = expression(text)
    if latex is None:
        return []
    try:
        return list(
            parse(
                f"\\boxed{{{latex}}}",
                [LatexExtractionConfig()],
                "no_fallback",
                parsing_timeout=_bound(),
                raise_on_error=True,
            )
        )
    except TimeoutException:
        raise TimeoutError from None
    except MemoryError:  # nothing was shown against the answer
        raise
    except Exception:  # whatever it raises on what it cannot read
        return []


def read(row: Row, options: Options) -> Right:
    name, text = options["answer"], answer_text(row, options)
    if HASHES.search(text):  # GSM8K: the way there, then the answer
        text = text.rsplit("####", 1)[1]
    elif boxes := boxed(text):
        text = boxes[-1][1]
    number = quantity(clean(text))
    if re.fullmatch(r"-?0,\d+", clean(text)):
        raise BadRow(
            f"{name} must be one number or several; write 0.5 for a decimal, or 0, 5 with a space for two numbers"
        )
    try:
        tree = [] if number and not FACTOR.search(clean(text)) else parsed(text)
    except TimeoutError:
        raise BadRow(f"{name} must be what math-verify reads within {LIBRARY_S} s; write a simpler form") from None
    if number is None and not tree:
        raise BadRow(
            f"{name} must be a number or an expression that math-verify reads; write the answer alone, or verifier: exact, "
            "choice or regex for words"
        )
    within = re.fullmatch(r"([(\[])[^()\[\]]*[)\]]", unnamed(clean(text)))
    return Right(number, tree, within[1] if within and "," in within[0] else "", "" if number else with_unit(text)[1])


def unnamed(text: str) -> str:
    """An interval without what it is of, and its brackets without their sizes: x \\in \\left(0,1\\right)."""
    return MEMBER.sub("", SIZE.sub("", text)).strip()


def verify(completion: str, right: Right, options: Options) -> Verified:
    found = candidates(answered(completion), options)
    return verdict(any(_is_right(right, text) for text in found), any(map(readable, found)))


def _is_right(right: Right, text: str) -> bool:
    """An answer in several forms, "3/4 or 0.75", is right where each is."""
    forms = ALTERNATIVES.split(text)
    return equal(right, text) or (len(forms) > 1 and all(equal(right, clean(form)) for form in forms))


def equal(right: Right, text: str) -> bool:
    given = quantity(text)
    units = (right.unit, "" if given else with_unit(text)[1])
    if all(units) and not same_unit(*units):
        return False
    if right.number and given:
        if right.parsed and not given.unit:
            return False
        return same(right.number, given, TOLERANCE)
    if (right.number or given) and not (right.number or given).unit:  # type: ignore[union-attr]
        number = right.number or given
        assert number is not None
        as_latex = f"\\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"
        return compared(parsed(as_latex) if right.number else right.parsed, parsed(as_latex if given else text))
    if right.opening and not unnamed(text).startswith(right.opening):  # a point is no interval, and neither is a set
        return False
    return bool(right.parsed) and given is None and compared(right.parsed, parsed(text))


def compared(right: list[Any], given: list[Any]) -> bool:
    """Raises TimeoutError."""
    from math_verify import verify as library
    from math_verify.errors import TimeoutException

    if not right or not given:
        return False
    try:
        return bool(library(right, given, timeout_seconds=_bound(), raise_on_error=True))
    except TimeoutException:
        raise TimeoutError from None
    except MemoryError:
        raise
    except Exception:  # what it cannot compare is not shown to be right
        return False


def prepare(options: Options) -> None:
    """The first comparison takes seconds, the others milliseconds."""
    compared(parsed("x+1"), parsed("1+x"))


VERIFIER = Verifier(
    read=read,
    verify=verify,
    prepare=prepare,
    least_timeout_s=lambda options: 2.0 * LIBRARY_S,
    options={"boxed": flag(False)},
    requires={"math_verify": "math-verify", "latex2sympy2_extended": "latex2sympy2_extended"},
)
