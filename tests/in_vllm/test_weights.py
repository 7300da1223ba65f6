"""LoRA and weights of 8 bits on the packed cache: likelihoods are those of ``KVQCache`` with the same weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import engine
from models_zoo import token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvq_calib import KVQCache
from kvq_calib.model.compat import with_cache

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # of vLLM and what it imports
]
PROMPT = token_ids(1, 400, seed=3)[0].tolist()
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 512}
#: Of a scheme of 8 bits, as in a checkpoint's configuration.
ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def likelihoods(llm: Any, **given: Any) -> Tensor:
    """Of the prompt's tokens."""
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], asked, use_tqdm=False, **given)
    pairs = zip(output.prompt_logprobs[1:], PROMPT[1:], strict=True)
    return torch.tensor([place[token].logprob for place, token in pairs])


def own_likelihoods(model: Any, artifact: Path) -> Tensor:
    """The same with ``KVQCache``."""
    tokens = torch.tensor([PROMPT])
    with torch.inference_mode():
        logits = model(tokens, **with_cache(KVQCache(artifact, model))).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None])[:, 0]


def assert_alike(found: Tensor, wanted: Tensor, other: Tensor) -> None:
    """Found is as wanted, and far from others."""
    print(
        "difference", float((found - wanted).abs().mean()), "from others", float((found - other).abs().mean())
    )
    assert float((found - wanted).abs().mean()) < 0.1 * float((found - other).abs().mean())


def write_lora(model: Any, folder: Path) -> Any:
    """Write an adapter of the projections that make keys and values. Returns the model with it."""
    random = torch.Generator().manual_seed(5)
    tensors, merged = {}, copy.deepcopy(model)
    for name, module in merged.named_modules():
        if name.endswith(("k_proj", "v_proj")):
            rows, columns = module.weight.shape
            down = torch.randn(8, columns, generator=random) * 0.3 * columns**-0.5
            up = torch.randn(rows, 8, generator=random) * 0.3
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
            module.weight.data += up @ down
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["k_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged


def test_lora(tiny_llama, tiny_folder, tiny_artifact, tmp_path):
    from vllm.lora.request import LoRARequest

    merged = write_lora(tiny_llama, tmp_path)
    with engine(tiny_folder, tiny_artifact, enable_lora=True, max_lora_rank=8, **OPTIONS) as llm:
        without, found = (
            likelihoods(llm, lora_request=adapter)
            for adapter in (None, LoRARequest("adapter", 1, str(tmp_path)))
        )
    assert_alike(found, own_likelihoods(merged, tiny_artifact), without)
    assert_alike(without, own_likelihoods(tiny_llama, tiny_artifact), found)


def write_eight_bits(model: Any, folder: Path, made: Path) -> Any:
    """Write the model with linear layers of 8-bit integers and a scale per row. Returns a model that does the same."""
    tensors, rounded = load_file(folder / "model.safetensors"), copy.deepcopy(model)
    for name, module in rounded.named_modules():
        if name.endswith("_proj"):
            scale = module.weight.abs().amax(1, keepdim=True) / 127
            levels = (module.weight / scale).round()
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = levels.to(torch.int8), scale.detach()
            module.weight.data = levels.detach() * scale.detach()
            module.register_forward_pre_hook(_rounded)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": ROWS, "input_activations": TOKENS}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (made / "config.json").write_text(json.dumps(config))
    return rounded


def _rounded(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Inputs of a layer as integers of 8 bits with a scale per token."""
    scale = args[0].abs().amax(-1, keepdim=True) / 127
    return ((args[0] / scale).round() * scale,)


def test_quantized_weights(tiny_llama, tiny_folder, tiny_artifact, tmp_path):
    rounded = write_eight_bits(tiny_llama, tiny_folder, tmp_path)
    with engine(tmp_path, tiny_artifact, **OPTIONS) as llm:
        found = likelihoods(llm)
    assert_alike(found, own_likelihoods(rounded, tiny_artifact), own_likelihoods(tiny_llama, tiny_artifact))
