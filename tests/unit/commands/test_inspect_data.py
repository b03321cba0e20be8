"""What haplovl-inspect shows of samples, and of texts that mean harm."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_haplovl.commands import inspect_data, preprocess
from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.data import manifest as names
from megatron_haplovl.data.inspection.statistics import collect_statistics
from megatron_haplovl.data.sources import IndexedSource
from tests.conftest import train_sentencepiece
from tests.fixtures.small_prefix import write_small_prefix

_MODEL = ["--model", "haplovl-debug"]


class _Page(HTMLParser):
    """Tags, what is marked, all text, and every address on a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = ["page"]
        self.marked: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.tags[-1] == "mark":
            self.marked.append(data)
            self.tags.append("/mark")


def run(tiny_prefix: str, tiny_spm_model: Path, *arguments: str) -> int:
    return inspect_data.main([tiny_prefix, *_MODEL, "--tokenizer-model", str(tiny_spm_model), *arguments])


def test_a_sample_in_the_terminal(tiny_prefix: str, tiny_spm_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_prefix, tiny_spm_model, "--sample", "5", "--color", "always") == 0
    coloured = capsys.readouterr().out
    trained = re.findall("\033\\[1;32m(.*?)\033\\[0m", coloured, re.DOTALL)
    assert [text.strip() for text in trained] == [
        "The triangle is green. It is. It is. It is. It is. It is.<|eot_id|>",
        "5<|eot_id|>",
    ]
    assert coloured.count("\033[36m<image: ") == 2
    assert "<image: 32x32 pixels" in coloured and "<image: 17x50 pixels" in coloured
    assert run(tiny_prefix, tiny_spm_model, "--sample", "5") == 0
    plain = capsys.readouterr().out
    assert "\033" not in plain and plain.count("[[") == 2
    tokens = int(re.search(r"(\d+) tokens: ", plain)[1])  # type: ignore[index]
    counts = IndexedSource(tiny_prefix).counts(MODELS["haplovl-debug"].vision)
    assert tokens == counts.tokens[5]
    assert f"({counts.lm_tokens[5]} trained)" in plain and f"({counts.tiles[5]} tiles)" in plain


def test_a_sample_as_a_page(tiny_prefix: str, tiny_spm_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert run(tiny_prefix, tiny_spm_model, "--sample", "5", "--html", str(path)) == 0
    page = _Page(path.read_text())
    assert page.tags.count("svg") == page.tags.count("image") == 2
    assert [text.strip() for text in page.marked[1:]][0].startswith("The triangle is green.")
    assert "script" not in page.tags
    assert len(page.addresses) == 3 and all(address.startswith("data:image/png;") for address in page.addresses)


def test_any_resolution_shows_tiles_and_newlines(
    tiny_prefix: str, tiny_spm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.html"
    flags = ("--image-aspect-ratio", "anyres", "--image-size", "32", "--max-tiles", "4", "--image-newline")
    assert run(tiny_prefix, tiny_spm_model, "--sample", "8", "--html", str(path), *flags) == 0
    shown = re.search(r"(\d)x(\d) tiles of which (\d+)x(\d+) patches are kept, (\d+) newlines", capsys.readouterr().out)
    assert shown is not None
    tile_rows, tile_cols, rows, _, newlines = map(int, shown.groups())
    assert tile_rows * tile_cols > 1 and newlines == rows
    assert path.read_text().count('class="newline"') == newlines


def test_a_pack(tiny_prefix: str, tiny_spm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.html"
    assert run(tiny_prefix, tiny_spm_model, "--sample", "5", "--pack", "--seq-length", "900", "--html", str(path)) == 0
    shown = capsys.readouterr().out.split("\npack ")[1]
    lengths = [int(number) for number in re.findall(r"(\d+) tokens: ", shown)]
    assert "sample 5:" in shown and len(lengths) > 1 and sum(lengths) <= 900
    page = _Page(path.read_text())
    assert "this one" in "".join(page.text) and len(page.addresses) == 4


_HARMFUL = "</pre><script>alert(1)</script><img src=http://example.com/x onerror=alert(1)>\x1b[2J\u202e&amp;"


def test_texts_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = train_sentencepiece(tmp_path, normalization_rule_name="identity", remove_extra_whitespaces=False)
    record = {"conversations": [{"from": "human", "value": _HARMFUL}, {"from": "gpt", "value": _HARMFUL}]}
    (tmp_path / "r.json").write_text(json.dumps([record]))
    prefix, path = str(tmp_path / "harm"), tmp_path / "page.html"
    arguments = ["--input", str(tmp_path / "r.json"), "--output-prefix", prefix, "--tokenizer-model", str(model)]
    assert preprocess.main([*arguments, "--chat-template", "vicuna_v1", "--workers", "1"]) == 0
    capsys.readouterr()
    assert run(prefix, model, "--html", str(path)) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u202e" not in shown and "\\x1b[2J" in shown
    page = _Page(path.read_text())
    assert "script" not in page.tags and "img" in page.tags and page.tags.count("img") == 1  # the mask
    assert all(address.startswith("data:") for address in page.addresses)
    assert "".join(page.text).count(_HARMFUL) == 2


def test_statistics(tiny_prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.html"
    assert inspect_data.main([tiny_prefix, tiny_prefix, *_MODEL, "--statistics", "--html", str(path)]) == 0
    shown = capsys.readouterr().out
    statistics = collect_statistics(tiny_prefix, MODELS["haplovl-debug"].vision)
    assert shown.count(tiny_prefix) == 2
    for histogram in statistics.histograms:
        assert sum(number for _, number in histogram.bars) == 24
        assert shown.count(f"\n  {histogram.title}: ") == 2
    page = _Page(path.read_text())
    assert page.addresses == [] and page.tags.count("h2") == 2
    assert "".join(page.text).count("tiles of a sample") == 2


def test_statistics_of_repairs_and_bad_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_small_prefix(tmp_path)
    lines = [
        '{"location": "line 1", "id": null, "reason": "too_long", "detail": "<b>900</b> tokens"}',
        '{"location": "line 7", "id": "x", "reason": "too_long", "detail": "800 tokens"}',
        '{"location": "line 9", "id": "y", "reason": "bad_turns", "detail": "turn 0"}',
    ]
    Path(prefix + names.REPORT_SUFFIX).write_text("\n".join(lines) + "\n")
    path = tmp_path / "page.html"
    assert inspect_data.main([prefix, *_MODEL, "--statistics", "--html", str(path)]) == 0
    shown = capsys.readouterr().out
    for line in (
        "2  trailing_question_dropped",
        "4  source",
        "3  too_long",
        "2  too_long (line 1: <b>900</b> tokens)",
        "1  bad_turns (line 9: turn 0)",
        "videos                      1",
    ):
        assert line in shown
    assert "b" not in _Page(path.read_text()).tags
    Path(prefix + names.REPORT_SUFFIX).write_text("{}\n")
    assert inspect_data.main([prefix, *_MODEL, "--statistics"]) == 2
    assert "line 1: not a line of a report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "24"], "has the samples 0 to 23, not 24"),
        (["--sample", "-1"], "has the samples 0 to 23, not -1"),
    ],
)
def test_what_is_refused(
    tiny_prefix: str, tiny_spm_model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_prefix, tiny_spm_model, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_sample_of_two_prefixes(tiny_prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_data.main([tiny_prefix, tiny_prefix, *_MODEL]) == 2
    assert "a sample is of one prefix, 2 are given" in capsys.readouterr().err


def test_tokenizers(tiny_prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_prefix, train_sentencepiece(tmp_path, vocab_size=400)) == 2
    assert "was preprocessed with another tokenizer" in capsys.readouterr().err
    assert inspect_data.main([tiny_prefix, *_MODEL]) == 2
    assert "--tokenizer-model is needed" in capsys.readouterr().err
