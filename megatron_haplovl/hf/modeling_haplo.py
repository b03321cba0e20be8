"""The released form of HaploVL as a Hugging Face model. Depends on torch and transformers only.

The parameter names are those of the released checkpoints: layers are numbered through both decoders. Which pixels
become which token is decided by the processor, not here: the model receives two vectors beside the token ids,

    visual_source_BS         what stands at a visual token: an index into the patches of `pixel_values`, counted tile by
                             tile and row-major in a tile, or NEWLINE; TEXT everywhere else
    attention_start_ids_BS   index of the first token of the image (or video frame) that a token belongs to; a text
                             token's own index

Shape legend: B batch, S new tokens, K keys (cached and new tokens), D width of a decoder, H heads, E width of a head,
T tiles, P patches of all tiles, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_haplo import HaploConfig
from .layers_haplo import HaploDecoderLayer, HaploPatchEmbed, mixed_mask, rotary_table

TEXT = -2
"""`visual_source` of a token that is not visual."""
NEWLINE = -1
"""`visual_source` of a token that stands for the learned newline."""


class HaploPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = HaploConfig
    base_model_prefix = "model"
    input_modalities = ["image", "video", "text"]
    _no_split_modules = ["HaploDecoderLayer"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HaploModel):
            nn.init.normal_(module.pre_pos_embed, std=self.config.initializer_range)
            if module.image_newline is not None:
                nn.init.normal_(module.image_newline, std=self.config.initializer_range)


class HaploModel(HaploPreTrainedModel):
    """Embeddings, pre-decoder, connector, post-decoder and final norm."""

    def __init__(self, config: HaploConfig) -> None:
        super().__init__(config)
        pre, post = config.pre_decoder, config.post_decoder
        implementation = config._attn_implementation or "eager"
        if implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"attn_implementation {implementation!r} cannot apply the mixed mask; use 'sdpa' or 'eager'"
            )
        cells = (post.default_image_size // post.patch_size) ** 2
        self.embed_tokens = nn.Embedding(post.vocab_size, pre.hidden_size)
        self.patch_embed = HaploPatchEmbed(post.patch_size, pre.hidden_size)
        self.pre_pos_embed = nn.Parameter(torch.empty(1, cells, pre.hidden_size))
        self.image_newline = nn.Parameter(torch.empty(pre.hidden_size)) if post.image_newline else None
        self.pre_norm = nn.LayerNorm(pre.hidden_size)
        self.layers = nn.ModuleList(
            HaploDecoderLayer(pre if i < pre.num_hidden_layers else post, i, implementation)
            for i in range(pre.num_hidden_layers + post.num_hidden_layers)
        )
        self.pre_connector = nn.Linear(pre.hidden_size, post.hidden_size, bias=False)
        self.norm = nn.RMSNorm(post.hidden_size, eps=post.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        pixel_values: torch.Tensor | None = None,
        visual_source: torch.Tensor | None = None,
        attention_start_ids: torch.Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, S, D] of the post-decoder after the final norm.

        Args:
            input_ids: [B, S] new tokens; placeholders at visual ones.
            attention_mask: [B, K] for cached and new tokens, 0 at padding; default: no padding.
            position_ids: [B, S]; default: counted from the first token that is not padding.
            past_key_values: cache of the earlier tokens.
            pixel_values: [T, 3, size, size] tiles of all images, in order.
            visual_source: [B, S], see the head of this file. Needed where there are visual tokens.
            attention_start_ids: [B, S], likewise.
            use_cache: return a cache; a new one if none was given.
            output_hidden_states: also return the input and the output of every layer.

        Raises:
            ValueError: visual inputs that contradict each other or the placeholders, or that come after a cached part.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        batch, length = input_ids.shape
        keys = past + length
        self._check_visual(input_ids, past, pixel_values, visual_source, attention_start_ids)
        if attention_mask is None:
            attention_mask = input_ids.new_ones((batch, keys))
        if attention_mask.shape != (batch, keys):
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}, expected {(batch, keys)}: "
                f"{past} cached and {length} new tokens"
            )
        visible_BK = attention_mask.bool()
        if position_ids is None:
            position_ids = (visible_BK.long().cumsum(1) - 1).clamp(min=0)[:, past:]

        pre, post = self.config.pre_decoder, self.config.post_decoder
        start_ids_BK = torch.arange(keys, device=input_ids.device).expand(batch, keys)
        if attention_start_ids is not None and post.image_attention == "bidirectional":
            start_ids_BK = attention_start_ids
        mask_B1SK = mixed_mask(start_ids_BK, visible_BK, length)

        x_BSD = self.embed_tokens(input_ids)
        if visual_source is not None:
            x_BSD = self._insert_visual(x_BSD, pixel_values, visual_source)
        x_BSD = self.pre_norm(x_BSD)

        rotary = rotary_table(position_ids, pre, x_BSD.dtype)
        hidden_states = [x_BSD]
        for i, layer in enumerate(self.layers):
            if i == pre.num_hidden_layers:
                x_BSD = self.pre_connector(x_BSD)
                rotary = rotary_table(position_ids, post, x_BSD.dtype)
            x_BSD = layer(x_BSD, mask_B1SK, rotary, past_key_values)
            hidden_states.append(x_BSD)
        x_BSD = self.norm(x_BSD)
        hidden_states[-1] = x_BSD
        return BaseModelOutputWithPast(
            last_hidden_state=x_BSD,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )

    def _insert_visual(
        self, x_BSD: torch.Tensor, pixel_values: torch.Tensor | None, visual_source_BS: torch.Tensor
    ) -> torch.Tensor:
        """Replace the embeddings of the placeholders by patches and newlines."""
        x_BSD = x_BSD.clone()
        if pixel_values is not None and len(pixel_values):
            patches_TCD = self.patch_embed(pixel_values.to(self.patch_embed.proj.weight.dtype)) + self.pre_pos_embed
            is_patch_BS = visual_source_BS >= 0
            x_BSD[is_patch_BS] = patches_TCD.flatten(0, 1)[visual_source_BS[is_patch_BS]].to(x_BSD)
        if self.image_newline is not None:
            x_BSD[visual_source_BS == NEWLINE] = self.image_newline.to(x_BSD)
        return x_BSD

    def _check_visual(
        self,
        input_ids: torch.Tensor,
        past: int,
        pixel_values: torch.Tensor | None,
        visual_source: torch.Tensor | None,
        attention_start_ids: torch.Tensor | None,
    ) -> None:
        """Refuse inputs for which the mixed mask or the patches would silently be wrong."""
        given = {"visual_source": visual_source, "attention_start_ids": attention_start_ids}
        if past:
            if any(value is not None for value in (pixel_values, *given.values())):
                raise ValueError("visual inputs cannot follow a cached part: pass the whole prompt at once")
            return
        for name, value in given.items():
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(f"{name} has the shape {tuple(value.shape)}, input_ids {tuple(input_ids.shape)}")
        placeholder_BS = torch.isin(
            input_ids,
            torch.tensor([self.config.image_token_index, self.config.video_token_index], device=input_ids.device),
        )
        visual_BS = torch.zeros_like(placeholder_BS) if visual_source is None else visual_source != TEXT
        if not torch.equal(placeholder_BS, visual_BS):
            raise ValueError(
                f"input_ids holds {int(placeholder_BS.sum())} image and video placeholders, visual_source names "
                f"{int(visual_BS.sum())} visual tokens, and they must stand at the same places (use the processor)"
            )
        if visual_source is None:
            return
        if attention_start_ids is None:
            raise ValueError("visual tokens need attention_start_ids: without them the mask would be plain causal")
        patches = 0 if pixel_values is None else len(pixel_values) * self.pre_pos_embed.shape[1]
        if int(visual_source.max()) >= patches:
            raise ValueError(f"visual_source names patch {int(visual_source.max())}, pixel_values hold {patches}")
        if self.image_newline is None and bool((visual_source == NEWLINE).any()):
            raise ValueError("visual_source names newlines, but the configuration has image_newline false")


class HaploForConditionalGeneration(HaploPreTrainedModel, GenerationMixin):
    """HaploVL with its language modelling head.

    `generate` keeps keys and values in a `DynamicCache`; batches are padded on the left.
    """

    def __init__(self, config: HaploConfig) -> None:
        super().__init__(config)
        post = config.post_decoder
        self.model = HaploModel(config)
        self.lm_head = nn.Linear(post.hidden_size, post.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        pixel_values: torch.Tensor | None = None,
        visual_source: torch.Tensor | None = None,
        attention_start_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, S, V] of the next token, and with `labels` ([B, S], -100 where untrained, not shifted) the loss.

        Other arguments: see :meth:`HaploModel.forward`. `logits_to_keep` > 0 computes the last ones only.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            pixel_values,
            visual_source,
            attention_start_ids,
            use_cache,
            output_hidden_states,
        )
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ValueError("labels need every logit: leave logits_to_keep at 0")
            loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output if return_dict else output.to_tuple()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The cache of `generate` would have as many layers as the base configuration, but there are two decoders.
        # `forward` makes one that grows.
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        *,
        pixel_values: torch.Tensor | None = None,
        visual_source: torch.Tensor | None = None,
        attention_start_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward pass: everything first, and with a cache one token at a time after that.

        `next_sequence_length` and `is_first_iteration` are not needed: the cache says what is new.

        Raises:
            ValueError: `inputs_embeds` is given; embeddings do not show where the placeholders are.
        """
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds is not supported: give input_ids")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs: dict[str, Any] = {
            "input_ids": input_ids[:, past:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": True if use_cache is None else use_cache,
            "logits_to_keep": kwargs.get("logits_to_keep") or 0,
            "output_hidden_states": kwargs.get("output_hidden_states") or False,
        }
        if past == 0:
            # Without a cache, the sequence has grown behind the prompt by text tokens.
            new = input_ids.shape[1] - (input_ids.shape[1] if visual_source is None else visual_source.shape[1])
            if visual_source is not None and attention_start_ids is not None and new:
                own_index = torch.arange(visual_source.shape[1], input_ids.shape[1], device=input_ids.device)
                visual_source = F.pad(visual_source, (0, new), value=TEXT)
                attention_start_ids = torch.cat((attention_start_ids, own_index.expand(len(input_ids), new)), dim=1)
            inputs |= {
                "pixel_values": pixel_values,
                "visual_source": visual_source,
                "attention_start_ids": attention_start_ids,
            }
        return inputs

    @staticmethod
    def _expand_inputs_for_generation(
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat every sequence (beams, several answers). Tiles belong to no sequence: the copies share them."""
        if expand_size > 1:
            if input_ids is not None:
                input_ids = input_ids.repeat_interleave(expand_size, dim=0)
            for name, value in model_kwargs.items():
                if isinstance(value, torch.Tensor) and name != "pixel_values":
                    model_kwargs[name] = value.repeat_interleave(expand_size, dim=0)
        return input_ids, model_kwargs
