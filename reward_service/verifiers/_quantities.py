"""A number as people write it, exactly: 1,234.50 | $18 | 12.5% | 3/4 | -2 1/2 | 1.5e3 | 5 cm | 2 million."""

import re
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 400  # beyond, a number is nothing that is compared here: some take longer to compute than anyone waits
_DIGITS = (
    r"(?:(?!0)\d{1,3}(?:(?P<separator>,|\{,\}|\\,|\\!|\s|\u2009|\u202f)\d{3})(?:(?P=separator)\d{3})*|\d+)(?:\.\d*)?"
    r"|\.\d+"
)
_EXPONENT = r"(?:\s*(?:e|E)\s*[+-]?\d{1,3}|\s*(?:\\times|\\cdot|×|\*|x)\s*10\s*(?:\^|\*\*)\s*\{?\s*[+-]?\d{1,3}\s*\}?)?"
_QUANTITY = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<currency>\\?[$€£¥₹])?\s*(?P<number>{_DIGITS})(?P<exponent>{_EXPONENT})"
    rf"(?:\s*/\s*(?P<below>\d+)|\s+(?P<above>\d+)\s*/\s*(?P<mixed>\d+))?"
    r"\s*(?P<percent>\\?%|percent\b|per\s+cent\b)?(?P<unit>.*)",
    re.DOTALL,
)
_FRACTION = re.compile(
    r"\s*([+-]?)\s*(\d+)?\s*\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))\s*(.*)", re.DOTALL
)
_MULTIPLES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|no|is|isn't|are|aren't|was|wrong|incorrect|to|than|minus|plus|times|more|less|fewer|about|but|if|dozen|"
    r"dozens|half|halves|quarters?|thirds|fourths|fifths|sixths|sevenths|eighths|ninths|tenths|hundredths|thousandths|"
    r"score|pairs?|modulo|mod|over|divided|squared|cubed|factorial|through|between|either|"
    r"i|x|y|z|n|pi|e|sqrt|base|remainder|r)\b",
    re.IGNORECASE,
)
_WORD = r"[A-Za-zµμΩ°'’]+\.?(?:\s*\^\s*\{?[23]\}?|[23²³])?"
_UNIT = re.compile(rf"{_WORD}(?:(?:\s*/\s*|\s+|-){_WORD}){{0,4}}|°\s*[CF]?")
# Of one or two letters; others are variables, as in 2a and 3t.
_SHORT = frozenset(
    "m g s h L l J N W V K C F cm mm km dm nm kg mg ml mL dL cl cL dl ft in yd mi lb oz hr ms ns Hz kW kJ kV kN kB MB GB Pa "  # noqa: SIM905
    "pt qt am pm of Ω µm μm µs μs".split()
)
# Names without their plural, by sign.
_SIGNS = {
    name: sign
    for sign, names in {
        "°": "degree deg °", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
        "mm": "millimeter millimetre", "in": "inch inche", "ft": "foot feet", "yd": "yard yds", "mi": "mile",
        "s": "second sec secs", "min": "minute mins", "h": "hour hr hrs", "g": "gram", "kg": "kilogram", "mg": "milligram",
        "L": "liter litre l", "mL": "milliliter millilitre ml", "lb": "pound lbs", "oz": "ounce",
    }.items()
    for name in names.split()
}  # fmt: skip
MOST_UNIT = 100  # characters


class Quantity(NamedTuple):
    value: Fraction
    unit: str  # in small letters without its plural; empty without one
    is_percent: bool
    is_decimal: bool  # it may be a rounded one
    currency: str = ""  # its sign


def quantity(text: str) -> Quantity | None:
    """What `text` as a whole says, or None where it is no single number with or without a unit."""
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\(?:circ|degree)\b", "°", text.strip())
    if sum(map(str.isdigit, text)) > MAX_DIGITS:
        return None
    if match := _FRACTION.fullmatch(text):
        sign, whole, above, below, short_above, short_below, rest = match.groups()
        above, below = int(above or short_above), int(below or short_below)
        if not below or (whole and above < 0):
            return None
        value = int(whole or 0) + Fraction(above, below)
        return _with_unit(-value if sign == "-" else value, rest, False, False, "")
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    if re.match(r"\d|\.\d|[*/^+=!_<>|({\[-]", match["unit"].strip()[:1] or " "):
        return None
    number = re.sub(r",|\{,\}|\\,|\\!|\s", "", match["number"])
    value = Fraction(number if number[-1] != "." else number[:-1])
    if match["exponent"]:
        value *= Fraction(10) ** int(re.findall(r"[+-]?\d+", match["exponent"])[-1])
    if match["below"]:
        if not int(match["below"]):
            return None
        value /= int(match["below"])
    elif match["above"]:
        if not int(match["mixed"]) or "." in number:
            return None
        value += Fraction(int(match["above"]), int(match["mixed"]))
    value = -value if match["sign"] == "-" else value
    currency = (match["currency"] or "").removeprefix("\\")
    return _with_unit(value, match["unit"], bool(match["percent"]), "." in number, currency)


def _with_unit(value: Fraction, rest: str, is_percent: bool, is_decimal: bool, currency: str) -> Quantity | None:
    rest = re.sub(r"\\(?:text|mathrm|textbf|textit|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 ", rest)
    rest = re.sub(r"\\[,;:! ]|~", " ", rest)
    rest = re.sub(r"[\s.]+$", "", rest).strip()
    if rest[:1] == "%":
        return None
    first = rest.split()[0].lower() if rest else ""
    if first in _MULTIPLES:
        value, rest = value * _MULTIPLES[first], " ".join(rest.split()[1:])
    if len(rest) > MOST_UNIT or (rest and (_NO_UNIT.search(rest) or not _UNIT.fullmatch(rest))):
        return None
    start = re.match(r"[^\W\d_]+|°[CF]?", rest)
    if start and len(start[0]) < 3 and start[0] not in _SHORT and start[0][0] != "°":
        return None
    return Quantity(value, _unit(rest), is_percent, is_decimal, currency)


def _unit(text: str) -> str:
    """In one form: words without their plural, known ones by their sign; parts by a space, or a slash for "per"."""
    text = re.sub(r"\bper\b|\s*/\s*", "/", text.replace("²", "2").replace("³", "3").replace("-", " "))
    text = re.sub(r"[{}^.]|\bof\b", "", re.sub(r"\s*\^\s*|\s+(?=[23]\b)", "", text))
    text = re.sub(r"\b(square|sq|cubic)\s+(\w+)", lambda m: m[2] + ("3" if m[1] == "cubic" else "2"), text)
    parts = [" ".join(map(_word, part.split())) for part in text.split("/")]
    return "/".join(parts)


def _word(text: str) -> str:
    power = text[-1] if text[-1:] in ("2", "3") else ""
    word = text.removesuffix(power)
    # Of long words the number, of short ones (m and M, s) everything counts.
    plain = word.casefold().removesuffix("s") if len(word) > 3 else word
    return _SIGNS.get(plain, _SIGNS.get(plain.removesuffix("e"), plain)) + power


def unit_of(text: str) -> str | None:
    """The unit that words say, in one form; None where they say more, or something else."""
    text = re.sub(r"[\s.]+$", "", text).strip()
    is_unit = 0 < len(text) <= MOST_UNIT and not _NO_UNIT.search(text) and _UNIT.fullmatch(text)
    return _unit(text) if is_unit else None


def same_unit(one: str, other: str) -> bool:
    """Whether they name one thing: of words, the last may have others before it (red apples)."""
    if one == other:
        return True
    longer, shorter = sorted((one, other), key=len, reverse=True)
    return "/" not in longer and len(shorter) > 2 and longer.endswith(f" {shorter}")


def same(right: Quantity, given: Quantity, tolerance: Fraction) -> bool:
    """Whether they are one number. Where both have a unit it must be the same one; 50% is 1/2, and also the 50 of one who
    asks for a percentage. Decimals may be rounded, within `tolerance`, of small ones a thousandth."""
    if right.unit and given.unit and not same_unit(right.unit, given.unit):
        return False
    if right.currency and given.currency and right.currency != given.currency:
        return False
    a, b = right.value, given.value
    near = min(tolerance, max(abs(a), abs(b)) / 1000) if right.is_decimal or given.is_decimal else Fraction(0)
    if right.is_percent == given.is_percent:
        return abs(a - b) <= near
    percent, plain = (a, b) if right.is_percent else (b, a)
    is_asked = right.is_percent or abs(plain) > 1  # nobody writes 0.5 for what is to be 0.5%
    return (is_asked and abs(percent - plain) <= near) or abs(percent / 100 - plain) <= near
