"""Hook of mkdocs: what docstrings, links and pictures say that only the repository can show, as the site shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):<code>(~?)([\w.]+)</code>")
"""Sphinx's way of naming things in docstrings; after ``~`` stands a name of which the last part is shown."""
OUT = re.compile(r'<a href="((?:\.\./)+)([^":#]*)(#[^"]*)?">')
"""Links out of the docs: mkdocs has found no page for them. What they name lies in the repository."""
PICTURE = re.compile(r"\]\((?:\.\./)+(eval/results/[\w-]+\.png)\)")
"""Pictures of result files, which lie outside of the docs."""

SEARCH = "<!-- vtr:search -->"
"""Where a page wants a box that filters the table behind it; elsewhere than on the site it is not seen."""
BOX = """<input id="vtr-search" type="search" placeholder="a class, a decoder, a path …" aria-label="Filter the table">
<script>
document.getElementById("vtr-search").addEventListener("input", ({target}) => {
  const words = target.value.toLowerCase().split(/\\s+/);
  for (const row of document.querySelectorAll("table tbody tr"))
    row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
});
</script>"""


def on_config(config: Any) -> Any:
    """Pages of methods that the navigation does not name come behind the others, so that a new one need not edit it."""
    methods = next(part["Methods"] for part in config.nav if "Methods" in part)
    named = {page for part in methods for page in part.values()}
    there = sorted(page.relative_to(config.docs_dir).as_posix() for page in Path(config.docs_dir).glob("methods/*.md"))
    methods += [page for page in there if page not in named]
    return config


def on_files(files: Any, config: Any) -> Any:
    """The results' pictures get a place on the site."""
    for path in sorted(Path(config.config_file_path).parent.glob("eval/results/*.png")):
        files.append(File.generated(config, f"pictures/of-results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    up = "../" * page.file.src_uri.count("/")
    return PICTURE.sub(lambda found: f"]({up}pictures/of-results/{Path(found[1]).name})", markdown)


def on_page_content(html: str, page: Any, config: Any, **kwargs: Any) -> str:
    html = html.replace(SEARCH, BOX)
    html = ROLE.sub(lambda found: f"<code>{found[2].rpartition('.')[2] if found[1] else found[2]}</code>", html)
    root = Path(config.config_file_path).parent
    here = Path(config.docs_dir, page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        target = (here / found[1] / found[2]).resolve()
        if not target.exists() or not target.is_relative_to(root) or target.is_relative_to(config.docs_dir):
            return found[0]
        kind = "tree" if target.is_dir() else "blob"
        return f'<a href="{config.repo_url.rstrip("/")}/{kind}/main/{target.relative_to(root)}{found[3] or ""}">'

    return OUT.sub(link, html)
