"""How a snippet is negated, and what it is compared with: one word after the first verb that can take it.

    the film is funny   ->   the film is not funny    (negation)
                             the film is also funny   (control: a neutral word in the same place)

Deliberately simple, so that anybody can check it: no parser, no model, and what the rules cannot be sure of is left
out. Every reason for leaving a snippet out is counted and reported. What remains wrong, such as a negation whose scope
is a side clause, weakens both measures alike.
"""

import re
from dataclasses import dataclass

NEGATION, CONTROL = "not", "also"
# Forms of be: `not` follows them directly, and turns round what is said of the subject. After modal verbs it often does
# less.
VERBS = ("is", "are", "was", "were")
NEGATED = (
    "not",
    "no",
    "never",
    "none",
    "nothing",
    "nobody",
    "neither",
    "nor",
    "without",
    "cannot",
    "hardly",
    "barely",
    "lacks",
)
# Words that turn the meaning again, or make a clause that the verb may belong to.
TURNS = ("but", "though", "although", "however", "yet", "despite", "while", "except", "unless", "until", "if", "than")
CLAUSE = ("that", "which", "who", "whom", "whose", "what", "where", "when", "how", "why", "as", "because")
# After these the negated verb would say something else, or nothing a person would say.
BAD_NEXT = ("also", "only", "just", "still", "even", "too", "so", "the", "never", "not")
MIN_RATING = 1.0  # of people's mean ratings, -4 to 4: a snippet that says little cannot be turned round


@dataclass(frozen=True)
class Triple:
    """A snippet, its negation and its control."""

    text: str
    negated: str
    control: str
    rating: float


def triple(text: str, rating: float) -> Triple | str:
    """The triple of a snippet, or the reason why it has none."""
    if abs(rating) < MIN_RATING:
        return f"rated closer to 0 than {MIN_RATING:g}"
    words = re.findall(r"[a-z']+", text.lower())
    if any(word in NEGATED or word.endswith("n't") for word in words):
        return "negated already"
    if text.rstrip().endswith("?"):
        return "a question"
    if re.search(r"[.!?;:]\s+\S", text.rstrip()):
        return "more than one sentence"
    if any(word in TURNS for word in words):
        return "turns its meaning itself"
    verbs = list(re.finditer(rf"\b({'|'.join(VERBS)})\b", text))
    if not verbs:
        return "no form of be"
    verb = verbs[0]
    before = re.findall(r"[a-z']+", text[: verb.start()].lower())
    if not before:
        return "begins with its verb"
    if before[-1] in ("there", "it's", "here"):
        return "there is, here is"
    if any(word in CLAUSE for word in before):
        return "the verb may belong to a side clause"
    following = re.match(r" ([A-Za-z']+)", text[verb.end() :])
    if following is None or following[1].lower() in BAD_NEXT:
        return "no plain word after the verb"
    head, tail = text[: verb.end()], text[verb.end() :]
    return Triple(text, f"{head} {NEGATION}{tail}", f"{head} {CONTROL}{tail}", rating)
