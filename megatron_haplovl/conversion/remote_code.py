"""This package's Hugging Face classes as files of an exported model, which then loads where the package is missing.

`from_pretrained(folder, trust_remote_code=True)` imports the files that `auto_map` names and those that they import as
neighbours. The other modules that the classes use are therefore put beside them, and imported from there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

MODEL_AUTO_MAP = {
    "AutoConfig": "configuration_haplo.HaploConfig",
    "AutoModelForImageTextToText": "modeling_haplo.HaploForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_haplo.HaploForConditionalGeneration",
}
_PROCESSOR_AUTO_MAP = {
    "AutoProcessor": "processing_haplo.HaploProcessor",
    "AutoImageProcessor": "image_processing_haplo.HaploImageProcessor",
}

_PACKAGE = Path(__file__).resolve().parents[1]
_IMPORT = re.compile(rf"^from (?:{_PACKAGE.name}((?:\.\w+)*)|)\.(\w+) import", re.MULTILINE)


def write_remote_code(folder: Path) -> None:
    """Write the files, and name the processors' classes in the files that they are loaded from.

    The configuration's `auto_map` is `MODEL_AUTO_MAP`.

    Args:
        folder: an exported model, its processor written.
    """
    for name, source in _sources().items():
        (folder / name).write_text(source, encoding="utf-8")
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        settings = {**json.loads(path.read_text(encoding="utf-8")), "auto_map": _PROCESSOR_AUTO_MAP}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sources() -> dict[str, str]:
    """The files of the classes and of the modules that they import from this package, all rewritten as neighbours."""
    entries = (*MODEL_AUTO_MAP.values(), *_PROCESSOR_AUTO_MAP.values())
    waiting = {_PACKAGE / "hf" / f"{entry.partition('.')[0]}.py" for entry in entries}
    sources: dict[Path, str] = {}
    while waiting:
        path = waiting.pop()
        source = path.read_text(encoding="utf-8")
        for parents, module in _IMPORT.findall(source):
            folder = _PACKAGE.joinpath(*parents.split(".")) if parents else path.parent
            if folder / f"{module}.py" not in sources:
                waiting.add(folder / f"{module}.py")
        origin = path.relative_to(_PACKAGE.parent).as_posix()
        sources[path] = f"# {origin} of megatron-haplovl, under the Apache License 2.0.\n" + _IMPORT.sub(
            r"from .\2 import", source
        )
    files = {path.name: source for path, source in sources.items()}
    assert len(files) == len(sources), "two modules of one name cannot be neighbours"
    return files
