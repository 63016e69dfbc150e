"""The scoring input: one function for training, serving and the learner, so that a score means the same everywhere."""


def scoring_ids(token_ids: list[int], eos_token_id: int) -> list[int]:
    """`token_ids` with exactly one EOS at the end. Whether the policy wrote it is judged elsewhere (missing EOS)."""
    end = len(token_ids)
    while end and token_ids[end - 1] == eos_token_id:
        end -= 1
    return [*token_ids[:end], eos_token_id]
