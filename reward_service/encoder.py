"""From the contents of requests to items, by the service's tokenizer. What cannot be read is an error of its item."""

from common.text.encoding import (
    DataError,
    LeftOut,
    Turns,
    item_of_messages,
    item_of_rendered,
    item_of_text,
    tokenizer_hash,
)
from common.text.end_tokens import end_ids
from common.text.tokenizers import local_checkpoint, with_date
from contracts.config import ModelConfig
from contracts.records import Score, ScoringItem
from contracts.scoring import scoring_ids


class Encoder:
    """`template_date`: the day (ISO 8601) that the chat template writes as today's; None: the one that training has left
    with the tokenizer, or the default."""

    def __init__(self, tokenizer_path: str, template_date: str | None = None):
        from transformers import AutoTokenizer

        root = str(local_checkpoint(tokenizer_path))
        self.tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False)
        if template_date is not None:
            with_date(self.tokenizer, template_date)
        self.hash = tokenizer_hash(self.tokenizer)
        self.end_ids = end_ids(self.tokenizer, ModelConfig(path=root), chat=True)
        self._ends = tuple(str(self.tokenizer.decode([end])) for end in self.end_ids)

    def messages(self, turns: Turns, label: str | None = None, tools: list | None = None) -> ScoringItem | Score:
        try:
            return item_of_messages(self.tokenizer, turns, label, tools)
        except LeftOut as fault:
            return Score(None, f"unreadable: {fault.reason}")
        except DataError:
            return Score(None, "unreadable: the tokenizer has no chat template that ends answers")

    def text(self, text: str, label: str | None = None) -> ScoringItem | Score:
        return item_of_text(self.tokenizer, text, label) if text.strip() else Score(None, "empty")

    def rendered(
        self, text: str, prompt: str | None = None, label: str | None = None, with_bos: bool | None = None
    ) -> ScoringItem | Score:
        if not text.strip():
            return Score(None, "empty")
        return item_of_rendered(self.tokenizer, self._without_end(text), prompt, label, with_bos)

    def _without_end(self, text: str) -> str:
        """A rendered text without what ends it and the layout behind that; one that is not ended as it is."""
        while end := next((end for end in self._ends if text.rstrip().endswith(end)), None):
            text = text.rstrip().removesuffix(end)
        return text

    def token_ids(self, ids: list[int], ids_hash: str | None, label: str | None = None) -> ScoringItem | Score:
        if ids_hash != self.hash:
            return Score(None, f"unreadable: token_ids need tokenizer_hash={self.hash}; use text for another tokenizer")
        if not ids:
            return Score(None, "empty")
        return ScoringItem(tuple(scoring_ids(ids, *self.end_ids)), 0, label)
