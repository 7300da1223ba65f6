"""Every family of causal language models that transformers can make small: does it work, or why is it refused?

    python benchmarks/models.py [FAMILY ...] [--seconds 120] [--output docs/reference/models.md]

Each family is made with random weights and a few layers by ``AutoConfig.for_model``, in a process of its own with a
limit on time and memory. It is calibrated with the default recipe. Then it generates with a `KVQCache` that keeps all
tokens exact, and what it predicts is compared with the model's own passes: a family that is calibrated and then fails,
or differs, is a fault. Exit status 1 where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import transformers
from common import environment, environment_lines
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvq_calib import KVQCache
from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows
from kvq_calib.errors import KVQError, one_line
from kvq_calib.files import write_atomically
from kvq_calib.model.compat import cache_of, keeps_keys, layer_attribute, own_layers, with_cache
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import check_generation, next_pass
from kvq_calib.model.probe import Serving
from kvq_calib.schema.recipe import DEFAULT_RECIPE, calibration_config

DOCS = Path(__file__).parent.parent / "docs" / "reference" / "models.md"
#: Seconds by the clock, bytes beyond what a process has, and parameters of a model that counts as small.
SECONDS = 120.0
_MEMORY = 8 << 30
_PARAMETERS = 150_000_000
#: What stays exact is stored in float16, so results are those of float16; a wrong key or mask changes them altogether.
_TOLERANCE = 0.02
_PROMPT, _NEW = 40, 6
#: Layers of a small model beside its settings' own, where those of its family name none: in some families of several kinds only the later keep keys and
#: values.
_DEPTHS = (None, 4, 8)

#: Fields of configurations that make a model small, under the names that families have for them.
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 32, "unpadded_vocab_size": 128,
    "linear_head_dim": 16, "linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16,
}  # fmt: skip
#: Of encoders of pictures and sounds, which are not used here.
_PARTS = {"vision_config", "audio_config"}
_DEEP = {"num_hidden_layers", "num_blocks", "depth", "encoder_layers"}
#: Names that some families have for the same.
_SEQ2SEQ = {
    "d_model": 64, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96,
}  # fmt: skip
#: States of Mamba.
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16}
_PER_LAYER_INPUTS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128, "global_head_dim": 32,
}  # fmt: skip
#: Multi-head latent attention.
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
_ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
_DECODING = {"is_decoder": True}
_BYTES = {
    "hidden_size": 64, "hidden_size_global": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
_ASSISTANT = {
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_hidden_layers": 2, "num_kv_shared_layers": 2,
}  # fmt: skip
_ONE_CODEBOOK = {"num_codebooks": 1}
_INDEXED_HYBRID = {
    "layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4, "hc_lowrank": 8,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
#: What single families need beside SMALL; ``None`` leaves a field out.
EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian"), _SEQ2SEQ),
    **dict.fromkeys(("mbart", "mvp", "pegasus", "plbart", "whisper"), _SEQ2SEQ),
    **dict.fromkeys(_ENCODERS, _DECODING),
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "blt": {
        "vocab_size": 260,
        "encoder_config": _BYTES,
        "decoder_config": _BYTES,
        "global_config": _BYTES,
        "patcher_config": _BYTES,
        "encoder_hash_byte_group_vocab": 64,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        **dict.fromkeys(
            ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        ),
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "sliding_window": 16,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["moe", "moe"],
        "num_nextn_predict_layers": 0,
        "num_experts_per_tok": 2,
    },
    "codegen": {"rotary_dim": 16},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "num_key_value_heads": 4,
        "vision_config": {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "adapter_in_dim": 64,
            "adapter_out_dim": 64,
        },
        "audio_config": {
            "hidden_size": 64,
            "adapter_input_size": 64,
            "num_attention_heads": 4,
            "adapter_out_dim": 64,
        },
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA},
    "falcon": {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, **_PER_LAYER_INPUTS},
    "gemma4": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, **_PER_LAYER_INPUTS},
    "gemma4_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, **_PER_LAYER_INPUTS},
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _ASSISTANT),
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], **_MAMBA},
    "gptj": {"rotary_dim": 16},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "prophetnet": {"num_hidden_layers": None, "num_decoder_layers": 2, "num_encoder_layers": 2},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1], **_MAMBA},
    "longcat_flash": {
        "num_layers": 2,
        "num_hidden_layers": None,
        "head_dim": 8,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    **dict.fromkeys(("musicgen", "musicgen_melody"), _ONE_CODEBOOK),
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), _INDEXED_HYBRID),
    "xlnet": {
        "d_model": 64,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 96,
        **dict.fromkeys(
            ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        ),
    },
    "xlstm": {"hidden_size": 128, "num_heads": 2, "head_dim": None, "num_attention_heads": None},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX", **_DECODING},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 4,
        "head_dim": None,
    },
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_embds": False},
}

_INTRODUCTION = (
    "A model needs no declaration: it is looked at when it is calibrated, and either works or is refused with the "
    "reason before time is spent. `kvq-calibrate --check MODEL` says which from the configuration alone. This page is what "
    "`benchmarks/models.py` prints: every family of causal language models that transformers knows, made small with random "
    "weights, calibrated with the default recipe, and used through a packed cache beside its own passes. It says what the "
    "code of a family allows, not how well real weights fare."
)
_KINDS = (
    "Most models call transformers' attention interface with what they cache. There, attention goes over packed pages. "
    "Others have attention of their own, change keys or values on the way, or cache latents (multi-head latent "
    "attention): their cache stores as few bits, and gives a layer back as numbers whenever it is updated, which is "
    "slower; that is said once. Layers that keep a state (linear attention, convolutions, Mamba) keep it in the same "
    "cache, as transformers makes it, from 5.5 on. Layers that attend to other layers' keys and values store none. \"No "
    'RoPE" means that keys are quantized as they are cached: there is no rotary embedding, or none that can be undone. '
    '"Continues by single tokens" is what the code of a family does with its own cache too: given more at once, its '
    "states begin anew."
)
_PICTURES = (
    "Beside families: models of several modalities calibrate with text. Where positions have sections (pictures in "
    "Qwen2.5-VL and Qwen3-VL), keys must be quantized as they are cached, with a `nuq*` recipe and "
    "`--set cache.key.pre_rope=false`; a cache made otherwise serves text, and refuses a picture."
)
_LONGROPE = (
    "Models with LongRoPE (Phi-3.5, Phi-4-mini) take a `nuq*` recipe with `--set cache.key.pre_rope=false` too. A cache "
    "then serves texts that stay on one side of the length at which the model switches its frequencies, and refuses to "
    "pass it: the model would rotate all its keys anew."
)

_PROCESSES = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Finding:
    """What became of a family.

    Attributes:
        family: its ``model_type``.
        outcome: "works", "materialized" (works, and gets its keys and values back as numbers), "refused" (at
            calibration), "not small" (it could not be made small here), or a fault: "crash", "fails", "differs",
            "slow".
        detail: what it caches, or the reason.
    """

    family: str
    outcome: str
    detail: str

    @property
    def is_fault(self) -> bool:
        """Whether that must not be."""
        return self.outcome not in ("works", "materialized", "refused", "not small")


# -------------------------------------------------------------------------------------------- one family


def small_model(family: str) -> Any:
    """A model of the family with random weights, in eval mode.

    Raises:
        Exception: whatever the family's configuration or model makes of these sizes.
    """
    settings = {
        name: value for name, value in {**SMALL, **EXTRA.get(family, {})}.items() if value is not None
    }
    failures: list[Exception] = []
    for nested in (None, "text_config", "decoder"):
        try:
            config = _small_config(family, settings, nested)
            with torch.device("meta"):
                count = sum(weight.numel() for weight in _model(config).parameters())
            if count > _PARAMETERS:
                raise ValueError(f"{count:,} parameters with these sizes")
            torch.manual_seed(0)
            model = _model(config).eval().requires_grad_(False)
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.ndim >= 2:
                        weight *= 4  # attention that depends on what it sees
                    elif bool((weight == 0).all()):
                        weight += 0.1 * torch.randn_like(weight)
            return model
        except Exception as error:
            failures.append(error)
    raise failures[0]


def _model(config: Any) -> Any:
    """A model of a configuration, or of the part of it that is a causal language model."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if kind.config_class is not type(config):
        config = config.get_text_config(decoder=True)
    return kind._from_config(config, dtype=torch.float32)


def _small_config(family: str, settings: dict[str, Any], nested: str | None) -> Any:
    """A configuration with these settings, or a part of that name; more layers where keys need them."""
    if _is_latent(family):
        settings = {**{name: value for name, value in settings.items() if name != "head_dim"}, **_LATENT}
        settings |= {name: value for name, value in EXTRA.get(family, {}).items() if value is not None}
    made: list[Any] = []
    failure: Exception | None = None
    for layers in (None,) if "num_hidden_layers" in EXTRA.get(family, {}) else _DEPTHS:
        sizes = settings if layers is None else {**settings, "num_hidden_layers": layers}
        if nested:
            parts = {name: value for name, value in sizes.items() if name in _PARTS}
            sizes = {**parts, nested: {name: value for name, value in sizes.items() if name not in parts}}
        try:
            made.append(AutoConfig.for_model(family, **sizes))
        except Exception as error:
            failure = failure or error
            continue
        if _keeps_keys(made[-1]):
            break
    else:
        made = made[:1]  # none keeps any
    if not made:
        assert failure is not None
        raise failure
    config = made[-1]
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig) and part is not config.get_text_config(decoder=True):
            for name in _DEEP.intersection(vars(part)):
                setattr(part, name, 1)
    return config


def _keeps_keys(config: Any) -> bool:
    """Whether layers of a model of this configuration keep keys and values."""
    try:
        return any(map(keeps_keys, own_layers(config)))
    except Exception:  # it does not say what its layers are
        return False


def _is_latent(family: str) -> bool:
    """Whether a family has multi-head latent attention."""
    try:
        text = AutoConfig.for_model(family).get_text_config(decoder=True)
        return bool(layer_attribute(text, "kv_lora_rank"))
    except Exception:  # some have no defaults, or do not say what their layers are
        return False


def examine(family: str) -> Finding:
    """Calibrate and use a family, in this process."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    try:
        model = small_model(family)
    except Exception as error:
        return Finding(family, "not small", f"{type(error).__name__}: {one_line(error, 120)}")
    ids = torch.randint(3, 128, (2, 64), generator=torch.Generator().manual_seed(1))
    try:
        artifact = calibrate(
            model,
            TokenWindows(ids, {"sha256": ""}),
            {DEFAULT_RECIPE: calibration_config(DEFAULT_RECIPE)},
            model_id=family,
            model_config=model_fingerprint(model),
        ).artifacts[DEFAULT_RECIPE]
    except KVQError as error:
        return Finding(family, "refused", one_line(error, 400).removeprefix(f"{type(model).__name__} "))
    except Exception as error:
        return Finding(family, "crash", f"{type(error).__name__}: {one_line(error)}")
    try:
        problem = _use(model, artifact, ids)
    except Exception as error:
        return Finding(family, "fails", f"{type(error).__name__}: {one_line(error)}")
    if problem:
        return Finding(family, "differs", problem)
    serving = check_generation(model, artifact.geometry)
    return Finding(family, "materialized" if serving.materialized else "works", _cached(artifact, serving))


@torch.no_grad()
def _use(model: Any, artifact: Any, ids: torch.Tensor) -> str:
    """Passes and generation through an exact cache beside passes without one; how they differ, or nothing."""
    prompt = ids[:1, :_PROMPT]
    cache = KVQCache(artifact, model, recent_tokens=10**6)
    sizes = [38, 1, 1] if cache.single_tokens else [17, 22, 1]
    got = _passes(model, cache, prompt, sizes)
    wanted = model(input_ids=prompt, use_cache=False).logits
    # An indexer may choose among keys that are alike, in several passes others than in one.
    for expected in (lambda: wanted, lambda: _passes(model, None, prompt, sizes)):
        error = float((got - expected()).abs().max() / wanted.abs().max())
        if error <= _TOLERANCE:
            break
    else:
        return f"passes through the cache are off by {error:.3g} of the largest logit"
    cache.reset()
    text, own = (
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), **with_cache(each), do_sample=False, max_new_tokens=_NEW,
            min_new_tokens=_NEW, eos_token_id=None, use_cache=True,
        )
        for each in (cache, None)
    )  # fmt: skip
    if text.shape[1] != _PROMPT + _NEW or cache.get_seq_length() != text.shape[1] - 1:
        return f"it generated {text.shape[1] - _PROMPT} tokens with {cache.get_seq_length()} in the cache"
    scores = model(input_ids=text, use_cache=False).logits[0, _PROMPT - 1 : -1]
    # Of tokens that are as good as equal, rounding may take either; some families force the last one.
    behind = scores.amax(-1) - scores.gather(1, text[0, _PROMPT:, None])[:, 0]
    if not torch.equal(text, own) and not bool((behind <= _TOLERANCE * scores.abs().max()).all()):
        return "it generates other tokens than with its own cache"
    packed = KVQCache(artifact, model)
    for part in (ids[:, :60], *ids[:, 60:].split(1 if cache.single_tokens else 4, dim=1)):
        if not bool(model(**next_pass(model, part, packed, packed.get_seq_length())).logits.isfinite().all()):
            return "through the packed cache predictions are not finite"
    return ""


def _passes(model: Any, cache: Any, ids: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Logits ``[1, T, V]`` of a text in several passes through a cache; through the model's own for ``None``."""
    logits, start = [], 0
    for part in ids.split(list(sizes), dim=1):
        output = model(**next_pass(model, part, cache, start), use_cache=True)
        cache, start = cache_of(output), start + part.shape[1]
        logits.append(output.logits)
    return torch.cat(logits, 1)


def _cached(artifact: Any, serving: Serving) -> str:
    """What the layers of a model cache, in words."""
    geometry, kinds = artifact.geometry, []
    for layer in artifact.geometry.layers:
        heads = (
            str(layer.head_dim)
            if layer.value_head_dim is None
            else f"{layer.head_dim}/{layer.value_head_dim}"
        )
        window = "" if layer.sliding_window is None else f", window {layer.sliding_window}"
        kinds.append(f"heads of {heads}{window}{'' if layer.rope is not None else ', no RoPE'}")
    if geometry.state_bytes:
        kinds.append("states beside")
    if geometry.state_bytes_per_token:
        kinds.append("an indexer beside")
    if any(geometry.is_shared(index) for index in range(len(geometry.layers))):
        kinds.append("layers that share them")
    if serving.single_tokens:
        kinds.append("continues by single tokens")
    return "; ".join(dict.fromkeys(kinds))


# ------------------------------------------------------------------------------------------ all families


def families() -> list[str]:
    """Those of this transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _report(family: str, connection: Any) -> None:
    """What a family's process does."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    torch.set_num_threads(1)
    statm = Path("/proc/self/statm")
    if statm.exists():
        held = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, resource.RLIM_INFINITY))
    connection.send(examine(family))


def examined(family: str, seconds: float = SECONDS) -> Finding:
    """The finding of a process of its own, which is killed after that time."""
    ours, theirs = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_report, args=(family, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return Finding(family, "slow", f"more than {seconds:.0f} s")
        finding: Finding = ours.recv()
        return finding
    except EOFError:
        process.join()
        return Finding(family, "crash", f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _serve() -> None:
    """Start the process that all others are forked from, with everything imported."""
    _PROCESSES.set_forkserver_preload(["models"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def sweep(names: Sequence[str], seconds: float = SECONDS) -> list[Finding]:
    """The findings of some families."""
    _serve()
    found = []
    for name in names:
        began = time.monotonic()
        found.append(examined(name, seconds))
        print(f"{name}: {found[-1].outcome} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    return found


def report(found: Sequence[Finding], facts: Mapping[str, Any]) -> list[str]:
    """The page in Markdown."""
    counts = Counter(finding.outcome for finding in found)
    faults = [finding for finding in found if finding.is_fault]
    counted = (
        f"Of {len(found)} families, {counts['works']} attend to packed pages, {counts['materialized']} get their keys and "
        f"values back as numbers, {counts['refused']} are refused, and {counts['not small']} could not be made small by "
        f"these settings, so they were not tried. Calibrated and then failing or different: {len(faults)}."
    )
    measured, *rest = environment_lines(facts)
    lines = ["# Models", ""]
    note = [facts["note"]] if facts.get("note") else []
    for text in (_INTRODUCTION, _KINDS, measured, *note):
        lines += [*textwrap.wrap(text, 120), ""]
    lines += rest[len(note) + 1 :]
    for text in (counted, _PICTURES, _LONGROPE):
        lines += [*textwrap.wrap(text, 120), ""]
    titles = {
        "works": "Attention over packed pages",
        "materialized": "Materialized: keys and values come back as numbers",
        "refused": "Refused at calibration",
        "not small": "Not tried: could not be made small",
    }
    for outcome, title in titles.items():
        rows = [[f"`{each.family}`", _cell(each.detail)] for each in found if each.outcome == outcome]
        if rows:
            heading = "what it caches here" if outcome in ("works", "materialized") else "reason"
            lines += [f"## {title}", "", *_table(["family", heading], rows), ""]
    if faults:
        rows = [[f"`{each.family}`", each.outcome, _cell(each.detail)] for each in faults]
        lines += ["## Faults", "", *_table(["family", "", "what happened"], rows), ""]
    return lines[:-1]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *rows)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all by default")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a family, default %(default).0f")
    parser.add_argument("--note", default="", help="a sentence for the record")
    parser.add_argument(
        "--output",
        type=Path,
        help="the page; by default it is printed, and for all families docs/reference/models.md",
    )
    return parser.parse_args(words)


def main() -> None:
    options = arguments()
    facts = environment(options.note)
    found = sweep(options.families or families(), options.seconds)
    lines = report(found, facts)
    output = options.output or (None if options.families else DOCS)
    if output is not None:
        write_atomically(output, ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))
    sys.exit(any(finding.is_fault for finding in found))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
