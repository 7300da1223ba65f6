"""The HTML report: one file that loads nothing, shows the results, and escapes all text from outside."""

import html
import importlib.util
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import torch
from artifact_factory import RECIPES, artifact_for
from models_zoo import tiny_model, tiny_tokenizer, token_ids
from test_cli import TEXT, assert_one_line, call, files

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows, load_windows
from kvq_calib.evaluate.charts.axes import Labels, log_ticks
from kvq_calib.evaluate.charts.frontier import Point, frontier, on_frontier
from kvq_calib.evaluate.report.commands import evaluation_command
from kvq_calib.evaluate.report.levels import SHOWN_BINS, level_uses
from kvq_calib.evaluate.report.measure import measure
from kvq_calib.evaluate.report.outliers import count_outliers
from kvq_calib.evaluate.report.page import render
from kvq_calib.evaluate.report.subjects import subjects
from kvq_calib.fit.levels import fit_levels
from kvq_calib.model.capture import intercept
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.load import LoadedModel
from kvq_calib.schema.recipe import calibration_config
from kvq_calib.schema.results import Result, Results, read_results

pytestmark = pytest.mark.model

SECTIONS = ("terms", "frontier", "sensitivity", "levels", "outliers", "memory", "provenance", "commands")
NASTY = "</title></style><script>alert('x')</script>\"><img src=x onerror=alert(1)>{{ 7 * 7 }}"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, text, three artifacts and what was measured of two of them."""
    folder = tmp_path_factory.mktemp("report")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "mine.yaml").write_text(
        "description: dense\ncache: {key: {bits: 3}, value: {bits: 2, thresholds: token}}\n"
    )
    common = ["--dataset", str(folder / "text.txt"), "--seqlen", "32", "--device", "cpu"]
    for recipe, changes in (("nuq3-1p", ["--set", "cache.sink_tokens=2"]), (str(folder / "mine.yaml"), [])):
        output = str(folder / "{recipe}.kvq.safetensors")
        status, _, err = call(
            "calibrate", str(folder / "model"), "-o", output, "--config", recipe, "--samples", "3", *changes, *common
        )  # fmt: skip
        assert status == 0, err
    status, _, err = call(
        "evaluate", "perplexity", str(folder / "model"), "--artifact", str(folder / "nuq3-1p.kvq.safetensors"),
        "--artifact", str(folder / "mine.kvq.safetensors"), *common, "--windows", "2", "--json", str(folder / "results.json"),
    )  # fmt: skip
    assert status == 0, err
    return folder


def make(place, output, *arguments, artifacts=("nuq3-1p", "mine"), results=("results.json",)):
    named = [part for name in artifacts for part in ("--artifact", str(place / f"{name}.kvq.safetensors"))]
    measured = [part for name in results for part in ("--results", str(place / name))]
    return call(
        "evaluate", "report", str(place / "model"), *named, *measured, "-o", str(output), "--dataset",
        str(place / "text.txt"), "--seqlen", "32", "--windows", "2", "--device", "cpu", *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(place):
    output = place / "report.html"
    status, out, err = make(place, output)
    assert status == 0, err
    assert out == f"{output}\n"
    return output


class Elements(HTMLParser):
    """Names and attributes of all elements; fails on tags that do not match."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def assert_loads_nothing(text):
    elements = assert_refers_to_nothing_outside(text)
    styles = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert len(styles) == 1
    assert "url(" not in styles[0]
    assert "@import" not in styles[0]
    policy = [attributes for name, attributes in elements if attributes.get("http-equiv")]
    assert policy[0]["content"].startswith("default-src 'none'")
    return elements


def assert_refers_to_nothing_outside(text):
    """Elements of a part of a page; what they refer to is on the page."""
    elements = Elements(text).found
    names = {name for name, _ in elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "image", "base", "form"}
    for name, attributes in elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), (name, attributes)
            assert key not in ("src", "srcset", "action", "style", "xlink:href"), (name, attributes)
            assert key != "href" or value.startswith("#"), (name, attributes)
    return elements


def section(text, name):
    return re.search(rf'<section id="{name}">(.*?)</section>', text, re.S)[1]


def test_the_page_is_one_file_with_every_section(page):
    text = page.read_text()
    elements = assert_loads_nothing(text)
    assert [attributes["id"] for name, attributes in elements if name == "section"] == list(SECTIONS)
    assert {attributes["href"] for name, attributes in elements if name == "a"} == {f"#{s}" for s in SECTIONS}
    for name in ("frontier", "sensitivity", "levels", "outliers", "memory"):
        assert "<svg" in section(text, name), name
    assert "prefers-color-scheme: dark" in text
    assert "nan" not in {
        word.lower() for word in re.findall(r"[\w.]+", re.sub(r"<style.*?</style>", "", text, flags=re.S))
    }


def test_the_page_shows_the_numbers_of_its_inputs(place, page):
    text = page.read_text()
    measured = json.loads((place / "results.json").read_text())
    for result in measured["artifacts"]:
        table = section(text, "frontier")
        assert f"{result['bits_per_element']:.3f}" in table
        assert f"{result['kl_mean']:.5f}" in table
        assert f"{result['top1_agreement']:.2%}" in table
        assert measured["config"]["artifact_sha256"][result["name"]] in section(text, "provenance")
    assert measured["config"]["data"]["sha256"] in section(text, "provenance")
    assert "62 predicted tokens" in section(text, "frontier")
    artifact = KVArtifact.load(place / "nuq3-1p.kvq.safetensors")
    memory = section(text, "memory")
    for context in (4096, 131072):
        smaller = 2 * artifact.elements(context) / sum(artifact.storage(context).values())
        assert f"{smaller:.2f}×" in memory
    for expected in (
        artifact.calibration["data"]["sha256"],
        "thresholds for each channel",
        "first 2, last 0",
    ):
        assert expected in section(text, "provenance")
    # two charts per artifact, each with a bar for keys and for values of both layers
    bar = r'<g class="bar"><title>[^<]*, keys:[^<]*</title><path [^>]*fill="var\(--key\)"'
    assert len(re.findall(bar, section(text, "sensitivity"))) == 2 * 2 * 2
    # 3 bits keys and values of nuq3-1p, 3 and 2 of mine; two layers, twice: featured, and among all
    feet = re.findall(r'<g class="foot"><path d="([^"]*)"', section(text, "levels"))
    assert sum(foot.count("M") for foot in feet) == 2 * 2 * (8 + 8 + 8 + 4)
    assert "Keeps no outliers." in section(text, "outliers")
    assert "Distribution of the 3 windows that the artifact was calibrated on" in section(text, "levels")


def test_sensitivity_is_that_of_one_place(place, page):
    """Against a hook that quantizes one layer's values and nothing else."""
    from kvq_calib.data import load_windows

    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids = load_windows(str(place / "text.txt"), tokenizer, samples=2, seqlen=32, split="evaluation").ids
    artifact = KVArtifact.load(place / "nuq3-1p.kvq.safetensors")
    quantizer = artifact.quantizers()[1]["value"]

    def transform(kv):
        if kv.layer != 1:
            return None
        exact = kv.values[:, :, :2].half().float()
        return kv.keys, torch.cat([exact, quantizer(kv.values[:, :, 2:])], dim=2)

    divergences = []
    with torch.no_grad():
        for row in ids:
            base = model(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            with intercept(model, transform):
                other = model(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            divergences.append((base.exp() * (base - other)).sum(-1))
    expected = float(torch.cat(divergences).mean())
    shown = re.findall(r"layer 1, values: KL ([\d.]+)", section(page.read_text(), "sensitivity"))
    assert float(shown[0]) == pytest.approx(expected, abs=2e-6)


def shell_words(command):
    """As a shell splits it."""
    printed = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True
    )
    return printed.stdout.split("\0")[:-1]


def test_a_stopped_evaluation_is_repeated_as_far_as_it_went(place, tmp_path):
    content = json.loads((place / "results.json").read_text())
    content["config"].update(windows=9, windows_measured=4)
    (tmp_path / "stopped.json").write_text(json.dumps(content))
    (results,) = read_results([str(tmp_path / "stopped.json")])
    words = evaluation_command("model", [], results).split()
    assert words[words.index("--windows") + 1] == "4"


def test_commands_of_the_page_make_the_same_artifacts(place, page, tmp_path, monkeypatch):
    commands = re.findall(r"<pre>(kvq-.*?)</pre>", section(page.read_text(), "commands"), re.S)
    words = [shell_words(html.unescape(command)) for command in commands]
    assert [(command, *rest[:1]) for command, *rest in words[2:]] == [
        ("kvq-eval", "perplexity"),
        ("kvq-eval", "report"),
    ]
    recipe = re.search(r"<summary>mine.yaml</summary><pre>(.*?)</pre>", page.read_text(), re.S)[1]
    (tmp_path / "mine.yaml").write_text(html.unescape(recipe))
    (tmp_path / "text.txt").symlink_to(place / "text.txt")  # records name the text, not its folder
    monkeypatch.chdir(tmp_path)
    for command in words[:2]:
        assert command[0] == "kvq-calibrate"
        made = place / command[command.index("-o") + 1]
        command[command.index("-o") + 1] = str(tmp_path / made.name)
        status, _, err = call("calibrate", *command[1:], "--device", "cpu")
        assert status == 0, err
        assert (tmp_path / made.name).read_bytes() == made.read_bytes()
    again = words[2][2:]
    again[again.index("--json") + 1] = str(tmp_path / "again.json")
    assert call("evaluate", "perplexity", *again)[0] == 0
    first, second = (json.loads(f.read_text()) for f in (place / "results.json", tmp_path / "again.json"))
    for a, b in zip(first["artifacts"], second["artifacts"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([], ["no results for nuq3-1p", "kvq-eval perplexity", "--json results.json", "--results"]),
        (["other.json"], ["no results for nuq3-1p in", "other.json", "kvq-eval perplexity"]),
        (["missing.json"], ["cannot read results", "missing.json", "kvq-eval perplexity"]),
        (["text.txt"], ["text.txt is not JSON", "kvq-eval perplexity --json"]),
        (["list.json"], ["holds no results", "kvq-eval perplexity --json"]),
        (["bad.json"], ["holds no results", "artifacts.0.kl_mean"]),
        (["nan.json"], ["holds no results", "artifacts.0.kl_mean"]),
    ],
)
def test_missing_data_says_what_to_run_and_leaves_no_file(place, tmp_path, results, words):
    entry = {"name": "nuq3-1p", "bits_per_element": 3.0, "kl_mean": 0.1}
    # The name alone is not enough where a hash says that it was another file.
    other = {"artifacts": [entry], "config": {"artifact_sha256": {"nuq3-1p": "0" * 64}}}
    (place / "other.json").write_text(json.dumps(other))
    (place / "list.json").write_text("[1]")
    (place / "bad.json").write_text(json.dumps({"artifacts": [{**entry, "kl_mean": "low"}]}))
    (place / "nan.json").write_text(json.dumps({"artifacts": [{**entry, "kl_mean": math.nan}]}))
    status, out, err = make(place, tmp_path / "report.html", artifacts=["nuq3-1p"], results=results)
    assert status == 1
    assert_one_line(err, *words)
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert not files(tmp_path)


def test_strings_from_outside_are_escaped(place, tmp_path):
    hostile = tmp_path / "<b>&'.kvq.safetensors"
    artifact = KVArtifact.load(place / "nuq3-1p.kvq.safetensors")
    nested = {**artifact.calibration["data"], "dataset": NASTY}
    replace(
        artifact,
        model={**artifact.model, "id": NASTY},
        calibration={
            "recipe": NASTY,
            "data": nested,
            "versions": {NASTY: NASTY},
            "settings": {"description": NASTY, "seed": NASTY, "fit": {NASTY: NASTY}, "dataset": NASTY},
        },
    ).save(hostile)
    entry = {"bits_per_element": 3.0, "kl_mean": 0.1}
    (tmp_path / "results.json").write_text(
        json.dumps(
            {
                "artifacts": [{"name": hostile.name.split(".")[0], **entry}, {"name": NASTY, **entry}],
                "config": {"model": NASTY, "mode": NASTY, "dataset": NASTY},
            }
        )
    )
    status, _, err = call(
        "evaluate", "report", str(place / "model"), "--artifact", str(hostile), "--results",
        str(tmp_path / "results.json"), "-o", str(tmp_path / "page.html"), "--dataset", str(place / "text.txt"),
        "--seqlen", "16", "--device", "cpu",
    )  # fmt: skip
    assert status == 0, err
    text = (tmp_path / "page.html").read_text()
    assert_loads_nothing(text)
    assert "<b>&" not in text
    assert "&lt;b&gt;&amp;&#39;" in text
    assert NASTY not in text
    assert html.unescape(text).count(NASTY) >= 10
    command = re.search(r"<pre>(kvq-calibrate.*?)</pre>", text, re.S)[1]
    assert shell_words(html.unescape(command)).count(NASTY) == 2  # data set and seed, a word each


def test_results_on_other_texts_have_charts_of_their_own(place, tmp_path):
    content = json.loads((place / "results.json").read_text())
    rival = {
        "name": "a rival", "bits_per_element": 2.5, "kl_mean": 1e-4, "origin": "library", "source": "its paper",
        "settings": "groups of 32", "mode": "decode", "on_frontier": True,
    }  # fmt: skip
    beside = {**content, "rivals": [rival], "skipped": {}}
    elsewhere = json.loads(json.dumps(content))
    elsewhere["config"]["data"]["sha256"] = "1" * 64
    elsewhere["config"]["data"]["dataset"] = "another text"
    for name, each in (("beside.json", beside), ("elsewhere.json", elsewhere)):
        (place / name).write_text(json.dumps(each))
    output = tmp_path / "page.html"
    status, _, err = make(
        place, output, artifacts=["nuq3-1p"], results=["results.json", "beside.json", "elsewhere.json"]
    )
    assert status == 0, err
    text = section(output.read_text(), "frontier")
    assert text.count("<svg") == 4
    assert "Measured on another text" in text
    assert "a rival" in text
    first = text.split("<svg")[1]
    # The rival is smaller and closer than ours, and the page says so.
    assert "Beaten in both bits and divergence by another point: nuq3-1p" in first
    assert first.count('class="beside"') == 2
    assert "a rival: 2.500 bits, KL 0.00010 (library; its paper; groups of 32)" in first
    assert "<td>library, decode</td>" in text
    commands = html.unescape(section(output.read_text(), "commands"))
    assert "kvq-eval compare" in commands
    assert "--rival 'a rival'" in commands


def test_divergence_along_the_text_has_a_line_for_each_artifact(place, page, tmp_path):
    text = section(page.read_text(), "frontier")
    along = text.split("<svg")[2]
    for result in json.loads((place / "results.json").read_text())["artifacts"]:
        assert along.count(f">{result['name']}<") == 1
        assert len(result["kl_positions"]) == 16
    old = json.loads((place / "results.json").read_text())
    for result in old["artifacts"]:
        del result["kl_positions"]
    (place / "old.json").write_text(json.dumps(old))
    status, _, err = make(place, tmp_path / "old.html", results=["old.json"])
    assert status == 0, err
    assert section((tmp_path / "old.html").read_text(), "frontier").count("<svg") == 1


def test_outliers_of_tokens_are_those_the_quantizer_marks():
    model, ids = tiny_model("llama"), token_ids(2, 24)
    artifact = artifact_for(model, RECIPES["nuq3-exact"])
    counts = count_outliers(model, {"a": artifact}, ids)["a"]
    sinks = artifact.spec.sink_tokens
    expected = {}

    def observe(kv):
        for kind, x in (("key", kv.keys), ("value", kv.values)):
            marked = artifact.quantizers()[kv.layer][kind].quantize(x[:, :, sinks:]).outliers
            expected[kind, kv.layer] = marked.sum(-1).flatten()

    with torch.no_grad(), intercept(model, observe):
        model(input_ids=ids, use_cache=False)
    for (kind, layer), wanted in expected.items():
        assert torch.equal(counts.packed(kind)[layer], wanted)
    assert int(counts.found["value"].sum()) > 0
    assert not counts.found["value"].unflatten(1, (2, 24))[:, :, :sinks].any()


def test_the_distribution_is_the_one_that_levels_were_fitted_to():
    model = tiny_model("llama")
    windows = TokenWindows(token_ids(4, 48), {"dataset": "random"})
    config = calibration_config("nuq3-1p")
    artifact = calibrate(
        model, windows, {"a": config}, model_id="tiny", model_config=model_fingerprint(model)
    ).artifacts["a"]
    uses = level_uses(model, {"a": artifact}, windows.ids)["a"]
    middles = (np.arange(SHOWN_BINS) + 0.5) * (2 / SHOWN_BINS) - 1

    def loss(levels, weights):
        return float((np.abs(middles[:, None] - np.asarray(levels)).min(1) ** 2 * weights).sum())

    tokens = 4 * (48 - artifact.spec.sink_tokens)
    for kind in ("key", "value"):
        for layer, use in enumerate(uses[kind]):
            weights = np.asarray(use.weights)
            best = fit_levels("kmeans", 3, middles, weights)
            assert loss(use.levels, weights) <= 1.1 * loss(best, weights)
            assert loss(np.linspace(-1, 1, 8), weights) > 1.1 * loss(use.levels, weights)
            outliers = artifact.outliers_per_token[kind][layer] * tokens
            assert sum(use.counts) == pytest.approx(tokens * use.of - outliers)
            assert use.counts != use.weights


@pytest.mark.parametrize("recipe", ["trellis-one-state", "compensation", "post-rope-token", "nuq3-exact"])
def test_every_kind_of_artifact_has_a_report(recipe, place, tmp_path):
    """Without any record of a calibration, too."""
    model = tiny_model("llama")
    artifact = artifact_for(model, RECIPES[recipe])
    artifact.save(tmp_path / "a.kvq.safetensors")
    loaded = LoadedModel(model, tiny_tokenizer(), "tiny")
    results = [Results(file="r", artifacts=[Result(name="a", bits_per_element=4.0, kl_mean=0.0)])]
    chosen = subjects("tiny", {"a": artifact}, {"a": str(tmp_path / "a.kvq.safetensors")}, results)
    text = str(place / "text.txt")
    windows = load_windows(text, loaded.tokenizer, samples=1, seqlen=24, split="evaluation")
    measured = measure(loaded, {"a": artifact}, windows, text)
    text = render(loaded, "tiny", chosen, results, measured, context=4096, command=["kvq-eval", "report"])
    assert_loads_nothing(text)
    assert "The artifact does not record how it was made." in text
    assert "a text on which the artifact was not calibrated" in text
    assert ("Here the newest 20 tokens are also quantized" in text) == (recipe == "nuq3-exact")
    assert ("With error compensation" in text) == (recipe == "compensation")
    assert ("Every channel has different levels" in text) == (recipe in ("trellis-one-state", "compensation"))


def test_no_point_of_the_frontier_is_beaten():
    points = [Point(str(n), *at) for n, at in enumerate([(3, 0.1), (2, 0.5), (4, 0.2), (3, 0.05), (5, 0.01)])]
    assert [point.name for point in on_frontier(points)] == ["1", "3", "4"]


def test_a_chart_shows_every_point_with_its_name_and_takes_colours_from_the_page():
    points = [Point(f"p{n}", 3 + n / 10, 10.0**-n, f"<tip {n}>", f"s{n % 3}", n < 3) for n in range(5)]
    drawn = frontier(points, Labels("a & b", "x", "y")).inline()
    assert_refers_to_nothing_outside(drawn)
    assert re.findall(r"<title>(.*?)</title>", drawn)[0] == "a &amp; b"
    assert sorted(re.findall(r"&lt;tip (\d)&gt;", drawn)) == ["0", "1", "2", "3", "4"]
    assert set(re.findall(r">(p\d)<", drawn)) == {"p0", "p1", "p2", "p3", "p4"}
    assert "var(--s2)" in drawn
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn)  # no colour of its own
    # What it refers to is in it, and no other chart of a page has the same names.
    other = frontier(points[1:], Labels("a & b", "x", "y")).inline()
    names = [set(re.findall(r' id="([^"]*)"', each)) for each in (drawn, other)]
    assert set(re.findall(r"#([^\")]+)", drawn)) == names[0]
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.01, 0.7, [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]),
        (1e-6, 10, [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1, 10]),
        (0.3, 0.4, []),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_an_artifact_measured_in_another_mode_is_shown_as_such(place, tmp_path):
    content = json.loads((place / "results.json").read_text())
    content["artifacts"][0]["mode"] = "decode"
    (tmp_path / "results.json").write_text(json.dumps(content))
    output = tmp_path / "page.html"
    status, _, err = make(place, output, results=[str(tmp_path / "results.json")])
    assert status == 0, err
    text = output.read_text()
    assert "<td>decode</td>" in section(text, "frontier")
    assert "<td>prefill</td>" in section(text, "frontier")
    assert "--chunk 256" in " ".join(section(text, "commands").replace("\\", "").split())


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_without_the_extra_the_command_names_it(place, tmp_path, monkeypatch, module):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == module else found(name, *rest)
    )
    status, _, err = make(place, tmp_path / "page.html")
    assert status == 1
    assert err == f"error: a report needs {module}: pip install 'kvq-calib[report]'\n"
    assert not files(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_it_light_and_dark(page, tmp_path):
    corners = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{scheme}.png"
        subprocess.run(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={tmp_path / scheme}", f"--blink-settings=preferredColorScheme={number}",
                "--window-size=1000,1600", f"--screenshot={picture}", page.as_uri(),
            ],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        pixels = matplotlib.image.imread(picture)[..., :3]
        corners[scheme] = float(pixels[2, 2].mean())
        ink = np.abs(pixels - pixels[2, 2]).max(-1) > 0.4
        assert 0.01 < ink.mean() < 0.5  # text and charts, and room around them
    assert corners["dark"] < 0.2 < 0.8 < corners["light"]
