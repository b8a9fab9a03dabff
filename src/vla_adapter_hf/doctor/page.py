"""The report as text for a terminal, and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
import os
from typing import Any

import numpy as np
from PIL import Image

from vla_adapter_hf.doctor.findings import SEVERITIES, Finding, Report, Verdict, plain
from vla_adapter_hf.utils.files import write_text


SHOWN_EPISODES = 20

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2530; background: #f5f6f8; margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
section.finding { background: #fff; border-left: 6px solid; border-radius: 4px; padding: .8rem 1rem; margin: .7rem 0; }
section.high { border-color: #c62828; } section.medium { border-color: #ef8f00; }
section.low { border-color: #5c7fa3; }
.finding h3 { margin: 0 0 .3rem; font-size: 1.02rem; }
.badge { font-size: .75rem; text-transform: uppercase; letter-spacing: .05em; color: #57626e; margin-right: .5rem; }
.evidence { color: #44505c; font-size: .88rem; } p { margin: .3rem 0; }
table { border-collapse: collapse; background: #fff; font-size: .88rem; width: 100%; }
td, th { border-bottom: 1px solid #e3e6ea; padding: .3rem .6rem; text-align: left; vertical-align: top; }
pre { background: #1c2530; color: #e8edf2; padding: .8rem; border-radius: 4px; white-space: pre-wrap; }
img { max-width: 100%; background: #fff; image-rendering: auto; } figure { margin: .8rem 0; }
.verdicts { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .7rem; }
.verdict { background: #fff; border-top: 5px solid #8a96a3; border-radius: 4px; padding: .6rem .8rem; }
.verdict span, .verdict small { display: block; color: #57626e; font-size: .82rem; }
.verdict b { display: block; font-size: 1.15rem; margin: .1rem 0 .3rem; }
.verdict.good { border-color: #2e7d32; } .verdict.fair { border-color: #ef8f00; }
.verdict.bad { border-color: #c62828; } .wide { overflow-x: auto; } .wide td { white-space: nowrap; }
figcaption { color: #57626e; font-size: .85rem; }
"""


def words(value: Any) -> str:
    """A plain value in one line."""
    value = plain(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(words(inner) for inner in value)
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def listed_episodes(finding: Finding) -> str:
    """The numbers of a finding's episodes, cut short."""
    shown = ", ".join(map(str, finding.episodes[:SHOWN_EPISODES]))
    more = len(finding.episodes) - SHOWN_EPISODES
    return shown + (f" and {more} more" if more > 0 else "")


def as_text(report: Report) -> str:
    """The report for a terminal."""
    lines = [f"{report.dataset}"]
    if report.verdicts:
        lines.append("\npolicy")
        lines += [f"  {verdict.question}: {verdict.answer} ({verdict.reason})" for verdict in report.verdicts]
        lines.append(f"  {report.rule}")
    for title, rows in report.tables.items():
        lines += ["", title, *_text_table(rows)]
    shown = ("policy", "recording", "actions", *(name for name in report.facts if name.startswith("gripper")))
    for subject in (name for name in shown if report.facts.get(name)):
        lines.append(f"\n{subject}")
        lines += [f"  {name}: {words(value)}" for name, value in report.facts[subject].items()]
    counts = {level: sum(finding.severity == level for finding in report.findings) for level in SEVERITIES}
    lines.append("\nfindings: " + ", ".join(f"{count} {level}" for level, count in counts.items()))
    for finding in report.findings:
        lines.append(f"\n[{finding.severity}] {finding.name}")
        lines.append(f"  {words(finding.evidence)}")
        if finding.episodes:
            lines.append(f"  episodes {listed_episodes(finding)}")
        lines.append(f"  {finding.effect}")
        lines.append(f"  -> {finding.advice}")
    if report.command:
        lines.append(f"\nto train on it:\n  {report.command}")
    return "\n".join(lines)


def _text_table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of plain values in columns as wide as their longest word."""
    cells = [list(rows[0]), *([words(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(cells[0]))]
    return ["  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in cells]  # fmt: skip


def write_page(path: str | os.PathLike, report: Report) -> None:
    """Write the report as an HTML page. Pictures are inside it."""
    write_text(path, as_page(report))


def as_page(report: Report) -> str:
    """The report as HTML. Everything that comes from the dataset is escaped."""
    name = html.escape(report.dataset)
    counts = ", ".join(
        f"{sum(finding.severity == level for finding in report.findings)} {level}" for level in SEVERITIES
    )
    parts = [
        f"<h1>Check of {name}</h1><p>{counts}</p>",
        _policy(report),
        "<h2>Findings</h2>",
        *(_finding(finding) for finding in report.findings),
        "" if report.findings else "<p>Nothing was found.</p>",
        *(_wide_table(title, rows) for title, rows in report.tables.items()),
    ]
    if report.command:
        parts.append(f"<h2>To train on it</h2><pre>{html.escape(report.command)}</pre>")
    parts.append(_table("Suggested settings", report.suggestion))
    parts += [_figure(picture, caption) for caption, picture in report.pictures.items()]
    parts += [_table(subject.capitalize(), facts) for subject, facts in report.facts.items() if facts]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Check of {name}</title><style>{_STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _finding(finding: Finding) -> str:
    episodes = f'<p class="evidence">Episodes {listed_episodes(finding)}</p>' if finding.episodes else ""
    picture = (
        ""
        if finding.picture is None
        else _figure(finding.picture, "Examples, and what is usual or nearly equal to them")
    )
    return (
        f'<section class="finding {finding.severity}">'
        f'<h3><span class="badge">{finding.severity}</span>{html.escape(finding.name)}</h3>'
        f'<p class="evidence">{html.escape(words(finding.evidence))}</p>{episodes}'
        f"<p>{html.escape(finding.effect)}</p>"
        f"<p><b>What to do:</b> {html.escape(finding.advice)}</p>{picture}</section>"
    )


def _policy(report: Report) -> str:
    """The verdicts about a policy as cards, with the rule that they follow from."""
    if not report.verdicts:
        return ""
    cards = "".join(
        f'<div class="verdict {_tone(verdict)}"><span>{html.escape(verdict.question)}</span>'
        f"<b>{html.escape(verdict.answer)}</b><small>{html.escape(verdict.reason)}</small></div>"
        for verdict in report.verdicts
    )
    return f'<h2>The policy</h2><div class="verdicts">{cards}</div><p class="evidence">{html.escape(report.rule)}</p>'


def _tone(verdict: Verdict) -> str:
    """The class of a card: what is good is green. Leaning on the state is not."""
    tones = {"yes": "good", "a little": "fair", "no": "bad"}
    if verdict.question == "leans on the state":
        tones = {"yes": "bad", "no": "good"}
    return tones.get(verdict.answer, "neutral")


def _wide_table(title: str, rows: list[dict[str, Any]]) -> str:
    """A table with a row for each entry; it scrolls sideways where the screen is narrow."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(words(value))}</td>" for value in row.values()) + "</tr>" for row in rows
    )
    return f'<h2>{html.escape(title)}</h2><div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _table(title: str, values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(words(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<h2>{html.escape(title)}</h2><table>{rows}</table>"


def _figure(picture: np.ndarray, caption: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
