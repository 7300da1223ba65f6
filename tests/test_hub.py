"""Artifacts in folders and on the hub, against a hub on loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from artifact_factory import RECIPES, artifact_for
from hub_endpoint import Hub
from models_zoo import tiny_model, token_ids

from kvq_calib import KVArtifact, KVQCache
from kvq_calib.artifact.card import CardEntry, is_card, model_card
from kvq_calib.artifact.errors import ArtifactHubError
from kvq_calib.artifact.hub import file_name
from kvq_calib.calibrate.run import calibrate
from kvq_calib.cli.options import write_json
from kvq_calib.data import TokenWindows
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.compat import with_cache
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.schema.recipe import calibration_config
from kvq_calib.schema.results import read_results

pytestmark = pytest.mark.model

TOKEN = "hf_of_the_test"


@pytest.fixture(scope="module")
def artifacts() -> dict[str, KVArtifact]:
    model = tiny_model("llama")
    configs = {name: calibration_config(name) for name in ("nuq4-1p", "nuq3-1p")}
    source = {"dataset": "notes.txt", "seqlen": 48, "windows": 2, "sha256": "0f" * 32}
    windows = TokenWindows(token_ids(2, 48), source)
    return calibrate(
        model, windows, configs, model_id="maker/tiny", model_config=model_fingerprint(model)
    ).artifacts


@pytest.fixture(scope="module")
def results(artifacts: dict[str, KVArtifact], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A result of an evaluation, of one of the two."""
    folder = tmp_path_factory.mktemp("results")
    artifacts["nuq3-1p"].save(folder / "a")
    import hashlib

    measured = {
        "name": "a", "mode": "prefill", "bits_per_element": 3.5, "perplexity": 21.5, "baseline_perplexity": 20.25,
        "kl_mean": 0.0625, "kl_p99": 0.5, "top1_agreement": 0.875, "tokens": 4092,
    }  # fmt: skip
    config = {
        "dataset": "other.txt",
        "artifact_sha256": {"a": hashlib.sha256((folder / "a").read_bytes()).hexdigest()},
    }
    write_json(str(folder / "results.json"), {"artifacts": [measured], "config": config})
    return str(folder / "results.json")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(TOKEN) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def python(
    hub: Hub, home: Path, code: str, *words: str, token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose hub is that on loopback."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "no_proxy": "*",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment
    )


PUSH = "import sys; from kvq_calib.cli.main import artifact; sys.argv = ['kvq-artifact', 'push', *sys.argv[1:]]; artifact()"


def test_what_is_pushed_is_loaded(
    hub: Hub, artifacts: dict[str, KVArtifact], results: str, tmp_path: Path
) -> None:
    words = []
    for name, artifact in artifacts.items():
        artifact.save(tmp_path / f"{name}.kvq.safetensors")
        words += ["--artifact", str(tmp_path / f"{name}.kvq.safetensors")]
    ran = python(
        hub, tmp_path, PUSH, "maker/tiny-kv", *words, "--results", results, "--private", "--message", "both"
    )
    assert ran.returncode == 0, ran.stderr
    files = hub.repositories["maker/tiny-kv"]["main"]
    assert ran.stdout.startswith(f"{hub.address}/maker/tiny-kv/commit/")
    assert (hub.private, hub.commits) == ({"maker/tiny-kv"}, ["both"])
    card = files["README.md"].decode()
    assert is_card(card)
    assert re.search(
        r"`nuq3-1p.kvq.safetensors` \| other.txt \| 4,092 \| 0.06250 \| 0.5000 \| 0.8750 \| 21.500", card
    )
    for name, artifact in artifacts.items():
        assert files[f"{name}.kvq.safetensors"] == artifact.to_bytes()
        assert f"| {artifact.bits_per_element(4096):.3f} |" in card

    code = (
        "import sys; from kvq_calib import KVArtifact\n"
        "found = KVArtifact.from_pretrained('maker/tiny-kv', filename='nuq3-1p.kvq.safetensors')\n"
        "sys.stdout.write(found.calibration['recipe']); found.save(sys.argv[1])\n"
        "try: KVArtifact.from_pretrained('maker/tiny-kv')\n"
        "except Exception as error: print('', type(error).__name__, error)\n"
        "try: KVArtifact.from_pretrained('maker/nothing')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    ran = python(hub, tmp_path, code, str(tmp_path / "again"))
    assert ran.returncode == 0, ran.stderr
    loaded, missing = ran.stdout.splitlines()
    assert loaded == (
        "nuq3-1p ArtifactHubError maker/tiny-kv holds 2 artifacts; name one: filename='nuq3-1p.kvq.safetensors', or "
        "nuq4-1p.kvq.safetensors"
    )
    assert missing.startswith(
        "ArtifactHubError no artifact maker/nothing: there is no such file or folder here, and on"
    )
    assert (tmp_path / "again").read_bytes() == artifacts["nuq3-1p"].to_bytes()


def test_branches_foreign_cards_and_accounts_that_may_not(
    hub: Hub, artifacts: dict[str, KVArtifact], tmp_path: Path
) -> None:
    hub.repositories["maker/model"] = {"main": {"README.md": b"# My model\n"}}
    artifacts["nuq4-1p"].save(tmp_path / "a.kvq.safetensors")
    code = (
        "import sys; from kvq_calib import KVArtifact\n"
        "artifact = KVArtifact.load(sys.argv[1])\n"
        "print(artifact.push_to_hub('maker/model', revision='kv'))\n"
        "artifact.save_pretrained(sys.argv[2], push_to_hub=True, repo_id='maker/kv', private=False)\n"
        "print(KVArtifact.from_pretrained('maker/model', revision='kv').model['id'])\n"
        "try: artifact.push_to_hub('maker/kv', token='hf_of_another')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    ran = python(hub, tmp_path, code, str(tmp_path / "a.kvq.safetensors"), str(tmp_path / "folder"))
    assert ran.returncode == 0, ran.stderr
    address, model, refused = ran.stdout.splitlines()
    assert address.startswith(f"{hub.address}/maker/model/commit/")
    assert model == "maker/tiny"
    assert refused.startswith("ArtifactHubError cannot upload to maker/kv: ")
    assert refused.endswith("log in with hf auth login, or set HF_TOKEN")
    branches = hub.repositories["maker/model"]
    assert list(branches["main"]) == ["README.md"]
    assert branches["kv"]["README.md"] == b"# My model\n"
    assert branches["kv"]["nuq4-1p.kvq.safetensors"] == artifacts["nuq4-1p"].to_bytes()
    assert "the README of maker/model describes something else and is left as it is" in ran.stderr
    assert not hub.private
    ours = {file.name: file.read_bytes() for file in (tmp_path / "folder").iterdir()}
    assert ours["nuq4-1p.kvq.safetensors"] == hub.repositories["maker/kv"]["main"]["nuq4-1p.kvq.safetensors"]
    assert is_card(ours["README.md"].decode())


def test_a_folder_is_saved_and_loaded(artifacts: dict[str, KVArtifact], results: str, tmp_path: Path) -> None:
    artifact = artifacts["nuq3-1p"]
    artifact.save_pretrained(tmp_path / "kv", results=[results])
    assert sorted(file.name for file in (tmp_path / "kv").iterdir()) == [
        "README.md",
        "nuq3-1p.kvq.safetensors",
    ]
    assert KVArtifact.from_pretrained(tmp_path / "kv").to_bytes() == artifact.to_bytes()
    artifact.save_pretrained(
        tmp_path / "kv", filename="other.kvq.safetensors"
    )  # the card is its own, and replaced
    for wanted in (None, "third.kvq.safetensors"):
        with pytest.raises(
            ArtifactHubError, match="holds 2 artifacts" if wanted is None else "holds no third"
        ):
            KVArtifact.from_pretrained(tmp_path / "kv", filename=wanted)
    assert KVArtifact.from_pretrained(tmp_path / "kv", filename="other.kvq.safetensors").spec == artifact.spec
    assert KVArtifact.from_pretrained(tmp_path / "kv" / "other.kvq.safetensors").spec == artifact.spec


def test_a_card_of_something_else_stays(
    artifacts: dict[str, KVArtifact], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_text("# My model\n")
    artifacts["nuq3-1p"].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My model\n"
    assert "is left as it is" in caplog.text


def test_what_is_not_there_is_said(artifacts: dict[str, KVArtifact], tmp_path: Path) -> None:
    with pytest.raises(ArtifactHubError, match=r"holds no file that ends in \.kvq\.safetensors"):
        KVArtifact.from_pretrained(tmp_path)
    for name in ("./missing", "a/b/c", "missing.kvq.safetensors"):
        with pytest.raises(ArtifactHubError, match="no such artifact or folder: "):
            KVArtifact.from_pretrained(name)
    with pytest.raises(ArtifactHubError, match=r"no artifact maker/kv: there is no such file or folder here"):
        KVArtifact.from_pretrained("maker/kv", cache_dir=tmp_path)  # the tests are offline
    with pytest.raises(ArtifactHubError, match="is not a name for an artifact"):
        artifacts["nuq3-1p"].save_pretrained(tmp_path, filename="../a.kvq.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactHubError, match="cannot make the folder"):
        artifacts["nuq3-1p"].save_pretrained(tmp_path / "file")


def test_the_card_says_bits_divergence_data_and_command(
    artifacts: dict[str, KVArtifact], results: str
) -> None:
    artifact = artifacts["nuq3-1p"]
    (found,) = read_results([results])
    card = model_card("maker/kv", [CardEntry("a.kvq.safetensors", artifact, [(found, found.artifacts[0])])])
    assert card.startswith(
        "---\nbase_model:\n- maker/tiny\nbase_model_relation: quantized\nlibrary_name: kvq-calib\n"
    )
    headings = [line for line in card.splitlines() if line.startswith("## ")]
    assert headings == ["## Size", "## Accuracy", "## Use", "## How it was made"]
    assert f"{artifact.bits_per_element(32768):.3f}" in card
    assert "| 0.06250 |" in card
    assert "| calibration text | notes.txt |" in card
    assert "KVArtifact.from_pretrained('maker/kv')" in card
    assert "```sh\nkvq-calibrate maker/tiny \\\n  -o a.kvq.safetensors \\\n  --config nuq3-1p \\\n" in card
    assert "Not measured" in model_card("maker/kv", [CardEntry("a.kvq.safetensors", artifact)])
    assert not is_card("# Mine\n")
    assert not is_card("---\nlibrary_name: transformers\n---\n")
    assert not is_card("---\n: [\n---\n")


def test_what_an_artifact_says_of_itself_stays_in_its_cell(artifacts: dict[str, KVArtifact]) -> None:
    import dataclasses

    evil = dataclasses.replace(
        artifacts["nuq3-1p"],
        model={"id": "a | b\n# c `d`", "config": {}},
        calibration={"recipe": "../x\ny", "data": {"dataset": "t | u\n\nv"}},
    )
    assert file_name(evil) == "x-y.kvq.safetensors"
    card = model_card("maker/kv", [CardEntry("a.kvq.safetensors", evil)])
    assert "| calibration text | t \\| u v |" in card
    assert "\n# c" not in card


def test_a_cache_is_made_of_a_path_and_swapped_arguments_say_so(tmp_path: Path) -> None:
    model = tiny_model("llama")
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    artifact.save(tmp_path / "a.kvq.safetensors")
    ids = token_ids(1, 40)
    outputs = []
    for given in (artifact, tmp_path / "a.kvq.safetensors", str(tmp_path)):
        cache = KVQCache(given, model)
        with torch.no_grad():
            outputs.append(model(ids, **with_cache(cache)).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    cache.save(tmp_path / "cache")
    assert KVQCache.load(tmp_path / "cache", str(tmp_path), model).get_seq_length() == 40
    with pytest.raises(RuntimeMismatchError, match=r"swapped; write KVQCache\(artifact, model\)"):
        KVQCache(model, artifact)  # type: ignore[arg-type]
    with pytest.raises(RuntimeMismatchError, match="str is no model of transformers"):
        KVQCache(artifact, "maker/tiny")  # type: ignore[arg-type]
    with pytest.raises(RuntimeMismatchError, match="dict is no artifact"):
        KVQCache({}, model)  # type: ignore[arg-type]
