"""One HTML page about samples, complete in itself: no script, no address of anything else."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.inspection.drawing import data_uri, draw_image
from megatron_haplovl.data.inspection.mask_picture import mask_png
from megatron_haplovl.data.inspection.view import SampleView, TextRun, VisualRun

_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: 1em; }
mark { background: #bfe8bf; }
.visual { color: #06c; }
svg { margin: .3em; background: white; }
.canvas { fill: black; }
.tile { fill: none; stroke: #06c; stroke-width: 2; }
.patch { fill: none; stroke: #fff; stroke-opacity: .35; stroke-width: .5; }
.newline { fill: #c60; }
table { border-collapse: collapse; }
td, th { padding: .1em .8em; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.bar { background: #06c; height: .8em; }
"""


def page(title: str, body: str) -> str:
    """A whole page around a body of HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        # Nothing may be loaded, whatever stands in a text.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def sample_page(view: SampleView, vision: VisionConfig, pack: Sequence[SampleView] = (), pack_title: str = "") -> str:
    """The page of a sample: its text, its images and its mask, and the pack that it stands in.

    Args:
        view: the sample.
        vision: how the model sees images.
        pack: all documents of the pack in order, if one is to be shown.
        pack_title: what the pack is.
    """
    body = [f"<p>{html.escape(view.summary)}. Trained text is <mark>marked</mark>.</p>", f"<pre>{_text(view)}</pre>"]
    for run in view.runs:
        if isinstance(run, VisualRun):
            body.append(_visual(run, vision))
    body += ["<h2>Mask</h2>", _mask([view], "rows are queries, columns keys; dark is visible")]
    if pack:
        body.append(f"<h2>{html.escape(pack_title)}</h2><table><tr><th>document</th><th>tokens</th></tr>")
        for document in pack:
            chosen = " (this one)" if document.title == view.title else ""
            name = html.escape(document.title + chosen)
            body.append(f"<tr><td>{name}</td><td>{len(document.kv_end)}</td></tr>")
        body += ["</table>", _mask(pack, "the documents of the pack; padding is not shown")]
    return page(view.title, "\n".join(body))


def _text(view: SampleView) -> str:
    pieces = []
    for run in view.runs:
        if isinstance(run, TextRun):
            text = html.escape(run.text)
            pieces.append(f"<mark>{text}</mark>" if run.is_trained else text)
        else:
            pieces.append(f'<span class="visual">&lt;{html.escape(run.description)}&gt;</span>')
    return "".join(pieces)


def _visual(run: VisualRun, vision: VisionConfig) -> str:
    drawings = (draw_image(image, block, vision, is_frame=run.is_video) for image, block in run.blocks)
    return f"<h2>{html.escape(run.description)}</h2>{''.join(drawings)}"


def _mask(documents: Sequence[SampleView], caption: str) -> str:
    lengths = [len(document.kv_end) for document in documents]
    starts = np.cumsum([0, *lengths[:-1]])
    kv_start = np.repeat(starts, lengths)
    kv_end = np.concatenate([document.kv_end + start for document, start in zip(documents, starts, strict=True)])
    picture = data_uri(mask_png(kv_start, kv_end), "image/png")
    return f'<p><img src="{picture}" alt="mask"></p><p>{html.escape(caption)}</p>'
