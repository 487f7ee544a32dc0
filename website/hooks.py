"""Hooks of mkdocs: pages of the repository's root, links that hold on both sides, and nothing from outside."""

import re
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from website import roots

_MOVED: Final = {"README.md": "index.md", **roots.PAGES}
_SOURCES: Final = {place: source for source, place in _MOVED.items()}
_ASSET: Final = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*?\bsrc=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|icon|preconnect))[^>]*?\bhref=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|@import\s+["'(]?(?:https?:)?//|url\(["']?(?:https?:)?//"""
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the root that are pages."""
    for source, place in _MOVED.items():
        text = (roots.ROOT / source).read_text(encoding="utf-8")
        if source == "README.md":
            text = roots.landing(text)
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Fit a page to the site."""
    source = _SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    shown = roots.unfolded(roots.fitted(markdown), (roots.ROOT / source).parent)
    return roots.relinked(shown, source, _MOVED)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that would load anything from elsewhere."""
    site = Path(config.site_dir)
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        found = _ASSET.search(path.read_text(encoding="utf-8"))
        if found:
            raise PluginError(f"{path.relative_to(site)} loads something from outside: {found.group()}")
