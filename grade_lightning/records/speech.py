"""Who says what in completions of several turns."""

from itertools import groupby

from .rollout import Rollout

POLICY, ENVIRONMENT = "policy", "environment"


def spoken(rollout: Rollout) -> list[list[tuple[str, str]]]:
    """Each completion as what was said, one after another: `policy` or `environment`, and the text.

    A completion without turns is one text of the policy.
    """
    if rollout.turns is None:
        return [[(POLICY, text)] for text in rollout.completions]
    said: list[list[tuple[str, str]]] = []
    tables = (rollout.completion_ids, rollout.sampled, rollout.turns)
    for length, ids, own, turns in zip(rollout.lengths.tolist(), *(table.tolist() for table in tables), strict=True):
        parts = groupby(range(length), key=lambda i, own=own, turns=turns: (own[i], turns[i]))
        who, tokens = zip(*((mine, [ids[i] for i in places]) for (mine, _), places in parts), strict=True)
        texts = rollout.tokenizer.batch_decode(list(tokens), skip_special_tokens=True)
        said.append([(POLICY if mine else ENVIRONMENT, text) for mine, text in zip(who, texts, strict=True)])
    return said
