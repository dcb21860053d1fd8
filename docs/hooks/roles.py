"""What the docstrings write as Sphinx reads it, for mkdocstrings: links, an example, lines of references."""

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Turn ``:class:`~a.B` `` into a link to `a.B` where there is such a thing, else into its name as code."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """Rewrite all docstrings of a package."""
        del kwargs
        places: dict[str, set[str]] = {}
        objects = list(_objects(pkg))
        for one in objects:
            if one.docstring is None or re.search(r"\._[^_]", one.path):  # which no page shows
                continue
            for name in (one.name, ".".join(one.path.rsplit(".", 2)[-2:])):
                places.setdefault(name, set()).add(one.path)
        for one in objects:
            if one.docstring:
                text = ROLE.sub(lambda match, here=one: _link(match, here, places), one.docstring.value)
                text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
                one.docstring.value = re.sub(r"^( +)\| ", r"\1- ", text, flags=re.MULTILINE)


def _objects(there: griffe.Object):
    yield there
    for member in there.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _link(match: re.Match[str], here: griffe.Object, places: dict[str, set[str]]) -> str:
    short = match[2].rpartition(".")[2] if match[1] else match[2]
    name = match[2]
    ends = (name, name.rpartition(".")[2]) if name.startswith("grade_lightning.") else (name,)
    found = {path for end in ends for path in places.get(end, ())}
    if len(found) > 1:  # the nearest
        found = {path for path in found if path.rpartition(".")[0] == (here.parent or here).path} or found
    return f"[`{short}`][{found.pop()}]" if len(found) == 1 else f"`{short}`"
