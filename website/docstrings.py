"""How docstrings become pages: attrs classes have their signatures, and roles of Sphinx become links."""

import inspect
import re
from collections.abc import Iterator
from typing import Any, Final

import attrs
import griffe

from website.roles import as_markdown

_PRIVATE: Final = re.compile(r"\b_[a-z]")
"""A value that is made of private functions, as losses are, says nothing to readers."""


class Docstrings(griffe.Extension):
    """What the static reading of sources does not know."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Link what docstrings refer to, sign attrs classes, and give functions the names by which they are called."""
        _prepare(pkg, pkg)
        _uncover(pkg)


def _prepare(thing: griffe.Object, module: griffe.Module) -> None:
    """Go through a module, or what is in it."""
    if thing.docstring:
        thing.docstring.value = as_markdown(thing.docstring.value, module.path, module.members)
    if isinstance(thing, griffe.Attribute) and _PRIVATE.search(str(thing.value)):
        thing.value = None
    if isinstance(thing, griffe.Class) and any("attrs." in str(one.value) for one in thing.decorators):
        thing.set_member("__init__", _initialiser(thing))
    for member in thing.members.values():
        if isinstance(member, griffe.Object):
            _prepare(member, member if isinstance(member, griffe.Module) else module)


def _initialiser(record: griffe.Class) -> griffe.Function:
    """Make the constructor's signature: kinds and defaults as imported, annotations as written."""
    found = griffe.dynamic_import(record.path)
    written = {attribute.alias: attribute.name for attribute in attrs.fields(found)}
    parameters = []
    for parameter in inspect.signature(found.__init__).parameters.values():
        member = record.all_members.get(written.get(parameter.name, ""))
        parameters.append(
            griffe.Parameter(
                parameter.name,
                annotation=member.annotation if isinstance(member, griffe.Attribute) else None,
                kind=griffe.ParameterKind[parameter.kind.name.lower()],
                default=None if parameter.default is inspect.Parameter.empty else _shown(parameter.default),
            )
        )
    return griffe.Function("__init__", parameters=griffe.Parameters(*parameters), returns="None", parent=record)


def _shown(default: object) -> str:
    if default is attrs.NOTHING:
        return "..."  # made anew for each
    return getattr(default, "__name__", None) or repr(default)


def _uncover(package: griffe.Module) -> None:
    """Let ``package.name`` be the function that is imported into it, and not the module in which it is written."""
    modules = list(_modules(package))
    covering = [
        module
        for module in modules
        if module.parent and module.parent.imports.get(module.name) == f"{module.path}.{module.name}"
    ]
    written = {member.path: member for module in covering for member in module.members.values()}
    for module in modules:
        for name, path in module.imports.items():
            if path in written:
                module.set_member(name, griffe.Alias(name, written[path], parent=module))


def _modules(parent: griffe.Module) -> Iterator[griffe.Module]:
    yield parent
    for member in parent.members.values():
        if isinstance(member, griffe.Module):
            yield from _modules(member)
