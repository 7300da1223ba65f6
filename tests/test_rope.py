import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_zoo import FAMILIES, tiny_model, token_ids

from kvq_calib.model.intercept import inspect_model, intercept
from kvq_calib.model.rope import RopeLayoutError, Rotation, discover_rope, find_apply_rotary


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
    assert rotation.is_identity
    assert rotation.rotate(keys) is keys
    assert rotation.unrotate(keys) is keys
    assert rotation.adjoint(keys) is keys


@settings(max_examples=25, deadline=None)
@given(layout=LAYOUTS, theta=st.sampled_from([100.0, 1e4, 1e6]))
def test_layout_is_found_for_every_arrangement(layout, theta):
    apply, width, scaling = layout
    positions = torch.tensor([0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 3000])
    cos, sin, inv_freq = tables(positions, width, apply, scaling, theta)
    layout_found = discover_rope(Rotation(apply, cos, sin), positions, 16)
    half = width // 2
    want = [[i, i + half] if apply is half_split else [2 * i, 2 * i + 1] for i in range(half)]
    assert layout_found.pairs.tolist() == want
    assert torch.allclose(layout_found.inv_freq, inv_freq.double(), rtol=1e-6, atol=0)
    assert layout_found.attention_scaling == pytest.approx(scaling, rel=1e-6)

    far = torch.tensor([7, 999, 2047])
    cos, sin, _ = tables(far, width, apply, scaling, theta)
    keys = torch.randn(2, 3, 3, 16)
    rotated = Rotation(apply, cos, sin).rotate(keys)
    for shape in (far, far[None], far[None].expand(2, 3)):
        assert torch.allclose(layout_found.rotate(keys, shape), rotated, atol=1e-3)
        assert torch.allclose(layout_found.unrotate(rotated, shape), keys, atol=2e-3)


def test_half_precision_tables_take_exact_frequencies_from_a_buffer():
    positions = torch.tensor([0, 1, 2, 4, 8, 16, 32, 64, 128])
    cos, sin, inv_freq = tables(positions, 16, half_split, dtype=torch.bfloat16)
    other = inv_freq * 1.5
    layout = discover_rope(
        Rotation(half_split, cos, sin), positions, 16, candidates=[torch.ones(3), other, inv_freq]
    )
    assert torch.equal(layout.inv_freq, inv_freq.double())


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
        entry = geometry.layers[kv.layer]
        seen.append(kv.layer)
        assert kv.rotation.is_identity == (not entry.has_rope)
        if not entry.has_rope:
            assert entry.rope is None
            return
        layout = geometry.ropes[entry.rope]
        expected = layout.rotate(kv.keys, torch.arange(tokens))
        assert torch.allclose(expected, kv.rotated_keys, atol=1e-4 * float(kv.keys.abs().max()))

    with intercept(model, check), torch.no_grad():
        model(token_ids(2, tokens), use_cache=False)
    assert seen == [layer.layer for layer in geometry.layers]


@pytest.mark.model
def test_known_frequencies_scaling_and_partial_rotation():
    llama = inspect_model(tiny_model("llama"))
    want = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    assert torch.equal(llama.ropes[0].inv_freq, want.double())
    assert llama.ropes[0].attention_scaling == 1.0
    yarn = inspect_model(tiny_model("gpt_oss"))
    assert yarn.ropes[0].attention_scaling == pytest.approx(0.1 * math.log(32.0) + 1.0, rel=1e-6)
    assert len(inspect_model(tiny_model("stablelm")).ropes[0].pairs) == 2  # a quarter of 16 channels
    assert inspect_model(tiny_model("cohere")).ropes[0].pairs[0].tolist() == [0, 1]
    gemma = inspect_model(tiny_model("gemma3_text"))
    assert [layer.rope for layer in gemma.layers] == [0, 0, 1]
    assert [layer.sliding_window for layer in gemma.layers] == [16, 16, None]
    smollm = inspect_model(tiny_model("smollm3"))
    assert [layer.has_rope for layer in smollm.layers] == [True, True, True, False]


@pytest.mark.model
def test_half_precision_model_has_the_frequencies_of_its_float32_twin():
    exact = inspect_model(tiny_model("llama")).ropes[0]
    half = tiny_model("llama")
    for parameter in half.parameters():  # as checkpoints load: buffers stay float32
        parameter.data = parameter.data.bfloat16()
    half.config.dtype = torch.bfloat16
    rounded = inspect_model(half).ropes[0]
    assert torch.equal(rounded.inv_freq, exact.inv_freq)
    assert rounded.attention_scaling == 1.0


@pytest.mark.model
def test_length_dependent_rope_is_captured_but_has_no_layout():
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
    layer = inspect_model(model).layers[0]
    assert layer.has_rope
    assert layer.rope is None
    assert layer.rope_problem == "its frequencies depend on the length of the sequence"


@pytest.mark.model
def test_apply_function_comes_from_the_defining_module():
    from transformers.models.llama import modeling_llama

    model = tiny_model("llama")
    attention = next(module for module in model.modules() if hasattr(module, "layer_idx"))
    assert find_apply_rotary(attention) is modeling_llama.apply_rotary_pos_emb
    assert find_apply_rotary(torch.nn.Linear(1, 1)) is None
