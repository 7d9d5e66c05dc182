"""A page as parts, written as Markdown and as one HTML file that opens from disk.

A part is (kind, what): title, heading, text, list (of texts), table (rows of cells, the first its head), picture (a PNG's
path), page (another page's path), code, or lines (rows of results, as they stand in their files). `cited` puts the row that a figure comes from
into any text or cell: a link to its line in Markdown, to the line at the end of the page in HTML.
"""

import base64
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STYLE = "body{font:16px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}td,th{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:left}table{border-collapse:collapse;font-size:90%}img{max-width:100%}pre{overflow-x:auto;font-size:75%;background:#f6f6f6;padding:1em}"
CITED = re.compile(r"\[\[(\S+)#L(\d+) ([^\]]+)\]\]")  # as `cited` writes it


def cited(row: Mapping[str, Any], text: str) -> str:
    """The text, and which row it is read from: `row` has the name of its `file` and its `line` there."""
    return f"[[{row['file']}#L{row['line']} {text}]]"


def markdown(parts: list[tuple], results: str = "../results") -> str:
    """The page; `results` leads from its folder to that of the files of results."""

    def linked(text: str) -> str:
        return CITED.sub(rf"[\3]({results}/\1#L\2)", text)

    def cell(text: str) -> str:
        return linked(text).replace("|", "\\|")

    def table(rows: list[list[str]]) -> str:
        lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
        return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])

    write = {
        "title": lambda text: f"# {text}",
        "heading": lambda text: f"## {text}",
        "text": linked,
        "list": lambda lines: "\n".join(f"- {linked(line)}" for line in lines),
        "table": table,
        "picture": lambda path: f"![{path.stem}]({path.name})",
        "page": lambda path: f"[{path.stem}]({path.stem}.md)",
        "code": lambda text: f"```json\n{text}\n```",
        "lines": lambda lines: f"Each figure leads to its line in [{results}]({results}).",
    }
    return "\n\n".join(write[kind](what) for kind, what in parts) + "\n"


def as_html(parts: list[tuple]) -> str:
    """One file that opens from disk: pictures and lines are inside."""

    def linked(text: str) -> str:
        return CITED.sub(r'<a href="#\1-L\2">\3</a>', html.escape(text))

    def table(rows: list[list[str]]) -> str:
        head, *body = rows
        lines = ["".join(f"<td>{linked(cell)}</td>" for cell in row) for row in body]
        names = "".join(f"<th>{linked(cell)}</th>" for cell in head)
        return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in [names, *lines]) + "</table>"

    def picture(path: Path) -> str:
        inside = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{inside}">'

    def line(row: Mapping[str, Any]) -> str:
        name = html.escape(f"{row['file']}-L{row['line']}")
        return f'<pre id="{name}">{html.escape(row["json"])}</pre>'

    write = {
        "title": lambda text: f"<title>{html.escape(text)}</title><h1>{html.escape(text)}</h1>",
        "heading": lambda text: f"<h2>{html.escape(text)}</h2>",
        "text": lambda text: f"<p>{linked(text)}</p>",
        "list": lambda lines: f"<ul>{''.join(f'<li>{linked(line)}</li>' for line in lines)}</ul>",
        "table": table,
        "picture": picture,
        "page": lambda path: f'<p><a href="{path.stem}.html">{path.stem}</a></p>',
        "code": lambda text: f"<pre>{html.escape(text)}</pre>",
        "lines": lambda rows: "\n".join(map(line, rows)),
    }
    body = "\n".join(write[kind](what) for kind, what in parts)
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><style>{STYLE}</style>\n{body}\n</html>\n'


def citations(parts: list[tuple]) -> set[tuple[str, int]]:
    """Files and lines that the parts cite."""
    return {(file, int(line)) for file, line, _ in CITED.findall(str(parts))}
