"""The only number of a sentence, where the sentence says nothing else of it: She sold 72 clips, the answer is negative 5."""

import re

_AMOUNT = r"[-−]?[$€£]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?"
_FOUND = re.compile(rf"(?<![\w.,/^-]){_AMOUNT}(?![\w/^]|[.,]\d|[-–−]\s*\d)")
_DIGITS = re.compile(r"\d+(?:[.,]\d+)*")
# A sign in words; behind anything else, "minus" takes away: x minus 5.
_NEGATIVE = re.compile(
    r"(?:\bnegative|(?:(?<=^)|(?<=[=:]\s)|(?<=[=:])|(?<=\bis\s)|(?<=\bwas\s)|(?<=\bare\s)|(?<=\bbe\s)|(?<=\bto\s)|(?<=\bof\s)"
    r"|(?<=\bequals\s)|(?<=\bget\s))minus)\s+(?=[$€£]?\d)",
    re.IGNORECASE,
)
_BEFORE = r"\s+(?:the\s+number\s+)?[-−]?[$€£]?\d"
_BEHIND = r"\d%?\s+"
_NAME = r"(?:[b-hj-z]\b|the\s+number\b)"
# With one of these the number is no answer, or what is said is more than the number.
_DENIED = re.compile(
    r"\b(?:not|\w+n['’]t|never|wrong|incorrect|cannot|or|about|around|roughly|unless|hundred|thousand|million|billion|dozen|half"
    r"|quarters?|thirds|fourths|fifths|sixths|sevenths|eighths|ninths|tenths|hundredths|thousandths)\b"
    r"|\bto\s+the\s+power\b|\bbelow\s+zero\b"
    r"|\b(?:than|exceeds?|exceeding|above|below|under|beyond|nearly|almost|but|except|minus|plus|times|divided\s+by"
    r"|divisible\s+by|mod|modulo|twice|thrice|double|triple|root|log|ln|sin|cos|tan|sqrt"
    r"|(?:multiples?|factors?|divisors?|roots?|powers?|squares?|cubes?|logarithm|log|ln|sine|cosine|tangent|reciprocal|inverse|opposite"
    rf"|factorial|absolute\s+value)\s+of){_BEFORE}"
    rf"|\b(?:than|[b-z]\s+over)\s+(?:{_NAME}|\d)"
    rf"|{_BEHIND}(?:cubed|factorial|squared)\b(?!\s+(?:units?|[kcm]?m|in|ft|inches|feet|yards|miles|\w*met(?:er|re)s)\b)"
    rf"|{_BEHIND}(?:(?:minus|plus|times|over|divided\s+by)\s+{_NAME}|pi\b)|\d!\s+(?-i:[a-z])"
    r"|(?:(?<=\S\s)[<>]=?|(?<![<\w/])[a-z][<>]=?|[≠~])\s*[-−]?[$€£]?\d"  # not of a quotation, an arrow or HTML
    r"|\\(?!(?:text\w*|math\w*|mbox|approx|therefore|implies|Rightarrow|q?quad|left|right|displaystyle)\b)[A-Za-z]",
    re.IGNORECASE,
)
# A bound is the answer where it says what is needed: she must buy at least 5.
_BOUND = re.compile(r"\bat\s+(?:least|most)\b|\bup\s+to\b", re.IGNORECASE)
_NEEDED = re.compile(
    r"\b(?:needs?|needed|must|should|requires?|required|(?:has|have|had)\s+to|can|could)\b", re.IGNORECASE
)


def amounts(line: str) -> list[str]:
    """The only number of a sentence, as `clean` leaves it; nothing where it has several, or says more than the number."""
    line = _NEGATIVE.sub("-", line)
    found = _FOUND.findall(line)
    is_alone = len(found) == 1 and len(_DIGITS.findall(line)) == len(_DIGITS.findall(found[0]))
    is_denied = _DENIED.search(line) or (_BOUND.search(line) and not _NEEDED.search(line))
    return [found[0].replace("−", "-").rstrip(",")] if is_alone and not is_denied else []
