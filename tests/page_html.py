"""Reads a result page: a parser that checks that elements nest, and tables as text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "wbr", "br", "hr", "input"}


class Tree(HTMLParser):
    """Checks that elements nest, and keeps (tag, attributes, text) of each in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.seen: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {[self.seen[i][0] for i in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.seen) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.seen[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.seen[i][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, " ".join("".join(text).split())) for name, attrs, text in self.seen if name == tag]


def rows_of(text: str) -> list[list[str]]:
    """The first table's cells, without what its rows open to."""
    body = re.sub(r'(?s)<tr class="more".*?</tr>', "", text[text.index("<tbody>") : text.index("</tbody>")])
    cells = re.compile(r"<t[dh][^>]*>(.*?)</t[dh]>", re.S)
    plain = [[re.sub("<[^>]+>", "", cell) for cell in cells.findall(row)] for row in body.split("</tr>")]
    return [[" ".join(cell.split()) for cell in row] for row in plain if row]
