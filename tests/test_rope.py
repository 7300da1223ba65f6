import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_zoo import FAMILIES, tiny_model, token_ids

from kvq_calib.model.capture import intercept
from kvq_calib.model.inspect import inspect_model
from kvq_calib.model.rope import RopeLayoutError, RopeTable, Rotation, discover_rope, find_apply_rotary
from kvq_calib.schema.geometry import RopeSpec


def half_split(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(x):
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    return turn(q), turn(k)


def interleaved(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(x):
        swapped = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos + swapped * sin

    return turn(q), turn(k)


def tables(positions, width, apply, scaling=1.0, theta=100.0, dtype=torch.float32):
    inv_freq = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = positions[:, None].float() * inv_freq
    angle = torch.cat((angle, angle), -1) if apply is half_split else angle.repeat_interleave(2, -1)
    return (scaling * angle.cos())[None].to(dtype), (scaling * angle.sin())[None].to(dtype), inv_freq


def rotated_by(spec, keys, positions):
    """`keys` [B, H, T, D] as a table made of `spec` turns them at `positions` [B or 1, T]."""
    table = RopeTable(spec, torch.device("cpu"))
    turned = table.rotate_(keys.mT.contiguous().clone(), *table.cos_sin(positions))
    return table.scale_(turned).mT


LAYOUTS = st.tuples(
    st.sampled_from([half_split, interleaved]),
    st.sampled_from([4, 8, 16]),  # rotated channels of 16
    st.sampled_from([1.0, 1.25, 0.5]),
)


@settings(max_examples=25, deadline=None)
@given(layout=LAYOUTS, seed=st.integers(0, 2**16))
def test_unrotate_inverts_and_adjoint_transposes(layout, seed):
    apply, width, scaling = layout
    draw = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 5000, (6,), generator=draw)
    cos, sin, _ = tables(positions, width, apply, scaling)
    rotation = Rotation(apply, cos, sin)
    keys = torch.randn(2, 3, 6, 16, generator=draw)
    probe = torch.randn(2, 3, 6, 16, generator=draw)

    assert torch.allclose(rotation.unrotate(rotation.rotate(keys)), keys, atol=1e-5)
    assert torch.allclose(rotation.rotate(rotation.unrotate(keys)), keys, atol=1e-5)
    assert torch.allclose(
        (rotation.rotate(keys) * probe).sum(), (keys * rotation.adjoint(probe)).sum(), atol=1e-3
    )
    keys.requires_grad_()
    (gradient,) = torch.autograd.grad(rotation.rotate(keys), keys, probe)
    assert torch.allclose(rotation.adjoint(probe), gradient, atol=1e-5)
    if scaling != 1.0:  # the inverse would be the wrong gradient
        assert not torch.allclose(rotation.unrotate(probe), gradient, atol=1e-2)


def test_unrotation_is_exact_for_tables_in_half_precision():
    cos, sin, _ = tables(torch.arange(50), 16, half_split, dtype=torch.bfloat16)
    rotation = Rotation(half_split, cos, sin)
    keys = torch.randn(1, 2, 50, 16)
    assert torch.allclose(rotation.unrotate(rotation.rotate(keys)), keys, atol=1e-5)
    assert rotation.unrotate(keys.bfloat16()).dtype == torch.float32


def test_without_rope_all_maps_are_the_identity():
    keys = torch.randn(1, 2, 3, 4)
    rotation = Rotation()
    assert rotation.rotate(keys) is keys
    assert rotation.unrotate(keys) is keys
    assert rotation.adjoint(keys) is keys


@settings(max_examples=25, deadline=None)
@given(layout=LAYOUTS, theta=st.sampled_from([100.0, 1e4, 1e6]))
def test_layout_is_found_for_every_arrangement(layout, theta):
    apply, width, scaling = layout
    positions = torch.tensor([0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 3000])
    cos, sin, inv_freq = tables(positions, width, apply, scaling, theta)
    spec = discover_rope(Rotation(apply, cos, sin), positions, 16)
    half = width // 2
    want = [(i, i + half) if apply is half_split else (2 * i, 2 * i + 1) for i in range(half)]
    assert list(spec.pairs) == want
    assert torch.allclose(torch.tensor(spec.inv_freq), inv_freq, rtol=1e-6, atol=0)
    assert spec.attention_scaling == pytest.approx(scaling, rel=1e-6)

    far = torch.tensor([7, 999, 2047])
    cos, sin, _ = tables(far, width, apply, scaling, theta)
    keys = torch.randn(2, 3, 3, 16)
    rotated = Rotation(apply, cos, sin).rotate(keys)
    for shape in (far[None], far[None].expand(2, 3)):
        assert torch.allclose(rotated_by(spec, keys, shape), rotated, atol=1e-3)


def test_a_table_keeps_channels_in_any_order():
    # Pairs that no slice describes are turned like those that one does.
    straight = RopeSpec(pairs=((0, 2), (1, 3)), inv_freq=(0.5, 0.25), attention_scaling=1.5)
    mixed = RopeSpec(pairs=((3, 2), (0, 1)), inv_freq=(0.5, 0.25), attention_scaling=1.5)
    keys, positions = torch.randn(1, 2, 5, 4), torch.arange(5)[None]
    order = [3, 0, 2, 1]  # where each channel stands
    again = torch.empty_like(keys)
    again[..., order] = keys
    want = rotated_by(straight, keys, positions)
    assert torch.allclose(rotated_by(mixed, again, positions)[..., order], want, atol=1e-6)
    assert len(RopeTable(mixed, torch.device("cpu")).tensors()) == 3
    assert len(RopeTable(straight, torch.device("cpu")).tensors()) == 1


def test_half_precision_tables_take_exact_frequencies_from_a_buffer():
    positions = torch.tensor([0, 1, 2, 4, 8, 16, 32, 64, 128])
    cos, sin, inv_freq = tables(positions, 16, half_split, dtype=torch.bfloat16)
    other = inv_freq * 1.5
    layout = discover_rope(
        Rotation(half_split, cos, sin), positions, 16, candidates=[torch.ones(3), other, inv_freq]
    )
    assert layout.inv_freq == tuple(inv_freq.tolist())


def test_a_rotation_that_is_no_table_is_refused():
    positions = torch.tensor([0, 1, 2, 4, 8])
    cos, sin, _ = tables(positions, 16, half_split)
    bent = Rotation(half_split, *tables(torch.tensor([0, 1, 2, 4, 8, 9]), 16, half_split)[:2])
    with pytest.raises(RopeLayoutError, match="proportional"):
        discover_rope(bent, torch.tensor([0, 1, 2, 4, 8, 11]), 16)
    with pytest.raises(RopeLayoutError, match="scaled alike"):
        discover_rope(Rotation(half_split, cos * positions[:, None], sin), positions, 16)
    with pytest.raises(RopeLayoutError, match="turn pairs"):
        discover_rope(Rotation(lambda q, k, cos, sin: (q, k * 2), cos, sin), positions, 16)
    with pytest.raises(RopeLayoutError, match="no rotary"):
        discover_rope(Rotation(), positions, 16)


@pytest.mark.model
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_reproduce_every_familys_rotation(family):
    model = tiny_model(family)
    geometry = inspect_model(model)
    tokens, seen = 40, []

    def check(kv):
        seen.append(kv.layer)
        spec = geometry.rope_of(kv.layer)
        expected = kv.keys if spec is None else rotated_by(spec, kv.keys, torch.arange(tokens)[None])
        assert torch.allclose(expected, kv.rotated_keys, atol=1e-4 * float(kv.keys.abs().max()))

    with intercept(model, check), torch.no_grad():
        model(token_ids(2, tokens), use_cache=False)
    assert seen == list(range(len(geometry.layers)))


@pytest.mark.model
def test_known_frequencies_scaling_and_partial_rotation():
    llama = geometry_of("llama").ropes[0]
    assert llama.inv_freq == tuple((1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)).tolist())
    assert llama.attention_scaling == 1.0
    yarn = geometry_of("gpt_oss").ropes[0]
    assert yarn.attention_scaling == pytest.approx(0.1 * math.log(32.0) + 1.0, rel=1e-6)
    assert len(geometry_of("stablelm").ropes[0].pairs) == 2  # a quarter of 16 channels
    assert geometry_of("cohere").ropes[0].pairs[0] == (0, 1)
    gemma = geometry_of("gemma3_text")
    assert [layer.rope for layer in gemma.layers] == [0, 0, 1]
    assert [layer.sliding_window for layer in gemma.layers] == [16, 16, None]
    assert [layer.rope for layer in geometry_of("smollm3").layers] == [0, 0, 0, None]


def geometry_of(family):
    return inspect_model(tiny_model(family))


@pytest.mark.model
def test_half_precision_model_has_the_frequencies_of_its_float32_twin():
    half = tiny_model("llama")
    for parameter in half.parameters():  # as checkpoints load: buffers stay float32
        parameter.data = parameter.data.bfloat16()
    half.config.dtype = torch.bfloat16
    assert inspect_model(half).ropes == geometry_of("llama").ropes


@pytest.mark.model
def test_length_dependent_rope_is_captured_but_has_no_table():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }
    model = tiny_model(
        "phi3",
        max_position_embeddings=4096,
        original_max_position_embeddings=1024,
        rope_parameters={**rope, "factor": 4.0},
    )
    found = inspect_model(model)
    assert found.ropes == (RopeSpec(pairs=(), inv_freq=(), length_dependent=True),)
    assert [layer.rope for layer in found.layers] == [0, 0]


@pytest.mark.model
def test_apply_function_comes_from_the_defining_module():
    from transformers.models.llama import modeling_llama

    model = tiny_model("llama")
    attention = next(module for module in model.modules() if hasattr(module, "layer_idx"))
    assert find_apply_rotary(attention) is modeling_llama.apply_rotary_pos_emb
    assert find_apply_rotary(torch.nn.Linear(1, 1)) is None
