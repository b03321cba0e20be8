"""Stage 1 at one resolution goes on at any, as haplovl-8b's recipes want it; on the debug model, without data files."""

from __future__ import annotations

from tests.forks import run_copies

RECIPES = "examples/recipes/haplovl-debug"
SHORT = ["--mock-data", "--device", "cpu", "--train-iters", "1", "--lr-warmup-iters", "0", "--global-batch-size", "4"]


def run(script: str, *words: str) -> str:
    """What the training printed, both streams."""
    codes, output = run_copies(script, words, timeout=300)
    assert codes == [0], output[-4000:]
    return output


def test_any_resolution_goes_on_from_one(tmp_path):
    stage1 = str(tmp_path / "stage1")
    out = run("pretrain_haplovl.py", "--config", f"{RECIPES}/stage1.yaml", *SHORT, "--save", stage1)
    assert "settings that differ from haplovl-debug:\n  --vocab-size 768" in out
    assert f"({RECIPES}/stage1.yaml)\n" in out

    # The language model's part starts at random here; a run of the recipe is given the language model.
    any_resolution = tmp_path / "any resolution.yaml"
    any_resolution.write_text(
        "image-aspect-ratio: anyres\nmax-tiles: 4\nimage-newline: true\nseq-length: 512\n"
        "allow-missing: ['post_decoder\\..*', 'final_norm\\..*', 'lm_head\\..*']\n"
    )
    files = ["--config", f"{RECIPES}/full.yaml", str(any_resolution)]
    out = run("finetune_haplovl.py", *files, *SHORT, "--pretrained-checkpoint", stage1)
    assert "--image-newline --allow-missing 'post_decoder\\..*' " in out and f"({any_resolution})\n" in out
    # Of the embedding only the newline is new.
    table = [line.split(maxsplit=3) for line in out.splitlines()]
    assert ["embedding", "6", "tensors", f"{stage1}/global_step1"] in table
    assert ["embedding", "1", "tensors", "newly initialised"] in table
    assert ["pre_decoder", "48", "tensors", f"{stage1}/global_step1"] in table
    assert "lm loss: " in out
