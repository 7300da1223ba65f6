import json
import shutil

import pytest
import torch
from models_zoo import FAMILIES, tiny_config, tiny_model, token_ids
from safetensors.torch import load_file, save_file
from transformers import T5Config
from transformers.utils import logging

from kvq_calib.errors import ModelError, one_line
from kvq_calib.model import hub
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.load import check_tokens, load_model, vocabulary_of

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_loads_a_folder_frozen_in_eval_mode(folder, capsys):
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    loaded = load_model(str(folder))
    assert capsys.readouterr().out == ""
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert loaded.name == "tiny-llama"
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer("ab")["input_ids"] == [14, 15]
    ids = token_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, tiny_model("llama")(ids).logits)


def test_dtype_is_float32_on_the_cpu_unless_asked(folder, tmp_path, tokenizer):
    path = tmp_path / "half"
    tiny_model("llama").bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)
    assert load_model(str(path), device="cpu").model.dtype == torch.float32
    assert load_model(str(path), dtype="bfloat16").model.dtype == torch.bfloat16


def test_softcapped_models_keep_their_softcap(tmp_path, tokenizer):
    model = tiny_model("gemma2")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path)).model
    assert loaded.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(loaded(token_ids(1, 8)).logits, model(token_ids(1, 8)).logits)


def refused(name, reason, **options):
    with pytest.raises(ModelError, match=reason) as caught:
        load_model(str(name), **options)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_refused(tmp_path, folder):
    refused(tmp_path / "nothing", "no such folder")
    refused(tmp_path / "model.gguf", "no such file")
    refused(tmp_path, "holds no config.json")
    (tmp_path / "weights.bin").write_bytes(b"x")
    refused(tmp_path / "weights.bin", "neither a model folder nor a .gguf file")
    refused(
        "no-one/nothing",
        "no such folder here, the hub cannot be reached, and the model is not in its local cache",
    )
    refused(folder, "unknown dtype 'int8'", dtype="int8")
    refused(folder, "unknown device 'gpu'", device="gpu")


def test_packages_that_are_missing_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("kvq_calib.model.load.importlib.util.find_spec", lambda name: None)
    refused(folder, "pip install accelerate", device_map="auto")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "model.gguf", "pip install gguf accelerate")


def test_what_is_no_causal_language_model_is_refused(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    T5Config(d_model=16, num_layers=1).save_pretrained(tmp_path)
    refused(tmp_path, "not a causal language model")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "cannot load")
    (tmp_path / "model.gguf").write_bytes(b"GGUF nonsense")
    refused(tmp_path / "model.gguf", "cannot load")


def test_missing_weights_are_refused_rather_than_made_up(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, "lacks 1 weights, model.layers.1.self_attn.k_proj.weight")


def test_pickled_weights_are_not_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "cannot load")


def changed(folder, copy, **fields):
    """A copy of a model's folder with other fields in its configuration."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    file = copy / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return copy


def test_a_folder_without_tokenizer_says_so(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("token*"):
        file.unlink()
    refused(tmp_path, "holds no tokenizer; put the model's tokenizer files")
    (tmp_path / "tokenizer.json").write_text("{")
    refused(tmp_path, "cannot load the tokenizer of .*")


def test_weights_of_other_shapes_are_named_with_both_shapes(folder, tmp_path):
    refused(
        changed(folder, tmp_path, head_dim=32),
        r"do not fit its config.json: model.layers.0.self_attn.k_proj.weight is \[32, 64\], and the configuration "
        r"makes it \[64, 64\] \(and 7 more\)",
    )


def test_code_of_a_checkpoint_names_the_option(folder, tmp_path):
    own = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    refused(changed(folder, tmp_path, model_type="x", auto_map=own), "--trust-remote-code runs it")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "model.gguf"])
def test_a_git_lfs_pointer_is_named(folder, tmp_path, file):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    (tmp_path / file).write_text(pointer)
    name = tmp_path / file if file.endswith(".gguf") else tmp_path
    refused(
        name,
        f"{file} is a Git LFS pointer \\(130 bytes\\), not the file itself; fetch that with git lfs pull",
    )


def test_weights_without_use_are_a_warning(folder, tmp_path, caplog):
    load_model(str(folder))
    assert not caplog.records
    load_model(str(changed(folder, tmp_path, num_hidden_layers=1)))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "holds 9 weights that its configuration has no place for (model.layers.1." in record.getMessage()


def test_tokens_that_a_model_does_not_know(folder):
    model = tiny_model("llama")
    assert vocabulary_of(model) == 128
    check_tokens(model, torch.tensor([[0, 127]]))
    for token in (128, -1):
        with pytest.raises(ModelError, match=f"has token {token}, and the model knows 0 to 127"):
            check_tokens(model, torch.tensor([[5, token]]))


# Both ends of the supported range of transformers must give these.
DIGESTS = {
    "llama": "a62b07777f977232",
    "mistral": "2ac626db65d1b762",
    "qwen2": "c705df25a65f222c",
    "qwen3": "147f2d5caf83bac3",
    "gemma2": "f966c85b8e9adada",
    "gemma3_text": "af3f14a5426b1848",
    "phi3": "d2d5f888a32e87c3",
    "gpt_neox": "d87f0783681d3d04",
    "olmo2": "02733f8e40ae3963",
    "olmo3": "78bc88b58c53df07",
    "granite": "3ea0186934311673",
    "stablelm": "e9eb2182fd1b4084",
    "gpt_oss": "d34d2be8024565b3",
    "cohere": "d317efd0c492c76f",
    "glm": "0c99438cb12d7815",
    "smollm3": "0a418733d2c4eef9",
    "ernie4_5": "5b7cfdda7cc60008",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_is_the_same_in_every_release(family):
    fingerprint = model_fingerprint(tiny_model(family))
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint["sha256"][:16] == DIGESTS[family]


def test_fingerprint_sees_what_decides_the_cache_and_not_the_weights():
    base = model_fingerprint(tiny_model("llama"))
    assert model_fingerprint(tiny_model("llama", seed=1)) == base
    assert model_fingerprint(tiny_model("llama", initializer_range=0.1)) == base
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    changes = {
        "num_hidden_layers": {"num_hidden_layers": 3},
        "num_key_value_heads": {"num_key_value_heads": 1},
        "head_dim": {"head_dim": 32},
        "vocab_size": {"vocab_size": 64},
        "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    }
    for field, overrides in changes.items():
        changed = model_fingerprint(tiny_model("llama", **overrides))
        assert changed[field] != base[field]
        assert changed["sha256"] != base["sha256"]
    assert model_fingerprint(tiny_model("llama", rope_parameters=yarn))["rope"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512.0,
    }


def test_hub_is_not_asked_without_network(monkeypatch):
    assert not hub.hub_reachable()  # offline by environment
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)

    def unknown(host, port):
        raise OSError("name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    assert not hub.hub_reachable()
    monkeypatch.setattr("socket.getaddrinfo", lambda host, port: [])
    assert hub.hub_reachable()
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "proxy"})
    assert hub.hub_reachable()  # names may resolve behind the proxy only


def test_bars_of_downloads_are_for_terminals(monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled

    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    before = are_progress_bars_disabled()
    for terminal in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        with hub.quiet():
            assert are_progress_bars_disabled() == (before or not terminal)
            assert not logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() == before


def test_an_error_on_one_line():
    assert one_line(ValueError("\n  one of:\n(1) two")) == "one of: (1) two"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("x" * 300)) == "x" * 197 + "..."


def test_every_family_is_in_the_zoo():
    assert len(FAMILIES) == 17
    assert all(tiny_config(family).model_type == family for family in FAMILIES)
