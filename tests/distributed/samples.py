"""Runs that answer questions while they train: the questions, the runs, and what each leaves behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_haplovl.config.schema import Config
from tests.distributed.cases import parallel_config
from tests.fixtures.tiny_haplo import noise_image, train_tokenizer

LAYOUTS = (
    *(f"DP 4, ZeRO {stage}" for stage in (0, 1, 2)),
    *("TP 4", "TP 2 x DP 2, ZeRO 2", "TP 2 + SP x DP 2, ZeRO 1", "TP 4 + SP, ZeRO 3"),
    *("CP 4, ZeRO 1", "CP 2 x DP 2, ZeRO 3", "TP 2 + SP x CP 2, ZeRO 1"),
    *("PP 2 x DP 2, ZeRO 0", "PP 4, ZeRO 1", "TP 2 + SP x PP 2, ZeRO 1", "CP 2 x PP 2, ZeRO 1"),
    "parameters on the host, full, TP 4 + SP, ZeRO 3",
)
BF16_LAYOUTS = ("DP 4, ZeRO 0", "TP 2 + SP x DP 2, ZeRO 1", "CP 2 x DP 2, ZeRO 3", "PP 2 x DP 2, ZeRO 0")
CASES = (
    *(f"full: {layout}" for layout in LAYOUTS),
    *(f"full: bf16 {layout}" for layout in BF16_LAYOUTS),
    *("align: TP 2 + SP x DP 2, ZeRO 1", "folded: DP 4, ZeRO 2", "folded: TP 2 + SP x PP 2, ZeRO 1"),
)
STEPS, ANSWERED_AFTER, NEW_TOKENS = 2, 1, 6


def make_questions(folder: Path) -> None:
    """Five questions, which four ranks cannot share evenly: with no image, one, a wide one, and two."""
    train_tokenizer(folder)
    for name, size in (("one.png", (16, 16)), ("wide.png", (16, 60))):
        noise_image(*size, seed=len(name)).save(folder / name)
    questions = [
        {"question_id": "text", "text": "what color ?", "answer": "red"},
        {"question_id": "one", "text": "what color is the circle", "image": "one.png"},
        {"question_id": "wide", "text": "left or right", "image": "wide.png", "label": "left"},
        {"question_id": "both", "text": "<image> small <image> large", "image": ["wide.png", "one.png"]},
        {"question_id": "last", "text": "two red square", "image": "one.png"},
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")


def samples_config(case: str, folder: Path, *, asks: bool) -> Config:
    """A run of one case. Its weights are large, so that answers are of many tokens and rounding changes none."""
    recipe = case.partition(": ")[0]
    c = parallel_config(case.replace("folded: ", "full: "), "torch")
    questions: dict[str, Any] = {
        "sample_questions": str(folder / "questions.jsonl"),
        "sample_image_folder": str(folder),
        "sample_interval": ANSWERED_AFTER,
        "sample_max_new_tokens": NEW_TOKENS,
        "sample_chat_template": "vicuna_v1",
    }
    text_embedding = "folded" if recipe == "folded" else "factored"
    return dataclasses.replace(
        c,
        model=dataclasses.replace(c.model, init_std=0.3, text_embedding=text_embedding),
        data=dataclasses.replace(c.data, seq_length=192, tokenizer_model=str(folder / "tokenizer.model")),
        logging=dataclasses.replace(c.logging, **questions) if asks else c.logging,
    )


def folder_of(case: str, folder: Path) -> Path:
    """Where a case leaves its weights and answers."""
    return folder / case.replace(": ", "-").replace(", ", "-").replace(" ", "_")
