"""The page of every option: what the classes behind the command line say of their arguments."""

from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
TOP = """# Every option

An option is an argument of a class, behind the place where the class is: `--model.policy.path gpt2` is `path` of
`Policy`. What has no default is required. Arguments that a class hands on (`**kwargs`) are those of the class that its
section names. `grade-fit --model.help NAME` shows the same for one method, `grade-fit --model NAME --print_config` all
values.

`-c`, `--config FILE` reads options from a file, `--seed_everything 42` is the seed of the run, `--ckpt_path` the
checkpoint to start from or the run to resume, `--print_config` shows all values and ends, `--preflight` (`grade-fit`)
shows what a run would need and ends, `--output FILE` (`grade-predict`, `grade-test`) is where completions are written.
`--trainer.…` are the arguments of
[Lightning's Trainer](https://lightning.ai/docs/pytorch/stable/common/trainer.html#trainer-flags).
"""
SECTIONS = {  # what is written before the argument: the packages whose public classes may be there
    "--data": ["data.datamodule"],
    "--data.source": ["data.sources", "data.reviews", "data.sums"],
    "--model": ["modules", "methods"],
    "--model.policy": ["policies.policy"],
    "--model.policy.lora": ["policies.lora"],
    "--model.training_pass": ["policies.passes"],
    "--model.sampler": ["rollouts.sampler"],
    "--model.sampler.engine": ["rollouts.transformers", "rollouts.turns", "rollouts.branching"],
    "--model.reward": ["rewards"],
    "--model.kl": ["kl"],
    "--model.estimator": ["estimators"],
    "--model.tau": ["schedules"],
    "--model.selection": ["selection"],
    "--model.correction": ["corrections"],
    "--completions": ["callbacks.completions"],
    "--export": ["callbacks.export"],
    "--gradient_variance": ["callbacks.gradient_variance"],
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Write the page."""
    package = griffe.load("grade_lightning", search_paths=[str(ROOT)], docstring_parser="google")
    lines = [TOP]
    for prefix, places in SECTIONS.items():
        lines.append(f"## {prefix}\n")
        for place in places:
            for one in _classes(package[place]):
                lines += _section(one)
    files.append(File.generated(config, "reference/options.md", content="\n".join(lines)))
    return files


def _classes(there: griffe.Object) -> Iterator[griffe.Class]:
    for member in there.members.values():
        if member.is_alias or member.name.startswith("_"):
            continue
        if isinstance(member, griffe.Module):
            yield from _classes(member)
        elif isinstance(member, griffe.Class) and "__init__" in member.members:
            yield member


def _section(one: griffe.Class) -> Iterator[str]:
    """Heading and table of a class; nothing if it has no arguments of its own."""
    said = _said(one)
    rows = []
    for parameter in one["__init__"].parameters:
        if parameter.name == "self" or parameter.name.startswith("*"):
            continue
        if parameter.kind in (griffe.ParameterKind.var_keyword, griffe.ParameterKind.var_positional):
            continue
        default = "required" if parameter.default is None else f"`{parameter.default}`"
        rows.append(f"| `{parameter.name}` | {_cell(default)} | {_cell(said.get(parameter.name, ''))} |")
    if rows:
        bases = ", ".join(f"`{str(base).rpartition('.')[2]}`" for base in one.bases)
        yield f"### {one.name}\n"
        yield f"[`{one.name}`][{one.path}]" + (f", a {bases}.\n" if bases else ".\n")
        yield "| option | default | what |\n|---|---|---|"
        yield from rows
        yield ""


def _said(one: griffe.Class) -> dict[str, str]:
    for docstring in (one.docstring, one["__init__"].docstring):
        for part in docstring.parsed if docstring else ():
            if part.kind is griffe.DocstringSectionKind.parameters:
                return {entry.name.lstrip("*"): entry.description for entry in part.value}
    return {}


def _cell(text: str) -> str:
    plain = " ".join(text.split()).replace("|", "\\|")
    while ":`" in plain:  # a role of Sphinx: its last name
        before, _, rest = plain.partition(":`")
        name, _, after = rest.partition("`")
        plain = f"{before[: before.rfind(':')]}`{name.lstrip('~').rpartition('.')[2]}`{after}"
    return plain
