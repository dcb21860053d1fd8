"""Arguments in an order, and of a form, that the parser takes."""

from collections.abc import Sequence

import torch

import grade_lightning
from grade_lightning.errors import InputError

from .parser import BASES, choices


def classes_first(args: Sequence[str]) -> list[str]:
    """Move each class before the options that belong to it: the parser asks what an option is of when it meets it.

    Example:
        >>> classes_first(["--data.source.train", "a.csv", "--data.source=LocalFiles", "--model", "RLOO"])
        ['--data.source=LocalFiles', '--data.source.train', 'a.csv', '--model', 'RLOO']
    """
    ordered = list(args)
    for i in range(len(ordered)):
        option, equals, _ = ordered[i].partition("=")
        if not option.startswith("--") or (not equals and i + 1 == len(ordered)):
            continue
        first = next((j for j, arg in enumerate(ordered[:i]) if arg.startswith(f"{option}.")), None)
        if first is not None and not any(arg.partition("=")[0] == option for arg in ordered[:i]):
            size = 1 if equals else 2
            taken = ordered[i : i + size]
            del ordered[i : i + size]
            ordered[first:first] = taken
    return ordered


def torch_first(args: Sequence[str]) -> list[str]:
    """Bare names of optimizers and schedulers are torch's, whatever other packages call theirs.

    Example:
        >>> torch_first(["--model.optimizer", "AdamW", "--model.lr_scheduler=LinearLR"])
        ['--model.optimizer', 'torch.optim.AdamW', '--model.lr_scheduler=torch.optim.lr_scheduler.LinearLR']
    """
    found = list(args)
    for option, module in {"--model.optimizer": torch.optim, "--model.lr_scheduler": torch.optim.lr_scheduler}.items():
        for i, arg in enumerate(found):
            name, equals, value = arg.partition("=")
            at, value = (i, value) if equals else (i + 1, found[i + 1] if i + 1 < len(found) else "")
            if name == option and "." not in value and hasattr(module, value):
                found[at] = f"{name}{equals}" * bool(equals) + f"{module.__name__}.{value}"
    return found


def with_base_help(args: Sequence[str]) -> list[str]:
    """Name the class where `--model.policy.help` and its like name none, and there is one that is meant.

    Raises:
        InputError: there are several.

    Example:
        >>> with_base_help(["--model", "RLOO", "--model.policy.help"])
        ['--model', 'RLOO', '--model.policy.help', 'Policy']
    """
    if not args or not args[-1].endswith(".help") or args[-1].count(".") < 2:
        return list(args)
    part = args[-1].split(".")[-2]
    if part in BASES:
        raise InputError(f"{args[-1]}: say of which class: {', '.join(choices(BASES[part]))}, or a dotted path")
    known = {name.lower(): name for name in grade_lightning.__all__ if name != "LoRA"}  # of which there is one alone
    name = known.get(part.replace("_", ""))
    return [*args, name] if name is not None else list(args)
