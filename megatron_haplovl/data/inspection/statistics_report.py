"""The numbers of a prefix, for the terminal and as a page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from megatron_haplovl.data.inspection.page import page
from megatron_haplovl.data.inspection.statistics import Histogram, Statistics
from megatron_haplovl.data.inspection.terminal import harmless

_COLUMNS = 40  # characters of the longest bar


def show_statistics(statistics: Statistics) -> str:
    """Lines for the terminal."""
    lines = [statistics.prefix, *(f"  {name:<28}{value}" for name, value in statistics.facts)]
    for histogram in statistics.histograms:
        lines += ["", f"  {histogram.title}: {histogram.note}"]
        largest = max(number for _, number in histogram.bars)
        for name, number in histogram.bars:
            lines.append(f"  {name:>16} {number:>9} {'#' * -(-number * _COLUMNS // max(largest, 1))}")
    for title, rows in _tables(statistics):
        if rows:
            lines += ["", f"  {title}"]
            lines += [f"  {number:>9}  {harmless(' '.join(texts))}" for number, *texts in rows]
    return "\n".join(lines)


def statistics_page(all_statistics: Sequence[Statistics]) -> str:
    """A page with a chapter for each prefix."""
    body = []
    for statistics in all_statistics:
        body.append(f"<h2>{html.escape(statistics.prefix)}</h2>")
        body.append(_table(("", ""), ((name, value) for name, value in statistics.facts)))
        body += map(_bars, statistics.histograms)
        for title, rows in _tables(statistics):
            if rows:
                body.append(f"<h3>{html.escape(title)}</h3>")
                body.append(_table(("", "records"), ((" ".join(texts), str(number)) for number, *texts in rows)))
    return page("Statistics of " + ", ".join(statistics.prefix for statistics in all_statistics), "\n".join(body))


def _tables(statistics: Statistics) -> list[tuple[str, list[tuple[int, str] | tuple[int, str, str]]]]:
    return [
        ("records that were repaired", [(number, name) for name, number in statistics.repairs.items()]),
        ("records with a key that nothing reads", [(number, key) for key, number in statistics.unread_keys.items()]),
        ("records that were left out", [(number, reason) for reason, number in statistics.left_out.items()]),
        (
            "records that cannot be used, and the first of each reason",
            [(bad.number, bad.reason, f"({bad.example})") for bad in statistics.bad_records],
        ),
    ]


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><td>{html.escape(left)}</td><td>{html.escape(right)}</td></tr>" for left, right in rows)
    titles = f"<tr><th>{head[0]}</th><th>{head[1]}</th></tr>" if any(head) else ""
    return f"<table>{titles}{lines}</table>"


def _bars(histogram: Histogram) -> str:
    largest = max(max(number for _, number in histogram.bars), 1)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{number}</td>"
        f'<td><div class="bar" style="width: {300 * number // largest}px"></div></td></tr>'
        for name, number in histogram.bars
    )
    title, note = html.escape(histogram.title), html.escape(histogram.note)
    return f"<h3>{title}</h3><p>{note}</p><table>{rows}</table>"
