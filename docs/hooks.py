"""mkdocs: pages that are not in docs/, links between pages, and nothing from other hosts.

Links are written as they work in the repository. In the site a page is at its path without docs/;
what else a link leads to stays in the repository and becomes a text that shows its path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
BROUGHT = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.png",
    "csrc/README.md",
)
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)")
_LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?(https?:)?//[^>]*>")

_FORMULA = re.compile(r"<[a-z_]+, [^>]*>")  # <a, d> outside of code


def on_files(files: Any, config: Any) -> Any:
    """Bring the pages that stand elsewhere."""
    for pattern in BROUGHT:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links of the repository into those of the site."""
    here = page.file.src_uri
    place = here if _is_brought(page.file) else f"docs/{here}"
    known = {file.src_uri for file in files if not file.inclusion.is_excluded()}

    def translated(match: re.Match[str]) -> str:
        is_image, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or ":" in path:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
        uri = path.removeprefix("docs/")
        if uri in known:
            link = posixpath.relpath(uri, posixpath.dirname(here) or ".")
            shown = f"{is_image}[{text}]({link}{hash_}{anchor})"
            return f"[{shown}]({link})" if is_image else shown  # to enlarge it on a telephone
        if is_image or not (ROOT / path).exists():
            raise PluginError(f"{place}: {target} leads to nothing")
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path})"
        return f'<span title="{path}">{text}</span>'

    parts = _FENCED.split(markdown)
    return "".join(part if k % 2 else _LINK.sub(translated, part) for k, part in enumerate(parts))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Pages load nothing from other hosts, and no formula is taken for a tag."""
    if found := _LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from another host: {found[0]}")
    if found := _FORMULA.search(output):
        raise PluginError(f"{page.file.src_uri}: {found[0]} is not seen; put it in backticks")
    return output


def _is_brought(file: Any) -> bool:
    return not file.src_dir
