"""From the text of a docstring to the Markdown of a page."""

import inspect
import re
from collections.abc import Collection
from typing import Final

_ROLE: Final = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(?P<short>~?)(?P<target>[\w.]+)`")
_CODE: Final = re.compile(r"^\.\. code-block:: python\n\n(?P<code>(?:    .*\n|\n)+)", re.MULTILINE)
_EXAMPLE: Final = re.compile(r"^Example:$", re.MULTILINE)  # what the parser takes for a section is the plural


def as_markdown(text: str, module: str, names: Collection[str]) -> str:
    """Turn roles of Sphinx into links, which are plain code where the target has no page, and code into fenced blocks.

    Args:
        text: A docstring, without indentation.
        module: Where it stands.
        names: What the module has, by name: a role may name these without saying where they are.
    """

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        label = target.rpartition(".")[2] if match["short"] else target
        path = f"{module}.{target}" if target.partition(".")[0] in names else target
        return f'<autoref identifier="{path}" optional><code>{label}</code></autoref>'

    fenced = _CODE.sub(lambda match: f"```python\n{inspect.cleandoc(match['code'])}\n```\n\n", text)
    return _EXAMPLE.sub("Examples:", _ROLE.sub(link, fenced))
