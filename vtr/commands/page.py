"""``vtr page``: result files become one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def page_command(
    results: Annotated[
        list[Path] | None, typer.Argument(help="result files (JSON) in any mix, or folders of them", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="the folder for index.html (and table.md, table.csv)")] = Path("site"),
    title: Annotated[str | None, typer.Option(help="the page's title; default: what was measured")] = None,
    gallery: Annotated[int, typer.Option(min=0, help="show so many pictures with their kept tokens")] = 0,
    gallery_policy: Annotated[
        list[str] | None, typer.Option(help="a policy of the gallery; may be given again", show_default="the results'")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="also write the leaderboard as table.md")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="also write the leaderboard as table.csv")] = False,
    readme: Annotated[Path | None, typer.Option(help="write the tables into this README's markers instead")] = None,
) -> None:
    """Make one HTML page of what `vtr eval` and `vtr bench` measured: nothing else to host, nothing fetched.

    Leaderboard, accuracy against cost, accuracy by kind of question, the benches' tables, hardware, versions and the
    commands to measure again. Sections without a result file are left out.

    * `vtr page eval/results --out site` — all result files of a folder

    * `vtr page pocket.json scale.json --out site --markdown --csv`

    * `vtr page pocket.json --gallery 4` — with pictures, run on the pocket model (a minute on two cores)

    * `vtr page eval/results --readme README.md` — fill `<!-- vtr:table NAME -->` … `<!-- /vtr:table -->` from NAME.json
    """
    from vtr.commands._console import check_folder, console, fail

    try:
        if readme is not None:
            from vtr.eval.report import readme as tables

            console.print(tables.update(readme, results or []))
            return
        check_folder(out)
        from vtr.eval.report import page

        written = page.write(
            results or [],
            out,
            title=title,
            pictures=gallery,
            policies=gallery_policy or [],
            markdown=markdown,
            csv=csv,
        )
        for path in written:
            console.print(f"wrote [bold]{path}[/]", highlight=False, soft_wrap=True)
    except (ValueError, OSError) as error:
        raise fail(error) from error
