"""The letter of a multiple-choice question, as people write it: "The answer is (B)", "B.", "**B**", "\\boxed{B}". The last
statement counts, and a letter within a word, or one of several ("A or B"), is none."""

import re

from reward_service.verifier import BadRow, Option, Options, Row, Verified, Verifier, answer_text
from reward_service.verifiers._answers import answered, verdict

# The runs are possessive: nothing of them is given back, and so no text takes long.
OPEN = r"[\s*_`'\"“(\[{$]*+(?:\\text\{|\\textbf\{|\\mathrm\{|\\mathbf\{)?[\s*_`'\"“(\[{]*+"
CLOSE = r"[*_`'\"”)\]}$]*"
NAMED = r"(?:(?:choice|option|letter)\s+)?"
SAID = (
    r"(?:final\s+|correct\s+|right\s+|best\s+|my\s+)*(?:answer|choice|option)\b(?:\s+(?:to|for|of)\b[^.\n:=]{0,60}?)?[\s*_`]*+"
    r"(?:is|:|=|would be|must be|should be)[\s*_`]*+:?"
)
STATEMENTS = (
    rf"{SAID}\s*+{NAMED}{OPEN}@{CLOSE}",
    rf"\\boxed\s*\{{{OPEN}{NAMED}@{CLOSE}",
    rf"<answer>{OPEN}{NAMED}@{CLOSE}",
    rf"####{OPEN}@{CLOSE}",
    rf"\b(?:actually|rather|instead|correction|no)\b[,:]?\s*(?:it\s+is|it's)?\s*{OPEN}@{CLOSE}(?=\s*(?:[.,;!]|$))",
    rf"\bit(?:\s+is|'s)\s+{OPEN}@{CLOSE}(?=\s*(?:[.,;!]|$))",
    rf"(?<![\w'’-])@{CLOSE}\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b",
    rf"^{OPEN}@{CLOSE}\s*[.:)]?[*_`]*\s*$",
    rf"\b(?:I(?:\s+would|\s+will|['’](?:d|ll))?\s+(?:choose|pick|select|go\s+with)|(?:therefore|thus|hence|so),?)\s+{NAMED}{OPEN}(?!I[\s,;.!])@{CLOSE}(?=\s*(?:[.,;!]|$))",
)
# Where there is no statement, and one letter alone is said so: they may head a discussion, or deny.
HINTS = (
    rf"^{OPEN}{NAMED}{OPEN}@{CLOSE}\s*[.)]?[*_`]*\s*$",
    r"(?<!not )(?<!n['’]t think )\bit(?:\s+is|['’]s)\s+[(\[]@[)\]]",
    rf"\b(?:answer|choice)[ \t*_`]*[-–—][ \t*_`]+{OPEN}@{CLOSE}(?=\s*(?:[.,;!]|$))",
    rf"\A{OPEN}@{CLOSE},?\s+(?:because|since|as)\b",
)
IS_CORRECT = STATEMENTS[6]  # which says that it is a letter
# What may follow a letter that is none: more of a word, or another choice.
IN_A_WORD = r"(?!\w|['’][A-Za-z]|[-/+][A-Za-z0-9])"
ANOTHER = re.compile(
    r"[\s*_`)\]}]*(?:,|/|&|\+|\bor\b|\band\b|\bnor\b)\s*(?:(?:option|choice)\s+)?[\s*_`(\[{]*"
    r"(?!I\s+[a-z]|A\s+(?!(?:and|or|nor)\b)[a-z])[A-Z](?![\w'’])"
)
LISTED = r"^[\s*_`]*[(\[]?@[)\].:][*_`]*\s+\S"  # a line "B. Paris"
ARTICLE = re.compile(r"\s+(?!because|since|as\b|and\b|which|for\b|due|due\b|due to)[a-z]")


def letters(options: Options) -> str:
    return f"[{options['letters']}{options['letters'].lower()}]"


def read(row: Row, options: Options) -> str:
    text = answer_text(row, options).strip().strip("().[]").upper()
    if len(text) != 1 or text not in options["letters"]:
        name = options["answer"]
        raise BadRow(
            f"{name} must be one letter of options.letters ({options['letters']}); write the letter of the choice"
        )
    return text


def verify(completion: str, right: str, options: Options) -> Verified:
    found = chosen(answered(completion), options)
    return verdict(found == right, found is not None)


def chosen(completion: str, options: Options) -> str | None:
    """The letter that a completion chooses."""
    if said := _said(STATEMENTS, completion, options):
        return max(said)[1] or None
    if hinted := {letter for _, letter in _said(HINTS, completion, options)}:
        return hinted.pop() or None if len(hinted) == 1 else None
    listed = LISTED.replace("@", f"(?P<letter>[{options['letters']}])")
    found = {match["letter"] for match in re.finditer(listed, completion, re.MULTILINE)}
    return found.pop() if len(found) == 1 else None


def _said(statements: tuple[str, ...], completion: str, options: Options) -> list[tuple[int, str]]:
    """(where, letter) of each; no letter where another one follows."""
    found = []
    for statement in statements:
        pattern = statement.replace("@", f"(?P<letter>{letters(options)}){IN_A_WORD}")
        for match in re.finditer(pattern, completion, re.IGNORECASE | re.MULTILINE):
            at, letter = match.start("letter"), match["letter"]
            if statement is IS_CORRECT or not _is_article(letter, completion, match):
                found.append((at, "" if ANOTHER.match(completion, match.end("letter")) else letter.upper()))
    return found


def _is_article(letter: str, completion: str, match: re.Match) -> bool:
    """Whether it is the word "a" or "I", or a small letter in a sentence that goes on."""
    if letter == "A" and re.search(r"\b(?:is|be)[\s*_`]*$", completion[match.start() : match.start("letter")]):
        return False  # nobody writes the article with a capital within a sentence
    is_bare = completion[match.start("letter") - 1 : match.start("letter")] not in ("(", "[", "{", "*", '"', "'", "`")
    goes_on = ARTICLE.match(completion, match.end("letter")) is not None
    return is_bare and goes_on and (letter in "AI" or letter.islower())


LETTERS = Option(
    "ABCDEFGHIJ",
    "different letters from A to Z",
    lambda value: isinstance(value, str) and bool(re.fullmatch("[A-Z]{2,26}", value)) and len(set(value)) == len(value),
    "for example ABCD",
)
VERIFIER = Verifier(read=read, verify=verify, options={"letters": LETTERS})
