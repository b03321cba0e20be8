"""Reads the files of `config.mixture`. What they name is not opened here."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_haplovl.config.mixture import (
    PREPROCESSED,
    VARIABLE,
    Mixture,
    MixtureSource,
    Sampling,
    TileRule,
    fill_variables,
    parse_sampling,
    parse_split,
)
from megatron_haplovl.config.strict_yaml import Located, load_located

SECTIONS = ("train", "aux", "valid")
_TOP = (*SECTIONS, "variables", "split")


def read_mixture(file: str, given: Iterable[str], environment: Mapping[str, str]) -> Mixture:
    """Read a file.

    Args:
        file: its path.
        given: `NAME=VALUE` words (`--data-var`), which win over the file's `variables`, and those over the environment.
        environment: variables that neither sets.

    Raises:
        ValueError: there is no such file, it is not YAML, or it holds anything but what is known, with the line.
    """
    try:
        root = load_located(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{file}: not valid YAML ({error})") from error
    content = _mapping(file, root, ("datasets",) if _is_onevision(root) else _TOP)
    own = {name: _text(file, value) for name, value in _mapping(file, content.get("variables")).items()}
    variables = _variables(file, parse_variables(given), own, environment)
    split = None
    if "split" in content:
        split = _parsed(file, content["split"], parse_split)
    if "datasets" in content:
        listed = {"train": _sources(file, content["datasets"], onevision=True)}
    else:
        listed = {name: _sources(file, content[name], onevision=False) for name in SECTIONS if name in content}
    train, aux, valid = (listed.get(name, ()) for name in SECTIONS)
    mixture = Mixture(file, train, aux, valid, split, variables)
    _check(mixture)
    return mixture


def parse_variables(words: Iterable[str]) -> dict[str, str]:
    """Read `NAME=VALUE` words.

    Raises:
        ValueError: another word, or a name twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not VARIABLE.fullmatch("${" + name + "}"):
            raise ValueError(f"--data-var {word!r} is not NAME=VALUE")
        if name in found:
            raise ValueError(f"--data-var {name} is given twice")
        found[name] = value
    return found


def _variables(
    file: str, given: Mapping[str, str], own: Mapping[str, str], environment: Mapping[str, str]
) -> dict[str, str]:
    known = {**environment, **given}
    for name, value in own.items():
        # Those before it in the file may be part of it.
        if name not in given:
            known[name] = fill_variables(value, known, f"{file}: variables: {name}")
    return known


def _is_onevision(root: Located) -> bool:
    return isinstance(root.value, dict) and "datasets" in root.value


_ONEVISION = ("json_path", "sampling_strategy")
_OWN = (
    *("name", "path", "input", "image_folder", "template", "weight", "epochs", "sampling", "cap"),
    *("max_tiles", "image_token_budget", "repairs", "num_frames"),
)


def _sources(file: str, node: Located, *, onevision: bool) -> tuple[MixtureSource, ...]:
    if not isinstance(node.value, list) or not node.value:
        raise ValueError(f"{file}, line {node.line}: a section is a list of sources, at least one")
    rows = [_mapping(file, item, _ONEVISION if onevision else _OWN) for item in node.value]
    stems = _distinct_stems([_stem(file, row, item) for row, item in zip(rows, node.value, strict=True)])
    return tuple(_source(file, row, item.line, stem) for row, item, stem in zip(rows, node.value, stems, strict=True))


def _stem(file: str, row: Mapping[str, Located], item: Located) -> str:
    """What a source is called after: its name, its prefix, or its first file of records (no ending, no wildcard)."""
    if not {"path", "input", "json_path"} & row.keys():
        raise ValueError(f"{file}, line {item.line}: a source needs path (preprocessed data), input (records), or both")
    key = next(key for key in ("name", "path", "json_path", "input") if key in row)
    text = re.sub(r"[${}]", "", _texts(file, row[key])[0])
    stem = "/".join(part for part in text.split("/") if not re.search(r"[*?\[]", part))
    stem = stem if key in ("name", "path") else re.sub(r"\.[A-Za-z][A-Za-z0-9.]*$", "", stem)
    if not stem.strip("/"):
        raise ValueError(f"{file}, line {item.line}: {text!r} gives the source no name; add one")
    return stem


def _distinct_stems(paths: list[str]) -> list[str]:
    """The last parts of paths, as many as it takes to tell them apart."""
    parts = [PurePosixPath(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]).lstrip("/") for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part).lstrip("/") for part in parts]


def _source(file: str, row: Mapping[str, Located], line: int, stem: str) -> MixtureSource:
    def optional(key: str, read: Any) -> Any:
        return read(file, row[key]) if key in row else None

    sampling = row.get("sampling", row.get("sampling_strategy"))
    name = optional("name", _text) or stem
    source = MixtureSource(
        where=f"{file}, line {line}",
        name=name,
        path=optional("path", _text) or f"${{{PREPROCESSED}}}/{name}",
        input=_texts(file, row["input"]) if "input" in row else _texts(file, row.get("json_path")),
        image_folder=optional("image_folder", _text),
        template=optional("template", _text),
        weight=optional("weight", _positive),
        epochs=optional("epochs", _positive),
        sampling=Sampling() if sampling is None else _parsed(file, sampling, parse_sampling),
        cap=optional("cap", _count),
        tiles=TileRule(optional("max_tiles", _count), optional("image_token_budget", _count)),
        repairs=",".join(_texts(file, row["repairs"])) if "repairs" in row else None,
        num_frames=optional("num_frames", _count),
    )
    if source.weight is not None and source.epochs is not None:
        raise ValueError(f"{source.where}: weight and epochs both say how often {source.name} is read; give one")
    return source


def _check(mixture: Mixture) -> None:
    if not mixture.train:
        raise ValueError(f"{mixture.file}: no source to train on; give a section train")
    for section in (mixture.train, mixture.aux):
        kinds = {source.weight is not None for source in section}
        if len(kinds) > 1:
            without = next(source for source in section if source.weight is None)
            raise ValueError(
                f"{without.where}: {without.name} has no weight and others of its section have; give all of them "
                "weights, or none (then each is read once, or as often as its epochs say)"
            )
    for source in mixture.valid:
        if source.weight is not None or source.epochs is not None:
            raise ValueError(
                f"{source.where}: {source.name} is read once in a validation; leave out its weight and epochs"
            )
    if mixture.valid and mixture.split is not None:
        raise ValueError(f"{mixture.file}: valid and split both say what is held out; keep one of them")
    for section in (mixture.train, mixture.aux, mixture.valid):
        twice = [name for name, times in Counter(source.name for source in section).items() if times > 1]
        if twice:
            raise ValueError(f"{mixture.file}: two sources of one section are named {twice[0]}; give one another name")


def _mapping(file: str, node: Located | None, known: tuple[str, ...] | None = None) -> Mapping[str, Located]:
    """A mapping, all of whose keys are known."""
    if node is None:
        return {}
    if not isinstance(node.value, dict):
        raise ValueError(f"{file}, line {node.line}: {_shown(node)} is not a mapping of keys to values")
    found: Mapping[str, Located] = node.value
    for key, value in found.items():
        if known is not None and key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            meant = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
            raise ValueError(f"{file}, line {value.line}: unknown key {key}{meant}")
    return found


def _parsed(file: str, node: Located, parse: Any) -> Any:
    try:
        return parse(_text(file, node))
    except ValueError as error:
        raise ValueError(f"{file}, line {node.line}: {error}") from error


def _text(file: str, node: Located) -> str:
    if not isinstance(node.value, str) or not node.value:
        raise ValueError(f"{file}, line {node.line}: {_shown(node)} is not a string")
    return node.value


def _texts(file: str, node: Located | None) -> tuple[str, ...]:
    """One string or a list of them."""
    if node is None:
        return ()
    if isinstance(node.value, list) and node.value:
        return tuple(_text(file, item) for item in node.value)
    return (_text(file, node),)


def _count(file: str, node: Located) -> int:
    if not isinstance(node.value, int) or isinstance(node.value, bool) or node.value < 1:
        raise ValueError(f"{file}, line {node.line}: {_shown(node)} is not a whole number above 0")
    return node.value


def _positive(file: str, node: Located) -> float:
    number = node.value
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 < number < math.inf:
        raise ValueError(f"{file}, line {node.line}: {_shown(node)} is not a number above 0")
    return float(number)


def _shown(node: Located) -> str:
    if isinstance(node.value, (dict, list)):
        return "a mapping" if isinstance(node.value, dict) else "a list"
    return "nothing" if node.value is None else repr(node.value)
