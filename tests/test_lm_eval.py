"""The harness scores and generates on the quantized cache: local tasks, a tiny model, no network."""

import functools
import importlib.util
import json
import signal
import sys

import pytest
import torch
import yaml
from artifact_factory import RECIPES, artifact_for, recipe
from models_zoo import tiny_model, tiny_tokenizer

from kvq_calib import KVQCache
from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.cli import lm_eval as lm_eval_command
from kvq_calib.errors import KVQError
from kvq_calib.evaluate.decode import logits_through
from kvq_calib.evaluate.prefill import PrefillQuantizer
from kvq_calib.model.capture import intercept
from kvq_calib.model.compat import with_cache
from kvq_calib.model.load import load_model
from kvq_calib.runtime import attached

pytestmark = pytest.mark.model

ROWS = [
    {"question": "the cache of a model is:", "choices": ["small", "enormous and slow"], "answer": 0},
    {"question": "two and two:", "choices": ["4", "five", "22"], "answer": 0},
    {"question": "keys, values and:", "choices": ["queries", "?"], "answer": 1},
]
TASKS = {
    "kvq_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "kvq_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 60, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    model = tiny_model("llama")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    artifact_for(model, RECIPES["nuq3-exact"]).save(folder / "a.kvq.safetensors")  # with a recent window
    artifact_for(model, RECIPES["nuq4-1p"]).save(folder / "plain.kvq.safetensors")
    dynamic = recipe(key={"thresholds": "channel_online"})
    artifact_for(model, dynamic).save(folder / "dynamic.kvq.safetensors")
    other = tiny_model("llama", num_key_value_heads=1)
    artifact_for(other, RECIPES["dense2"]).save(folder / "other.kvq.safetensors")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return folder


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
    from kvq_calib.integrations.lm_eval import KVQuantLM

    return KVQuantLM


def evaluate(place, task, batch_size, artifact="a", device="cpu"):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="kvq",
        model_args=f"pretrained={place / 'model'},artifact={place / artifact}.kvq.safetensors,dtype=float32",
        tasks=[task],
        batch_size=batch_size,
        device=device,
        task_manager=TaskManager(include_path=str(place), include_defaults=False),
        bootstrap_iters=0,
    )
    return found, sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


def scores(loaded, context, choices, logits_of):
    """Log likelihoods of the choices after the context; ``logits_of`` gives logits of token ids."""
    found = []
    for choice in choices:
        ids = torch.tensor([loaded.tokenizer.encode(context + choice)])
        logits = logits_of(ids[:, :-1]).log_softmax(-1)
        found.append(float(logits.gather(-1, ids[:, 1:, None])[0, -len(choice) :].sum()))
    return found


def answers(sample):
    return [float(answer[0][0]) for answer in sample["resps"]]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.filterwarnings("default")
def test_log_likelihoods_are_those_of_prefill_mode(harness, place, batch_size):
    found, samples = evaluate(place, "kvq_choice", batch_size, "plain")
    loaded = load_model(str(place / "model"), device="cpu")
    artifact = KVArtifact.load(place / "plain.kvq.safetensors")

    def exact(ids):
        return loaded.model(input_ids=ids).logits

    for sample, row in zip(samples, ROWS, strict=True):
        with torch.no_grad():
            with intercept(loaded.model, PrefillQuantizer.of(artifact, loaded.model)):
                want = scores(loaded, row["question"], row["choices"], exact)
            unquantized = scores(loaded, row["question"], row["choices"], exact)
        assert answers(sample) == pytest.approx(want, abs=1e-3)
        assert max(abs(a - b) for a, b in zip(answers(sample), unquantized, strict=True)) > 0.01
    right = [s["target"] == max(range(len(s["resps"])), key=lambda i: float(s["resps"][i][0][0])) for s in samples]  # fmt: skip
    assert found["results"]["kvq_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert found["config"]["kvq_artifact"] == str(place / "plain.kvq.safetensors")
    assert found["config"]["kvq_bits_per_element_4096"] == pytest.approx(artifact.bits_per_element(4096))


@pytest.mark.filterwarnings("default")
def test_with_a_recent_window_they_come_through_the_packed_cache(harness, place):
    _, samples = evaluate(place, "kvq_choice", 1)
    loaded = load_model(str(place / "model"), device="cpu")
    artifact = KVArtifact.load(place / "a.kvq.safetensors")
    assert artifact.spec.recent_tokens

    def through_the_cache(ids):
        with attached(loaded.model):
            return logits_through(loaded.model, KVQCache(artifact, loaded.model), ids)

    for sample, row in zip(samples, ROWS, strict=True):
        want = scores(loaded, row["question"], row["choices"], through_the_cache)
        assert answers(sample) == pytest.approx(want, abs=1e-3)


@pytest.mark.filterwarnings("default")
def test_the_harness_s_default_device_is_the_cpu_where_there_is_no_gpu(harness, place):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    _, samples = evaluate(place, "kvq_choice", 1, "plain", device="cuda:0")
    _, on_cpu = evaluate(place, "kvq_choice", 1, "plain")
    assert [answers(sample) for sample in samples] == [answers(sample) for sample in on_cpu]
    with pytest.raises(KVQError, match="torch sees 0 GPUs"):
        evaluate(place, "kvq_choice", 1, "plain", device="cuda:1")


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.filterwarnings("default")
def test_text_is_generated_through_the_packed_cache(harness, place, batch_size):
    _, samples = evaluate(place, "kvq_generate", batch_size)
    loaded = load_model(str(place / "model"), device="cpu")
    artifact = KVArtifact.load(place / "a.kvq.safetensors")
    questions = [row["question"] for row in ROWS]
    # Padding moves the frontier between packed blocks and exact tokens, so the batch matters.
    for start in range(0, len(ROWS), batch_size):
        texts = questions[start : start + batch_size]
        batch = loaded.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        batch.pop("token_type_ids", None)
        with attached(loaded.model):
            cache = KVQCache(artifact, loaded.model)
            out = loaded.model.generate(**batch, **with_cache(cache), max_new_tokens=60, do_sample=False)
        assert cache.get_seq_length() > 52  # more than the exact window and a block
        width = batch["input_ids"].shape[1]
        for sample, tokens in zip(samples[start : start + batch_size], out[:, width:], strict=True):
            want = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
            assert sample["resps"][0][0] == want.split("\n\n\n")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs pretrained"),
        ({"pretrained": "model"}, "needs artifact"),
        ({"pretrained": "model", "artifact": "a", "peft": "x"}, "no argument 'peft'"),
        ({"pretrained": "model", "artifact": "missing"}, "cannot read artifact"),
        ({"pretrained": "model", "artifact": "other"}, "num_key_value_heads"),
        ({"pretrained": "model", "artifact": "dynamic"}, "--set cache.key.thresholds=channel"),
        ({"pretrained": "nowhere/at/all", "artifact": "a"}, "no such folder"),
    ],
)
def test_what_cannot_be_used_is_one_error(harness, place, arguments, message):
    if arguments.get("pretrained") == "model":
        arguments = {**arguments, "pretrained": str(place / "model")}
    if "artifact" in arguments:
        arguments = {**arguments, "artifact": str(place / f"{arguments['artifact']}.kvq.safetensors")}
    with pytest.raises(KVQError, match=message):
        harness(**arguments)


def run(monkeypatch, capsys, *arguments):
    """Exit status, stdout and stderr; the harness's own thousands of tasks are left out to save time."""
    if "--tasks" in arguments:
        from lm_eval import tasks

        own_tasks = functools.partial(tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(tasks, "TaskManager", own_tasks)
    monkeypatch.setattr(sys, "argv", ["kvq-lm-eval", *arguments])
    previous = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            lm_eval_command.main()
    finally:
        signal.signal(signal.SIGTERM, previous)
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


@pytest.mark.filterwarnings("default")
def test_the_command_hands_over_to_the_harness(harness, place, monkeypatch, capsys):
    arguments = ["--model", "kvq", "--tasks", "kvq_choice", "--include_path", str(place), "--device", "cpu",
                 "--model_args", f"pretrained={place / 'model'},artifact={place / 'a.kvq.safetensors'}",
                 "--output_path", str(place / "results")]  # fmt: skip
    status, out, err = run(monkeypatch, capsys, *arguments, "--debug")
    assert status == 0, err
    assert "|kvq_choice|" in out
    (written,) = (place / "results").rglob("results_*.json")
    assert json.loads(written.read_text())["config"]["kvq_artifact"].endswith("a.kvq.safetensors")


@pytest.mark.filterwarnings("default")
def test_the_command_ends_with_one_line_on_errors(harness, place, monkeypatch, capsys):
    arguments = ["--model", "kvq", "--tasks", "kvq_choice", "--include_path", str(place), "--device", "cpu",
                 "--model_args", f"pretrained={place / 'model'}"]  # fmt: skip
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 1
    assert err.splitlines()[-1].startswith("error: the model kvq needs artifact")
    assert "ConfigError" not in err  # as a traceback would have


def test_without_the_harness_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = run(monkeypatch, capsys, "--help")
    assert status == 1
    assert err == ("error: kvq-lm-eval needs lm_eval: pip install 'kvq-calib[lm-eval]'\n")
