"""The model's parts against transformers' modules and convolutions, and the mixed mask through the whole model."""

import dataclasses

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_haplovl.config.presets import MODELS
from megatron_haplovl.config.schema import ModelConfig, PostDecoderConfig, PreDecoderConfig, RopeScalingConfig
from megatron_haplovl.config.vision import VisionConfig
from megatron_haplovl.data.batch import IGNORE_INDEX, Batch
from megatron_haplovl.kernels.elementwise import rotate
from megatron_haplovl.kernels.mask import MixedMask
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.model.attention_inputs import AttentionInputs
from megatron_haplovl.model.embeddings import cut_patches
from megatron_haplovl.model.haplovl import HaploVL, HaploVLForDistillation
from megatron_haplovl.model.initialization import initialize_weights
from megatron_haplovl.model.rope import rope_table
from megatron_haplovl.training.model_setup import compile_blocks, torch_version

TINY = ModelConfig(
    vocab_size=50,
    vision=VisionConfig(patch_size=4, image_size=8, image_newline=True),
    pre=PreDecoderConfig(num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2),
    post=PostDecoderConfig(
        num_layers=2, hidden_size=24, ffn_hidden_size=32, num_attention_heads=4, num_key_value_heads=2
    ),
)


def make_model(config=TINY, seed=0, std=0.1):
    model = HaploVL(config)
    initialize_weights(dict(model.named_parameters()), std, seed)
    return model


def make_batch(documents, seq_length, seed=0):
    """One sequence of documents given as lists of "t", a text token, and "I", an image of 4 patches and 2 newlines."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    positions: list[int] = []
    start: list[int] = []
    end: list[int] = []
    source: list[int] = []
    target: list[int] = []
    newline: list[int] = []
    tiles: list[torch.Tensor] = []
    for document in documents:
        first = len(tokens)
        for item in document:
            here = len(tokens)
            if item == "t":
                tokens.append(int(torch.randint(1, 50, (), generator=generator)))
                end.append(here + 1)
            else:
                tokens += [0] * 6
                end += [here + 6] * 6
                source += [4 * len(tiles) + i for i in range(4)]
                target += [here, here + 1, here + 3, here + 4]
                newline += [here + 2, here + 5]
                tiles.append(torch.randint(256, (3, 8, 8), generator=generator).byte())
        length = len(tokens) - first
        positions += range(length)
        start += [first] * length
    used = len(tokens)
    for i in range(used, seq_length):
        tokens.append(0)
        positions.append(0)
        start.append(i)
        end.append(i + 1)
    tokens_BS = torch.tensor([tokens])
    labels_BS = torch.full_like(tokens_BS, IGNORE_INDEX)
    labels_BS[0, : used - 1] = tokens_BS[0, 1:used]
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        text_mask_BS=tokens_BS != 0,
        position_ids_BS=torch.tensor([positions]),
        kv_start_BS=torch.tensor([start], dtype=torch.int32),
        kv_end_BS=torch.tensor([end], dtype=torch.int32),
        tiles_TCHW=torch.stack(tiles) if tiles else torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
        patch_source_P=torch.tensor(source, dtype=torch.int64),
        patch_target_P=torch.tensor(target, dtype=torch.int64),
        newline_target_N=torch.tensor(newline, dtype=torch.int64),
        visible_pairs=sum(e - s for s, e in zip(start, end, strict=True)),
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"rope_type": "default"}, RopeScalingConfig()),
        ({"rope_type": "linear", "factor": 3.0}, RopeScalingConfig("linear", 3.0)),
        # Turns over 512 positions: 81.5, 37.5, 17.2, 7.9, 3.6, 1.7, 0.8, 0.4: some kept, some blended, some divided.
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 6.0,
                "original_max_position_embeddings": 512,
            },
            RopeScalingConfig("llama3", 8.0, 1.5, 6.0, 512),
        ),
    ],
)
def test_rope_is_llamas(theirs, ours):
    rope = {"rope_theta": 500.0, **theirs}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=4096)
    positions = torch.tensor([[0, 1, 2, 700, 5, 5]])
    q = torch.randn(1, 6, 4, 16)
    their_cos, their_sin = LlamaRotaryEmbedding(config)(q, positions)
    expected, _ = apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), their_cos, their_sin)
    ours = rotate(q, *rope_table(positions, 16, 500.0, ours, torch.float32))
    # fp32 angles of up to 700 radians: measured worst case 3.9e-5.
    torch.testing.assert_close(ours, expected.transpose(1, 2), rtol=0, atol=1e-4)


def test_each_scaling_has_its_own_rotary_table():
    positions = torch.arange(8)[None]
    inputs = AttentionInputs(MixedMask(torch.zeros(1, 8), torch.ones(1, 8)), positions)
    for scaling in (RopeScalingConfig(), RopeScalingConfig("linear", 2.0)):
        found = inputs.rope(8, 500.0, scaling, torch.float32)
        for table, expected in zip(found, rope_table(positions, 8, 500.0, scaling, torch.float32), strict=True):
            assert torch.equal(table, expected)


def test_rope_angles_are_exact_in_bf16_training():
    cos, _ = rope_table(torch.tensor([[6143]]), 2, 10000.0, RopeScalingConfig(), torch.bfloat16)
    assert float(cos[0, 0, 0, 0]) == pytest.approx(float(torch.tensor(6143.0).cos()), abs=2**-8)


def test_patch_embedding_is_a_strided_convolution():
    tiles, weight = torch.randn(3, 3, 8, 8), torch.randn(5, 3, 4, 4)
    expected = torch.nn.functional.conv2d(tiles, weight, stride=4).flatten(2).transpose(1, 2).reshape(-1, 5)
    torch.testing.assert_close(cut_patches(tiles, 4) @ weight.flatten(1).T, expected, rtol=0, atol=1e-5)


def test_embedding_places_patches_positions_and_newlines():
    model = make_model()
    batch = make_batch([["t", "I", "t"]], 9)
    embedding = model.embedding
    embedding.pre_norm = torch.nn.Identity()
    x = embedding(batch)[0]
    text = embedding.text_projector(embedding.text(batch.tokens_BS[0]))
    patches = torch.nn.functional.conv2d(batch.pixels_TCHW(), embedding.patch.weight.view(16, 3, 4, 4), stride=4)
    patches = patches.flatten(2)[0].T + embedding.position
    expected = torch.stack(
        [text[0], patches[0], patches[1], embedding.image_newline, patches[2], patches[3], embedding.image_newline]
        + [text[7], text[8]]
    )
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


def test_mixed_mask_through_the_whole_model():
    """A token's change reaches exactly the tokens that may see it under the paper's mask."""
    model = make_model()
    batch = make_batch([["t", "I", "t", "I"], ["t", "t"]], 20)
    base = model.hidden_states(batch)[0]
    # Document 0 is positions 0-13 (images at 1-6 and 8-13), document 1 14-15, padding 16-19.
    for changed, reached in ((0, range(0, 14)), (7, range(7, 14)), (14, range(14, 16)), (15, range(15, 16))):
        tokens = batch.tokens_BS.clone()
        tokens[0, changed] = (tokens[0, changed] + 7) % 49 + 1
        hidden = model.hidden_states(dataclasses.replace(batch, tokens_BS=tokens))[0]
        assert ((hidden != base).any(dim=1).nonzero().squeeze(1)).tolist() == list(reached)
    tiles = batch.tiles_TCHW.clone()
    tiles[1, :, 7, 7] += 90  # last patch of the second image
    hidden = model.hidden_states(dataclasses.replace(batch, tiles_TCHW=tiles))[0]
    assert ((hidden != base).any(dim=1).nonzero().squeeze(1)).tolist() == list(range(8, 14))


def test_images_may_be_as_causal_as_text():
    """`image_attention="causal"`: the change of a patch reaches later tokens only."""
    model = make_model(dataclasses.replace(TINY, image_attention="causal"))
    batch = make_batch([["t", "I", "t"]], 10)
    base = model.hidden_states(batch)[0]
    tiles = batch.tiles_TCHW.clone()
    tiles[0, :, 0, 7] += 90  # second patch of the image's first row, at position 2 of 0-7
    hidden = model.hidden_states(dataclasses.replace(batch, tiles_TCHW=tiles))[0]
    assert ((hidden != base).any(dim=1).nonzero().squeeze(1)).tolist() == list(range(2, 8))


def test_a_packed_document_equals_the_document_alone():
    model = make_model()
    alone = make_batch([["t", "I", "t", "t"]], 9)
    packed = make_batch([["t", "I", "t", "t"], ["t", "I", "I"], ["t"]], 28)
    torch.testing.assert_close(model.hidden_states(packed)[0, :9], model.hidden_states(alone)[0], rtol=0, atol=2e-6)


def test_loss_uses_trained_positions_only_and_gradients_reach_every_parameter():
    model = make_model()
    batch = make_batch([["t", "I", "t", "t"], ["t", "t"]], 12)
    losses = model(batch, next_token_loss)
    logits = model.logits(batch)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels_BS.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    torch.testing.assert_close(losses["lm loss"], expected, rtol=1e-6, atol=0)
    losses["lm loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_batch_without_images_gives_every_parameter_a_gradient():
    model = make_model()
    model(make_batch([["t", "t", "t"]], 4), next_token_loss)["lm loss"].backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    zero = {n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    assert without == []
    assert zero == {"embedding.patch.weight", "embedding.position", "embedding.image_newline"}


def test_stages_share_names_and_initial_weights():
    stage1 = HaploVLForDistillation(TINY, teacher_width=16)
    initialize_weights(dict(stage1.named_parameters()), 0.1, seed=3)
    stage2 = make_model(seed=3)
    shared = set(dict(stage1.named_parameters())) & set(dict(stage2.named_parameters()))
    assert {n for n, _ in stage1.named_parameters()} - shared == {
        "distillation.logit_scale",
        "distillation.text_head.bias",
        "distillation.text_head.weight",
        "distillation.vision_head.bias",
        "distillation.vision_head.weight",
    }
    for name in shared:
        assert torch.equal(stage1.get_parameter(name), stage2.get_parameter(name))
    assert stage1.distillation.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_folded_embedding_equals_the_factored_one():
    factored = make_model()
    folded = HaploVL(dataclasses.replace(TINY, text_embedding="folded"))
    weights = factored.state_dict()
    projector = weights.pop("embedding.text_projector.weight")
    weights["embedding.text.weight"] = weights["embedding.text.weight"] @ projector.T
    folded.load_state_dict(weights)
    batch = make_batch([["t", "I", "t"]], 10)
    torch.testing.assert_close(folded.logits(batch), factored.logits(batch), rtol=0, atol=1e-5)


def test_debug_preset_runs():
    model = make_model(MODELS["haplovl-debug"])
    assert sum(p.numel() for p in model.parameters()) < 20_000_000


def test_a_torch_that_compiles_wrong_gradients_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    with pytest.raises(ValueError, match=r"wrong gradients on a CPU with torch 2\.11\.0\+cpu; use 2\.12 or later"):
        compile_blocks(make_model(), torch.device("cpu"))


@pytest.mark.skipif(torch_version() < (2, 12), reason="this torch compiles wrong gradients on a CPU, and is refused")
def test_compiled_blocks_compute_the_same():
    """`--compile` keeps names, losses and gradients, and compiles nothing again once it has seen training and
    evaluation. Inductor's kernels differ in rounding."""
    batch = make_batch([["t", "I", "t"], ["t", "t"]], 16)
    plain, compiled = make_model(), make_model()
    compile_blocks(compiled, torch.device("cpu"))
    assert list(dict(compiled.named_parameters())) == list(dict(plain.named_parameters()))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    graphs = []
    for _ in range(3):
        losses = []
        for model in (plain, compiled):
            model.zero_grad()
            loss = model(batch, next_token_loss)["lm loss"]
            loss.backward()
            losses.append(loss.detach())
            with torch.no_grad():
                losses.append(model(batch, next_token_loss)["lm loss"])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    assert 0 < graphs[0] == graphs[2]
    # Measured worst cases 1e-6 and 1e-6 beside losses of 20 and gradients up to 4.
    torch.testing.assert_close(losses[:2], losses[2:], rtol=1e-5, atol=0)
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-5, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputation_changes_nothing_but_what_is_kept(granularity):
    batch = make_batch([["t", "I", "t"], ["t", "t"]], 16)
    results, kept = [], []
    for recompute in ("none", granularity):
        model = make_model()
        for block in (*model.pre_decoder, *model.post_decoder):
            block.recompute = recompute
        found: dict[int, torch.Tensor] = {}

        def note(tensor, found=found):
            found[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(batch, next_token_loss)["lm loss"]
        kept.append(sum(tensor.numel() for tensor in found.values()))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < {"selective": 0.75, "full": 0.5}[granularity] * kept[0], kept
