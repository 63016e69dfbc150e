"""The lines of `ledger.jsonl` that are almost all of it, rollouts that trained, as the ledger writes them: a regular
expression knows them, and their numbers are read from the bytes of many lines at once, faster than a JSON parser does."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_NUMBER = "(?:0|[1-9][0-9]{0,17})"
_LINE = (
    rf'^\{{"key":\[{_NUMBER},{_NUMBER},{_NUMBER}\],"trained":{_NUMBER},"update":{_NUMBER},'
    rf'"sampled":\[(?:{_NUMBER}(?:,{_NUMBER})?)?\],"admitted_at":{_NUMBER},"leases":{_NUMBER},'
    r'"holder":"[ !#-\[\]-~]*"(?:,"row":"[0-9a-f]{16}")?\}\n$'
)
_KEY_AT = len('{"key":[')
_BEFORE_TRAINED = len('],"trained":')
_DIGITS = 16  # of a digest
_BEHIND_DIGEST = len('"}\n')
_ROW = np.frombuffer(b'row":"', dtype=np.uint8)  # what stands before the digest, and nowhere else


def trained_rows(lines: bytes) -> tuple[dict[str, pa.Array], bytes]:
    """Columns `key`, `trained` and `row` of the lines that are such rows, and all other lines, both in their order."""
    text = np.frombuffer(lines, dtype=np.uint8)
    bounds = np.concatenate([[0], np.flatnonzero(text == ord("\n")) + 1])
    whole = pa.LargeStringArray.from_buffers(len(bounds) - 1, pa.py_buffer(bounds), pa.py_buffer(lines))
    matches = pc.match_substring_regex(whole, _LINE).to_numpy(zero_copy_only=False)
    others = b"".join(lines[bounds[i] : bounds[i + 1]] for i in np.flatnonzero(~matches)) + lines[bounds[-1] :]
    starts, ends = bounds[:-1][matches], bounds[1:][matches]
    keys, at = [], starts + _KEY_AT
    for _ in range(3):
        values, end = _numbers(text, at)
        keys.append(values)
        at = end + 1
    trained, _ = _numbers(text, at - 1 + _BEFORE_TRAINED)
    key = pa.ListArray.from_arrays(np.arange(len(starts) + 1, dtype=np.int32) * 3, np.stack(keys, axis=1).ravel())
    return {"key": key, "trained": pa.array(trained), "row": _digests(text, ends - _BEHIND_DIGEST - _DIGITS)}, others


def _numbers(text: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [rows], the decimal numbers that begin at those bytes, and where they end."""
    values, at = np.zeros(len(at), dtype=np.int64), at.copy()
    while True:
        digits = text[at] - np.uint8(ord("0"))  # what is below "0" is large
        is_digit = digits < 10
        if not is_digit.any():
            return values, at
        values = np.where(is_digit, 10 * values + digits, values)
        at += is_digit


def _digests(text: np.ndarray, at: np.ndarray) -> pa.Array:
    """Those that begin at these bytes; null where something else does."""
    is_there = np.logical_and.reduce([text[at - len(_ROW) + i] == byte for i, byte in enumerate(_ROW)])
    digits = text[at[:, None] + np.arange(_DIGITS)]
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(_DIGITS), len(at), [None, pa.py_buffer(digits.tobytes())])
    return pc.if_else(pa.array(is_there), fixed.cast(pa.binary()).cast(pa.string()), None)
