"""Shards of an artifact: each rank's heads equal those of the whole, and two ranks compute attention together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifact_factory import RECIPES, random_artifact, recipe, trellis
from click.testing import CliRunner

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.artifact.shard import shard
from kvq_calib.cli.artifact import artifact_group
from kvq_calib.errors import ConfigError
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec
from kvq_calib.schema.spec import KINDS

ROPE = RopeSpec(pairs=((0, 4), (1, 5), (2, 6), (3, 7)), inv_freq=(1.0, 0.3, 0.1, 0.03))
LAYER = LayerGeometry(num_query_heads=8, num_kv_heads=4, head_dim=8, rope=0)
GEOMETRY = KVGeometry(layers=(LAYER, LAYER.model_copy(update={"sliding_window": 40})), ropes=(ROPE,))
#: With values of another head size than the keys in the second layer.
UNEVEN = KVGeometry(layers=(LAYER, LAYER.model_copy(update={"value_head_dim": 6})), ropes=(ROPE,))
#: Recipes with thresholds per channel and no outliers, of which no number depends on a token's other heads.
BY_CHANNEL = {
    "trellis": RECIPES["trellis"],
    "one-state": RECIPES["trellis-one-state"],
    "compensation": RECIPES["compensation"],
    "rank-and-tokens": recipe(
        key=trellis(4, pair_rotation=True, error_compensation={"rank": 2}, token_weighting=True),
        value=trellis(3, error_compensation={}),
    ),
    "scalar": recipe(key={"bits": 3, "outliers": {}}, value={"thresholds": "channel", "outliers": {}}),
}

RANK = """
import sys, torch, torch.distributed as dist
from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.runtime.torch_ops import TorchOps
from kvq_calib.runtime.visibility import AttentionRequest, Visibility
from kvq_calib.artifact.shard import shard

def attention(artifact, query, keys, values):
    outputs = []
    for number, pair in enumerate(artifact.quantizers()):
        ops = TorchOps(pair["key"], pair["value"])
        sinks, cpu = artifact.spec.sink_tokens, torch.device("cpu")
        table = SlotTable(1, sinks, artifact.spec.recent_tokens, cpu)
        storage = LayerStorage(pair["key"], pair["value"], 1, sinks, cpu)
        tokens = keys.shape[2]
        table.append(torch.arange(tokens)[None], None)
        storage.append(keys, values, table, ops.pack)
        seen = Visibility(None, tokens, tokens, artifact.geometry.layers[number].sliding_window)
        outputs.append(ops.attend(AttentionRequest(query, seen, 8**-0.5), storage, table))
    return torch.stack(outputs)

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
query, keys, values = torch.randn(1, 8, 300, 8), torch.randn(1, 4, 300, 8), torch.randn(1, 4, 300, 8)
artifact = KVArtifact.load(sys.argv[1])
mine = attention(shard(artifact, rank, ranks), *(x.chunk(ranks, 1)[rank] for x in (query, keys, values)))
gathered = [torch.empty_like(mine) for _ in range(ranks)]
dist.all_gather(gathered, mine.contiguous())
whole = attention(artifact, query, keys, values)
worst = float((torch.cat(gathered, dim=3) - whole).abs().max())
assert torch.isfinite(whole).all() and whole.abs().max() > 0.1
if rank == 0:
    print("worst", worst)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", BY_CHANNEL)
def test_a_shard_sees_what_the_whole_sees_of_its_heads(name, ranks):
    whole = random_artifact(UNEVEN, BY_CHANNEL[name])
    for rank in range(ranks):
        # It is an artifact in its own right.
        part = KVArtifact.from_bytes(shard(whole, rank, ranks).to_bytes())
        heads = slice(rank * 4 // ranks, rank * 4 // ranks + max(1, 4 // ranks))
        for number, (ours, theirs) in enumerate(zip(part.quantizers(), whole.quantizers(), strict=True)):
            for kind in KINDS:
                shape = UNEVEN.layers[number].shape(kind)
                x = torch.randn(2, 4, 50, shape.head_dim, generator=torch.Generator().manual_seed(1))
                assert ours[kind].shape == (heads.stop - heads.start, shape.head_dim)
                assert torch.equal(ours[kind](x[:, heads]), theirs[kind](x)[:, heads])


def test_thresholds_per_token_come_from_the_ranks_own_heads():
    whole = random_artifact(GEOMETRY, RECIPES["dense2"])
    x = torch.randn(1, 4, 50, 8, generator=torch.Generator().manual_seed(1))
    for rank in range(2):
        ours = shard(whole, rank, 2).quantizers()[0]["value"].quantize(x[:, 2 * rank : 2 * rank + 2])
        theirs = whole.quantizers()[0]["value"].quantize(x)
        assert bool((ours.token_scale <= theirs.token_scale * 1.01).all())


def test_shards_together_hold_what_the_whole_holds():
    whole = random_artifact(GEOMETRY, RECIPES["compensation"])
    parts = [shard(whole, rank, 2).storage(512) for rank in range(2)]
    for buffer in ("codes", "sinks"):
        names = [name for name in whole.storage(512) if buffer in name]
        assert names
        for name in names:
            assert sum(part[name] for part in parts) == whole.storage(512)[name]


def test_two_ranks_attend_as_one(tmp_path):
    file = tmp_path / "a.kvq.safetensors"
    random_artifact(GEOMETRY, RECIPES["compensation"]).save(file)
    (tmp_path / "rank.py").write_text(RANK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         str(tmp_path / "rank.py"), str(file)],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    word, worst = done.stdout.split()[-2:]
    assert word == "worst"
    assert float(worst) < 1e-5


@pytest.mark.parametrize(
    ("rank", "ranks", "message"),
    [(2, 2, "no rank 2"), (0, 3, "cannot divide evenly"), (0, 16, "cannot divide evenly")],
)
def test_what_cannot_be_divided_is_refused(rank, ranks, message):
    with pytest.raises(ConfigError, match=message):
        shard(random_artifact(GEOMETRY, RECIPES["dense2"]), rank, ranks)


def test_command_writes_a_file_for_every_rank(tmp_path):
    file = tmp_path / "a.kvq.safetensors"
    random_artifact(GEOMETRY, RECIPES["compensation"]).save(file)
    pattern = str(tmp_path / "a.{rank}.kvq.safetensors")
    result = CliRunner().invoke(artifact_group, ["shard", str(file), "--ranks", "2", "-o", pattern])
    assert result.exit_code == 0, result.output
    for rank in range(2):
        part = KVArtifact.load(tmp_path / f"a.{rank}.kvq.safetensors")
        assert part.to_bytes() == shard(KVArtifact.load(file), rank, 2).to_bytes()
    with pytest.raises(ConfigError, match="a shard already"):
        shard(part, 0, 2)


def test_command_needs_a_place_for_the_rank(tmp_path):
    file = tmp_path / "a.kvq.safetensors"
    random_artifact(GEOMETRY, RECIPES["compensation"]).save(file)
    result = CliRunner().invoke(
        artifact_group, ["shard", str(file), "--ranks", "2", "-o", str(tmp_path / "b")]
    )
    assert result.exit_code == 2
    assert "{rank}" in result.output
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_a_part_knows_which_layers_share_and_what_is_kept_beside():
    layers = (LAYER, LAYER)
    shared = KVGeometry(layers=layers, ropes=(ROPE,), attends_to=(0, None, 1, 0), state_bytes=96)
    part = shard(random_artifact(shared, BY_CHANNEL["scalar"]), 1, 2).geometry
    assert (part.attends_to, part.state_bytes) == (shared.attends_to, 96)
    assert [layer.num_kv_heads for layer in part.layers] == [2, 2]
