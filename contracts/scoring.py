"""The scoring input: one form for the reward model's training data, the reward service and the learner."""


def scoring_ids(token_ids: list[int], eos_token_id: int) -> list[int]:
    """`token_ids` with exactly one EOS at the end, whether the sampled completion ended with none, one or several.

    The EOS is for scoring only: it is never appended to what trains the policy. An EOS further inside stays.
    """
    end = len(token_ids)
    while end and token_ids[end - 1] == eos_token_id:
        end -= 1
    return [*token_ids[:end], eos_token_id]
