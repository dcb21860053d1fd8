"""The sentence that follows from the numbers."""

import math
from collections.abc import Sequence

from .arms import Arm
from .differences import Difference
from .estimates import measure
from .wording import interval, number


def verdict(arms: Sequence[Arm], pairs: Sequence[Difference], lost: Sequence[str] = ()) -> str:
    """What the numbers bear, in a few sentences.

    Args:
        arms: the methods that are compared.
        pairs: the differences of their test rewards.
        lost: further methods that were to be compared.
    """
    ranked = sorted(((measure(arm, "reward"), arm) for arm in arms if arm.tested), key=lambda p: -p[0].mean)
    if not ranked:
        return "No finished run was tested: nothing can be said about the test reward."
    (best, top), rivals = ranked[0], [arm for _, arm in ranked[1:]]
    untested = [arm.label for arm in arms if not arm.tested]
    untested += [method for method in lost if all(arm.method != method for arm in arms)]
    silent = f" Of {', '.join(untested)} there is no test result." if untested else ""
    kl = measure(top, "kl").mean
    at = "" if math.isnan(kl) else f" at a KL of {number(kl)} nats"
    out = f", {best.left_out} values left out" if best.left_out else ""
    figures = f"{interval(best)}{at} ({best.seeds} seed{'s' if best.seeds > 1 else ''}{out})"
    if not rivals:
        text = f"{top.label} has a test reward of {figures}"
        return f"{text}.{silent}" if silent else f"{text}; there is nothing to compare it with."
    own = [pair for pair in pairs if top in (pair.first, pair.second) and pair.first.tested and pair.second.tested]
    text = f"{top.label} has the highest mean test reward, {figures}. "
    if not any(pair.test for pair in own):
        why = "; ".join(sorted({pair.why_not for pair in own}))
        return f"{text}Whether that is more than chance cannot be said ({why}).{silent}"
    above, below, neither = "significantly above", "significantly below", "not significantly above"
    said: dict[str, list[str]] = {above: [], neither: [], below: [], "not tested against": []}
    for pair in own:
        rival = pair.second if pair.first is top else pair.first
        ahead = pair.estimate is not None and (pair.estimate.mean > 0) == (pair.first is top)
        how = neither if not pair.significant else above if ahead else below
        said["not tested against" if pair.test is None else how].append(rival.label)
    parts = [f"{how} {', '.join(labels)}" for how, labels in said.items() if labels]
    where = "On the seeds and prompts that both have, it" if said[below] else "It"
    how = "paired by prompt, seeds as the unit, Holm-corrected, level 0.05"
    return f"{text}{where} is {' and '.join(parts)} ({how}).{silent}"
