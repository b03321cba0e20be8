"""Mixtures as files (`--data-config`): which sources a run reads, how much of each, and how they are preprocessed.

    variables: {DATA: preprocessed}
    split: 990,10
    train:
      - {name: instructions, path: "${DATA}/instructions", input: "${LLAVA}/mix665k.json", image_folder: "${IMAGES}"}
    aux:
      - {name: captions, path: "${DATA}/captions", sampling: "random:50%"}

The own YAML of LLaVA-OneVision (`datasets:` of `json_path` and `sampling_strategy`) is read, too:
`config.mixture_file` reads both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

PREPROCESSED = "PREPROCESSED"
"""Variable: the folder of those sources that say no `path`."""
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SAMPLING = re.compile(r"(first|end|random):([0-9]+(?:\.[0-9]+)?)(%?)")


@dataclass(frozen=True)
class Sampling:
    """Which samples of a source take part, in LLaVA-OneVision's words."""

    kind: str = "all"
    """all, first, end or random. random goes by what a sample holds, so it depends on neither order nor seed."""
    amount: Fraction = Fraction(100)
    is_percent: bool = True

    def number(self, total: int) -> int:
        """How many of so many samples take part; parts of a sample are rounded up."""
        if not self.is_percent:
            return min(int(self.amount), total)
        return math.ceil(total * self.amount / 100)


def parse_sampling(text: str) -> Sampling:
    """Read `all`, `first:N`, `first:N%`, `end:...` or `random:...`.

    Raises:
        ValueError: anything else, or none or more than all samples.
    """
    if text == "all":
        return Sampling()
    match = _SAMPLING.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not all, first:N, first:N%, end:N, end:N%, random:N or random:N%")
    kind, amount, percent = match[1], Fraction(match[2]), match[3] == "%"
    if amount == 0 or (percent and amount > 100):
        raise ValueError(f"{text!r} must take more than nothing and at most 100%")
    if not percent and amount.denominator != 1:
        raise ValueError(f"{text!r}: samples are counted in whole numbers")
    return Sampling(kind, amount, percent)


@dataclass(frozen=True)
class Split:
    """Shares of the records that train, that are held out for validation, and that nothing here reads (test)."""

    train: Fraction
    valid: Fraction
    test: Fraction


def parse_split(text: str) -> Split:
    """Read `TRAIN,VALID` or `TRAIN,VALID,TEST` in Megatron's manner: what counts is the ratio.

    Raises:
        ValueError: other words, or nothing to train on or to hold out.
    """
    words = [word.strip() for word in text.split(",")]
    if len(words) not in (2, 3) or not all(re.fullmatch(r"[0-9]+(\.[0-9]+)?", word) for word in words):
        raise ValueError(f"the split {text!r} is not TRAIN,VALID or TRAIN,VALID,TEST, such as 990,10")
    parts = [Fraction(word) for word in words]
    if not parts[0] or not parts[1]:
        raise ValueError(f"the split {text!r} must leave something to train on and something to hold out")
    train, valid, test = (part / sum(parts) for part in (*parts, Fraction(0))[:3])
    return Split(train, valid, test)


@dataclass(frozen=True)
class TileRule:
    """How many tiles the images of a source have, where that is less than the model's own rule (`config.vision`)."""

    max_tiles: int | None = None
    image_token_budget: int | None = None

    def words(self) -> str:
        """For messages."""
        return " and ".join(f"{name} {value}" for name, value in vars(self).items() if value is not None)


@dataclass(frozen=True)
class MixtureSource:
    """One source, as the file has it: paths still hold their variables."""

    where: str
    """File and line, for messages."""
    name: str
    """In log columns, and of the files if there is no `path`."""
    path: str
    """Prefix of the preprocessed data."""
    input: tuple[str, ...]
    """Files of records."""
    image_folder: str | None
    template: str | None
    weight: float | None
    epochs: float | None
    sampling: Sampling
    cap: int | None
    """Most samples that take part."""
    tiles: TileRule
    repairs: str | None
    num_frames: int | None


@dataclass(frozen=True)
class Mixture:
    """A file of sources."""

    file: str
    train: tuple[MixtureSource, ...]
    aux: tuple[MixtureSource, ...]
    """Stage 1: joined with the samples of `train`."""
    valid: tuple[MixtureSource, ...]
    split: Split | None
    variables: Mapping[str, str]
    """What `${NAME}` stands for."""

    def sources(self) -> tuple[MixtureSource, ...]:
        """All of them."""
        return (*self.train, *self.aux, *self.valid)

    def fill(self, text: str, source: MixtureSource) -> str:
        """A path of a source with its variables filled in.

        Raises:
            ValueError: a variable that is not set.
        """
        return fill_variables(text, self.variables, source.where)

    def prefix(self, source: MixtureSource) -> str:
        """The prefix of a source's preprocessed data."""
        return self.fill(source.path, source)


def fill_variables(text: str, variables: Mapping[str, str], where: str) -> str:
    """A text with every `${NAME}` replaced; `where` is for the message.

    Raises:
        ValueError: a variable that is not set.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in variables:
            raise ValueError(
                f"{where}: {match[0]} in {text!r} is not set; give --data-var {match[1]}=VALUE, set {match[1]} in the "
                "environment, or add it to the file's variables"
            )
        return variables[match[1]]

    return VARIABLE.sub(value, text)
