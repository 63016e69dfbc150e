"""Tasks of reasoning-gym as rows of prompts with their answers, for the verifier `reasoning_gym`: docs/verifiers.md.

    python -m controller.data.reasoning_gym_rows chain_sum my/sums --options '{"max_terms": 2}'

writes my/sums/train.jsonl and my/sums/held_out.jsonl. The same arguments write the same files.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from reward_service.verifiers.reasoning_gym import VERIFIER

TRIES = 20  # entries that are made for each row that is wanted, before there are too few different ones


def make_rows(
    dataset: str, sizes: dict[str, int], *, seed: int, system: str | None = None, options: dict[str, Any] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Rows {"prompt", "answer", "metadata", "source"}, and "system" where it is given, of each part of `sizes` in its order.

    Entry i of a data set is made from seed + i, and each belongs to one part; no prompt comes twice, within a part or across
    them. So a part does not change with the sizes of those behind it.

    Args:
        dataset: a name in reasoning_gym.factory.DATASETS.
        sizes: rows of each part.
        seed: of the first entry.
        system: the system's turn of every row.
        options: of the data set's configuration, as {"max_terms": 2}.

    Raises:
        ValueError: the data set has too few different prompts, its options are none of its own, or an entry does not come
            through JSON as what its scorer reads.
    """
    from reasoning_gym.factory import create_dataset

    wanted = sum(sizes.values())
    try:
        entries = create_dataset(dataset, seed=seed, size=TRIES * wanted, **(options or {}))
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{dataset} with the options {options or {}}: {error}") from None
    different: dict[str, dict[str, Any]] = {}
    for index in range(TRIES * wanted):
        if len(different) == wanted:
            break
        entry = entries[index]
        if entry["question"] not in different:
            different[entry["question"]] = _row(entry, dataset, system)
    if len(different) < wanted:
        raise ValueError(
            f"{dataset} has {len(different)} different prompts in {TRIES * wanted} entries, {wanted} are wanted; "
            "ask for fewer, or for wider options"
        )
    rows = iter(different.values())
    return {part: [next(rows) for _ in range(size)] for part, size in sizes.items()}


def _row(entry: dict[str, Any], dataset: str, system: str | None) -> dict[str, Any]:
    row = {"system": system} if system else {}
    row |= {"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}
    row["source"] = f"reasoning_gym:{dataset}"
    try:
        problem = VERIFIER.row_problem(json.loads(json.dumps(row)), VERIFIER.chosen(None, {"runs_answers": True}))
    except (TypeError, ValueError) as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{dataset}: an entry cannot be a row of JSON: {problem}")
    return row


def write_rows(folder: Path, parts: dict[str, list[dict[str, Any]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a name in reasoning_gym.factory.DATASETS")
    parser.add_argument("folder", type=Path, help="where train.jsonl and held_out.jsonl are written")
    parser.add_argument("--train", type=int, default=2000, help="rows to train on (%(default)s)")
    parser.add_argument("--held-out", type=int, default=200, help="rows to measure on (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first entry (%(default)s)")
    parser.add_argument("--system", help="the system's turn of every row; without it the chat template's own")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON object: options of the data set")
    args = parser.parse_args()
    # The held-out rows first: they stay the same however many there are to train on.
    sizes = {"held_out": args.held_out, "train": args.train}
    try:
        parts = make_rows(args.dataset, sizes, seed=args.seed, system=args.system, options=args.options)
    except ValueError as error:
        raise SystemExit(f"reasoning_gym_rows: {error}") from None
    write_rows(args.folder, parts)
    print(f"{args.train} rows to train on and {args.held_out} held out in {args.folder}")


if __name__ == "__main__":
    main()
