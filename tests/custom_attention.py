"""Variants of llama's attention, all through transformers' attention interface."""

from __future__ import annotations

import torch
from models_zoo import tiny_model
from torch import nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

#: An interface of this family's own, as some have.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()


class CustomAttention(LlamaAttention):
    """Llama's attention in steps that subclasses change."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1)
        query, key = (
            project(hidden_states).view(*shape, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj)
        )
        value = self.v_proj(hidden_states).view(*shape, self.value_head_dim).transpose(1, 2)
        width = position_embeddings[0].shape[-1]  # of a wider head only a part is rotated
        turned = apply_rotary_pos_emb(query[..., :width], key[..., :width], *position_embeddings)
        query, key = (torch.cat((a, b[..., width:]), -1) for a, b in zip(turned, (query, key), strict=True))
        caches = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
        cache = next((cache for cache in caches if cache is not None), None)
        if cache is not None:
            key, value = self.update(cache, key, value)
        key, value = self.change(key, value)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = function(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs
        )
        output = self.finish(output.reshape(shape), weights, value)
        return self.o_proj(output), weights

    @property
    def value_head_dim(self):
        return self.v_proj.out_features // self.config.num_key_value_heads

    def update(self, cache, key, value):
        return cache.update(key, value, self.layer_idx)

    def change(self, key, value):
        return key, value

    def finish(self, output, weights, value):
        return output


class ChangesKeys(CustomAttention):
    def change(self, key, value):
        return 1.5 * key, value


class ChangesValues(CustomAttention):
    def change(self, key, value):
        return key, value * torch.arange(1, 1 + value.shape[2])[:, None]  # by place, which is lost


class UsesValues(CustomAttention):
    def finish(self, output, weights, value):
        earlier = value.mean(dim=(1, 3)).cumsum(-1)[:, -output.shape[1] :]
        return output + earlier[..., None]


class UsesWeights(CustomAttention):
    def finish(self, output, weights, value):
        return output * weights.amax(dim=(1, 3))[:, :, None]


class KeepsNothing(CustomAttention):
    def update(self, cache, key, value):
        return key, value


def custom_model(
    kind=CustomAttention, *, value_head_dims=None, head_dims=None, implementation="sdpa", layers=2
):
    """A tiny llama whose layers have attention of a kind.

    `value_head_dims` and `head_dims` are the sizes of the heads of values and keys by layer, 16 by default.
    """
    model = tiny_model("llama", num_hidden_layers=layers)
    config, draw = model.config, torch.Generator().manual_seed(3)

    def linear(inputs, outputs):
        made = nn.Linear(inputs, outputs, bias=False)
        made.weight = nn.Parameter(0.2 * torch.randn(outputs, inputs, generator=draw), requires_grad=False)
        return made

    for index, layer in enumerate(model.model.layers):
        old = layer.self_attn
        layer.self_attn = made = kind(config, index)
        made.load_state_dict(old.state_dict())
        wide, narrow = (sizes[index] if sizes else 16 for sizes in (head_dims, value_head_dims))
        made.head_dim = wide
        if wide != 16:
            made.q_proj, made.k_proj = linear(64, 4 * wide), linear(64, 2 * wide)
        if narrow != 16:
            made.v_proj, made.o_proj = linear(64, 2 * narrow), linear(4 * narrow, 64)
    model.set_attn_implementation(implementation)
    return model.eval().requires_grad_(False)
