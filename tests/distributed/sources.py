"""Several sources for tiny runs: the data, the runs, and what one process finds that computes each document alone."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_haplovl.commands.preprocess import main
from megatron_haplovl.config.schema import Config
from megatron_haplovl.data.batch import IGNORE_INDEX
from megatron_haplovl.data.dataset import collate, lay_out_document
from megatron_haplovl.data.loader import build_loader
from megatron_haplovl.data.mixture_sources import open_run_sources
from megatron_haplovl.losses.distillation_figures import TIE
from megatron_haplovl.training.initial_weights import fill_weights
from megatron_haplovl.training.model_setup import build_model
from megatron_haplovl.training.teacher import random_teacher
from tests import metrics_files
from tests.conftest import make_llava_dataset
from tests.distributed.cases import STEPS, parallel_case, parallel_config
from tests.distributed.reference import ONE_RANK

LAYOUTS = (
    *("DP 4, ZeRO 0", "TP 4 + SP, ZeRO 3", "CP 4, ZeRO 1", "TP 2 x CP 2, ZeRO 2"),
    *("TP 2 + SP x PP 2, ZeRO 1", "CP 2 x PP 2, ZeRO 1, micro-batch 2", "PP 4, ZeRO 1"),
)
NAMES = {"distill": ("a", "b", "aux"), "full": ("a", "b")}


def make_sources(folder: Path, tokenizer: Path) -> None:
    """Preprocess the sources, and write a mixture for each stage."""
    dataset = make_llava_dataset(folder, num_records=48)
    parts = {"a": dataset.records[:30], "b": dataset.records[30:36], "aux": dataset.records[36:]}
    for name, records in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    sources = {name: {"path": f"{folder}/{name}", "input": f"{folder}/{name}.json"} for name in parts}
    train = {"split": "70,30", "train": [sources["a"], sources["b"]]}
    (folder / "full.yaml").write_text(json.dumps(train), encoding="utf-8")
    (folder / "distill.yaml").write_text(json.dumps({**train, "aux": [sources["aux"]]}), encoding="utf-8")
    words = ["--data-config", f"{folder}/distill.yaml", "--image-folder", str(dataset.image_folder), "--workers=1"]
    assert main([*words, "--tokenizer-model", str(tokenizer), "--chat-template", "llama3"]) == 0


def sources_config(case: str, folder: Path, skip_bad_samples: int = 0) -> Config:
    """A run of :func:`parallel_config` on the sources, whose weights stay as they are."""
    recipe = case.partition(": ")[0]
    c = parallel_config(case, "torch")
    data: dict[str, Any] = {
        "mock_data": False,
        "data_config": f"{folder}/{recipe}.yaml",
        "seq_length": 240,
        "data_cache_path": str(folder),
        "skip_bad_samples": skip_bad_samples,
    }
    return dataclasses.replace(
        c,
        # Every other matrix has its width from the case.
        model=dataclasses.replace(c.model, vocab_size=512),
        data=dataclasses.replace(c.data, **data),
        optimizer=dataclasses.replace(c.optimizer, lr=0.0),
        init=dataclasses.replace(c.init, allow_missing=(".*",)),
        # One line, which covers all steps.
        logging=dataclasses.replace(
            c.logging, log_interval=STEPS, eval_iters=1, metrics_file=f"{folder}/{case.replace(': ', '-')}.jsonl"
        ),
    )


def logged(folder: Path, recipe: str, layout: str) -> tuple[dict[str, float], dict[str, float]]:
    """What a run has logged: training, and the last validation."""
    path = folder / f"{parallel_case(recipe, layout).replace(': ', '-')}.jsonl"
    first, train, last = metrics_files.logged(path)
    assert {name: value for name, value in first.items() if name not in ("iteration", "time")} == {
        name: value for name, value in last.items() if name not in ("iteration", "time")
    }
    return train, last


def reference(folder: Path, recipe: str) -> tuple[dict[str, float], dict[str, float]]:
    """Losses and samples of each source, from every document by itself: in all training steps, in the validation."""
    c = sources_config(parallel_case(recipe, "DP 4, ZeRO 0"), folder)
    sources = open_run_sources(c)
    whole = build_model(c, ONE_RANK)
    fill_weights(whole, c)
    found = []
    for shares, steps, shuffle in (((sources.train, sources.aux), STEPS, True), ((sources.valid, []), 1, False)):
        loader = build_loader((), c, num_steps=steps, dp_rank=0, dp_size=1, shares=shares, shuffle=shuffle)
        sums, tokens = defaultdict[str, float](float), Counter[str]()
        for pack in range(c.schedule.global_batch_size * steps):
            for items in loader._plan.packs.documents(pack):
                add_document(
                    whole.module, c, items, [share.source for group in shares for share in group], sums, tokens
                )
        found.append({name: sums[name] / tokens[name] if sums[name] else float(tokens[name]) for name in tokens})
    return found[0], found[1]


def retrieval(folder: Path) -> float:
    """Share of the held-out patches whose feature is nearest to its own teacher's among those of its pack, in fp64."""
    c = sources_config(parallel_case("distill", "DP 4, ZeRO 0"), folder)
    sources = open_run_sources(c).valid
    model = build_model(c, ONE_RANK)
    fill_weights(model, c)
    loader = build_loader((), c, num_steps=1, dp_rank=0, dp_size=1, shares=(sources, []), shuffle=False)
    distillation: Any = model.module.distillation
    found = total = 0
    for pack in range(c.schedule.global_batch_size):
        batch = loader.packs([pack])
        if not len(batch.patch_target_P):
            continue
        with torch.no_grad():
            hidden = model.module.hidden_states(batch)[0, batch.patch_target_P]
            seen, taught = distillation.vision_head(hidden).double(), random_teacher_of(c)(batch).double()
        similar = F.cosine_similarity(seen.unsqueeze(1), taught.unsqueeze(0), dim=-1)
        found += int((similar.diagonal() + TIE >= similar.max(dim=1).values).sum())
        total += len(similar)
    return found / total


def add_document(model, c, items, opened, sums, tokens) -> None:
    """Add a document's losses to `sums` and its tokens to `tokens`, under the names of the log."""
    vision, names = c.model.vision, NAMES[c.recipe.recipe]
    samples = [opened[source].read(sample) for source, sample in items]
    # How long each is alone says whose a position is.
    lengths = [len(lay_out_document([sample], vision).tokens) for sample in samples]
    owners = [names[source] for (source, _), length in zip(items, lengths, strict=True) for _ in range(length)]
    batch = collate([[lay_out_document(samples, vision)]], len(owners), vision)
    each: dict[str, tuple[list[int], torch.Tensor]] = {}
    with torch.no_grad():
        if c.recipe.recipe == "full":
            at = (batch.labels_BS[0] != IGNORE_INDEX).nonzero().flatten()
            each["lm loss"] = (
                at.tolist(),
                F.cross_entropy(model.logits(batch)[0, at].double(), batch.labels_BS[0, at], reduction="none"),
            )
        else:
            heads, hidden = model.distillation, model.hidden_states(batch)[0]
            at, patches = batch.text_mask_BS[0].nonzero().flatten(), batch.patch_target_P
            text, words = heads.text_head(hidden[at]).double(), model.embedding.text.weight.double()
            target = batch.tokens_BS[0, at]
            logits = text * heads.logit_scale.double().exp() @ words.T
            each["ctp loss"] = at.tolist(), F.cross_entropy(logits, target, reduction="none")
            distance, cosine = (text - words[target]).norm(dim=1), F.cosine_similarity(text, words[target])
            each["feature loss"] = at.tolist(), 1 + distance - cosine
            seen, taught = heads.vision_head(hidden[patches]).double(), random_teacher_of(c)(batch).double()
            each["vision loss"] = patches.tolist(), 1 - F.cosine_similarity(seen, taught)
    for name, (positions, values) in each.items():
        for position, value in zip(positions, values.tolist(), strict=True):
            sums[f"{name}/{owners[position]}"] += value
            tokens[f"{name}/{owners[position]}"] += 1
    for source, _ in items:
        tokens[f"consumed samples/{names[source]}"] += 1


def random_teacher_of(c: Config):
    """The teacher of a run without one."""
    return random_teacher(c.model, c.init.teacher_layer, c.run.seed)
