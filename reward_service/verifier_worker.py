"""The process that a verifier runs in: a line of items in, a line for each of them out, as soon as it is there, so that
whoever waits knows which item takes too long. Ended from outside when one does.

Started as `python -m reward_service.verifier_worker VERIFIER ANSWER OPTIONS MEMORY_GIB`.
"""

import json
import os
import signal
import sys
from collections import OrderedDict
from typing import Any

from reward_service.function_answers import Refused, plain_scores
from reward_service.function_worker import answer, limit_memory
from reward_service.processes import belong_to_parent, end_children, own_channels
from reward_service.verifier import BadRow, Verifier, column, find_verifier

REMEMBERED_ROWS = 1024  # what was read off them


class Rows:
    """What a verifier has read off rows: completions of one row come together."""

    def __init__(self, verifier: Verifier, options: dict[str, Any]):
        self._verifier, self._options = verifier, options
        self._read: OrderedDict[tuple[str | None, str | None], Any] = OrderedDict()

    def right(self, text: str | None, label: str | None) -> Any:
        """Raises BadRow.

        Args:
            text: JSON of an object. label: the answer of one who has no rows to send.
        """
        key = (text, label)
        if key not in self._read:
            try:
                row = {} if text is None else json.loads(text)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise BadRow("row must be JSON of an object")
            label = row.get("label") if label is None else label  # one that is no text comes in the row
            if label is not None and column(row, self._options["answer"]) is None:
                row[self._options["answer"]] = label
            self._read[key] = self._verifier.right(row, self._options)
            if len(self._read) > REMEMBERED_ROWS:
                self._read.popitem(last=False)
        return self._read[key]


def score(verifier: Verifier, options: dict[str, Any], rows: Rows, item: list) -> dict[str, Any]:
    """The reply for one item: what the verifier says, or an error in the words of an item."""
    completion, row, label = item
    try:
        found = verifier.verify(completion, rows.right(row, label), options)
        return {"found": plain_scores([found], 1, {})[0]}
    except BadRow as problem:
        return {"error": f"bad_row: {problem}"}
    except Refused as refused:
        return {"error": str(refused)}
    except BaseException as fault:  # poison, SystemExit too; its type alone, since its text may quote the completion
        return {"error": f"poison: {type(fault).__name__}"}


def main(name: str, answer_column: str, options_json: str, memory_gib: float) -> None:
    belong_to_parent()
    requests, replies = own_channels()
    own = os.getpid()
    try:
        verifier = find_verifier(name)
        if missing := verifier.missing():
            raise ModuleNotFoundError(f"needs {', '.join(missing)}")
        options = verifier.chosen(answer_column or None, json.loads(options_json))
        for module in verifier.requires:
            __import__(module)  # now, so that no item waits for it
        if verifier.prepare:
            verifier.prepare(options)
        limit_memory(memory_gib)
    # SystemExit too: the replica that started this process reports it and does not start.
    except BaseException as error:
        answer(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    answer(replies, {"ready": True})
    rows = Rows(verifier, options)
    for line in requests:
        for item in json.loads(line):
            reply = score(verifier, options, rows, item)
            if os.getpid() != own:
                os._exit(0)  # a copy that the verifier has made of this process
            signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that it has left would meet the next item
            end_children()
            answer(replies, reply)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
