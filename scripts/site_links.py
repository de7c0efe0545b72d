"""Copy repository files that the documentation links to into the site, so that such links work there too.

This is a hook of mkdocs (see mkdocs.yml). In the repository a page links to ``../recipes/limber.yaml``, a file outside
of docs/, which a site built from docs/ alone does not contain.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\((\.\./[^)#]+)\)")


def outside(page: str, target: str) -> str | None:
    """Return the path in the repository of a link's target; None if it is in docs/ or does not exist.

    Args:
        page: the path of the linking page inside docs/.
        target: the link, relative to the page.
    """
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") or not (ROOT / path).is_file() else path


def on_files(files: Any, config: Any) -> Any:
    """Add the linked files to the site, under files/."""
    from mkdocs.structure.files import File

    links = {outside(page.src_uri, link) for page in files for link in _links(page)}
    for path in sorted(filter(None, links)):
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return a page's text with links to these files in place of links that leave docs/."""
    return rewritten(markdown, page.file.src_uri)


def rewritten(markdown: str, page: str) -> str:
    """Return the text of a page, its path given inside docs/, with links to the files' copies."""

    def copy_of(link: re.Match[str]) -> str:
        path = outside(page, link[1])
        return f"]({posixpath.relpath(f'files/{path}', posixpath.dirname(page) or '.')})" if path else link[0]

    return LINK.sub(copy_of, markdown)


def _links(page: Any) -> list[str]:
    return LINK.findall(page.content_string) if page.is_documentation_page() else []
