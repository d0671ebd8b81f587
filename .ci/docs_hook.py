"""Hook of mkdocs: what docstrings and links say that only the repository can show, as the site can show it."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):<code>(~?)([\w.]+)</code>")
"""Sphinx's way of naming things in docstrings; after ``~`` stands a name of which the last part is shown."""
LEFT_OVER = re.compile(r'<a href="(?:\.\./)+([^":#]+\.(?:md|py|ipynb|json))">(.*?)</a>', re.S)
"""Links out of the docs: mkdocs has found no page for them."""


def on_page_content(html: str, **kwargs: Any) -> str:
    html = ROLE.sub(lambda found: f"<code>{found[2].rpartition('.')[2] if found[1] else found[2]}</code>", html)
    return LEFT_OVER.sub(r'<span title="\1, in the repository">\2</span>', html)
