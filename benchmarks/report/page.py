"""A report: what it says, and the three forms it is written in."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template
from textwrap import indent
from typing import Any

from benchmarks.report.charts import Chart
from benchmarks.report.rollouts import Series
from benchmarks.report.text import html_text, markdown_text
from rewards.terminal import visible

GOOD, BAD = ("done", "pass", "holds here"), ("failed", "FAIL", "does not hold here")

SHORT = 28
"""Characters of a cell that stay on a line."""


@dataclass(frozen=True)
class Table:
    """Rows of texts. The texts may come from anywhere and are escaped.

    Attributes:
        columns: their headings.
        rows: as wide.
        title: stands above; may be left out.
        note: stands below; may be left out.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""

    def html(self) -> str:
        heads = "".join(f'<th scope="col">{html_text(column)}</th>' for column in self.columns)
        rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in self.rows)
        caption = f"<caption>{html_text(self.title)}</caption>" if self.title else ""
        label = html_text(self.title or "table")
        note = f'<p class="note">{html_text(self.note)}</p>' if self.note else ""
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{caption}<thead><tr>{heads}</tr>'
            f"</thead><tbody>{rows}</tbody></table></div>{note}"
        )

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        escaped = [line if i == 1 else [markdown_text(text) for text in line] for i, line in enumerate(lines)]
        title = f"**{markdown_text(self.title)}**\n\n" if self.title else ""
        note = f"\n\n{markdown_text(self.note)}" if self.note else ""
        return title + "\n".join(f"| {' | '.join(line)} |" for line in escaped) + note


def _cell(text: str) -> str:
    marks = ["good"] * (text in GOOD) + ["bad"] * (text in BAD) + ["short"] * (len(text) <= SHORT)
    return f'<td class="{" ".join(marks)}">{html_text(text)}</td>'


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading.

    Attributes:
        title: the heading.
        text: what one should know, a paragraph each.
        charts: side by side, with one legend.
        tables: below them.
        folded, folded_charts: tables and charts that are shown on demand.
        logs: by title, what programs have printed.
    """

    title: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    folded_charts: Sequence[Chart] = ()
    logs: Mapping[str, str] = field(default_factory=dict)

    @property
    def anchor(self) -> str:
        """In links to it."""
        return hashlib.sha256(self.title.encode()).hexdigest()[:8]

    @property
    def empty(self) -> bool:
        """Whether it has nothing to show, and is left out."""
        return not (self.charts or self.tables or self.folded or self.folded_charts or self.logs)

    def html(self) -> str:
        parts = [f"<p>{html_text(paragraph)}</p>" for paragraph in self.text]
        if self.charts:
            parts += [_legend(self.charts), '<div class="charts">', *map(_figure, self.charts), "</div>"]
        parts += [table.html() for table in self.tables]
        parts += [
            f"<details><summary>{html_text(table.title)}</summary>{Table(table.columns, table.rows).html()}</details>"
            for table in self.folded
        ]
        if self.folded_charts:
            figures = "".join(map(_figure, self.folded_charts))
            summary = f"{len(self.folded_charts)} more metrics"
            parts.append(f'<details><summary>{summary}</summary><div class="charts">{figures}</div></details>')
        parts += [
            f'<h3>{html_text(title)}</h3><pre class="scroll" tabindex="0">{html_text(text)}</pre>'
            for title, text in self.logs.items()
        ]
        return (
            f'<section id="s{self.anchor}" aria-labelledby="h{self.anchor}"><h2 id="h{self.anchor}">'
            f"{html_text(self.title)}</h2>{''.join(parts)}</section>"
        )

    def markdown(self) -> str:
        parts = [f"## {markdown_text(self.title)}", *map(markdown_text, self.text)]
        parts += [table.markdown() for table in (*self.tables, *self.folded)]
        # Lines that are set in by four spaces are shown as they are, whatever they hold.
        parts += [f"### {markdown_text(title)}\n\n{indent(visible(text), '    ')}" for title, text in self.logs.items()]
        return "\n\n".join(parts)


def _figure(chart: Chart) -> str:
    kind = f' data-x="{html_text(chart.x_kind)}"' if chart.x_kind else ""
    return f"<figure{kind}><figcaption>{html_text(chart.title)}</figcaption>{chart.svg()}</figure>"


def _legend(charts: Sequence[Chart]) -> str:
    """A switch for each line, and one for what is drawn to the right where there is a choice."""
    lines = {line.number: line for chart in charts for line in chart.lines}
    kinds = list(dict.fromkeys(chart.x_kind for chart in charts if chart.x_kind))
    parts = []
    if len(lines) > 1:
        parts += [
            f'<button type="button" class="key {line.colour}" aria-pressed="true" data-line="{number}">'
            f'<span class="swatch"></span>{html_text(line.name)}</button>'
            for number, line in sorted(lines.items())
        ]
    if len(kinds) > 1:
        options = "".join(f'<option value="{html_text(kind)}">{html_text(kind)}</option>' for kind in kinds)
        parts.append(f'<label class="x">against <select class="x-kind">{options}</select></label>')
    return f'<div class="legend">{"".join(parts)}</div>' if parts else ""


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: what it is about.
        status: one word on how far that is, such as ``"done"`` or ``"running"``.
        facts: what stands at the top, by name.
        notices: what one should know before reading on.
        sections: the rest.
        series: rollouts to browse.
        write_csv: writes the curves to the path that it is given.
    """

    title: str
    status: str
    facts: Mapping[str, str]
    notices: Sequence[str]
    sections: Sequence[Section]
    series: Sequence[Series]
    write_csv: Callable[[Path], None]

    def html(self) -> str:
        """The page, whole."""
        script, style = _part("page.js"), _part("page.css")
        packed = [series.packed() for series in self.series]
        facts = "".join(
            f"<div class='fact'><dt>{html_text(name)}</dt><dd>{html_text(value)}</dd></div>"
            for name, value in self.facts.items()
            if value
        )
        shown = [section for section in self.sections if not section.empty]
        links = "".join(f'<a href="#s{section.anchor}">{html_text(section.title)}</a>' for section in shown)
        return Template(_part("page.html")).substitute(
            policy=f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'; "
            "form-action 'none'",
            title=html_text(self.title),
            status=html_text(self.status),
            facts=facts,
            notices="".join(f"<p class='notice'>{html_text(notice)}</p>" for notice in self.notices),
            links=links + ('<a href="#rollouts">Rollouts</a>' if packed else ""),
            sections="".join(section.html() for section in shown),
            rollouts=_part("rollouts.html") if packed else "",
            style=style,
            script=script,
            index=script_json([series.head() for series in self.series]),
            blocks="".join(
                f'<script type="application/octet-stream" id="block-{i}">{block}</script>\n'
                for i, block in enumerate(packed)
            ),
        )

    def markdown(self) -> str:
        """What the page says, without rollouts and curves."""
        parts = [f"# {markdown_text(self.title)}", f"Status: {markdown_text(self.status)}."]
        parts += [f"> {markdown_text(notice)}" for notice in self.notices]
        parts.append(
            "\n".join(f"- {markdown_text(name)}: {markdown_text(value)}" for name, value in self.facts.items() if value)
        )
        return "\n\n".join([*parts, *(section.markdown() for section in self.sections if not section.empty)]) + "\n"

    def write(self, path: Path) -> None:
        """Write ``path``, and beside it the same as ``.md`` and its curves as ``.csv``."""
        path.write_text(self.html(), encoding="utf-8")
        path.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")
        self.write_csv(path.with_suffix(".csv"))


def script_json(content: Any) -> str:
    """``content`` as JSON that may stand in a script element: nothing in it ends that or begins a comment."""
    text = json.dumps(content, allow_nan=False)  # all that is not ASCII is escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    return files("benchmarks.report").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
