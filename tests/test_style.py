"""The style check finds what it should find, and nothing in the documentation and the sources."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("style", ROOT / "docs" / "style.py")
style = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(style)


def page(tmp_path, text):
    file = tmp_path / "page.md"
    file.write_text(text)
    return file


def test_readme_and_guides_are_short_of_words_and_lines():
    assert [line for file in style.pages() for line in style.long_lines(file)] == []
    guides = [ROOT / "README.md", ROOT / "docs" / "index.md", *(ROOT / "docs" / "guides").glob("*.md")]
    assert [line for file in guides for line in style.long_sentences(file)] == []
    assert [line for file in style.pages() for line in style.wrong_terms(file)] == []


def test_the_readme_is_read_in_three_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_sources_have_no_long_sentence():
    assert [line for file in style.sources() for line in style.long_sentences(file)] == []


@pytest.mark.parametrize("words", [40, 41])
@pytest.mark.parametrize("form", ['"""{}"""\n', "x = 1\n# {}\n", '"""Short.\n\n{}\n"""\n', "// {}\n"])
def test_a_sentence_in_code_may_have_40_words(tmp_path, words, form):
    file = tmp_path / ("code.cpp" if form.startswith("//") else "code.py")
    file.write_text(form.format(" ".join(["word"] * (words - 1)) + " end."))
    assert len(list(style.long_sentences(file))) == (words > 40)


def test_strings_and_tables_in_code_are_no_prose(tmp_path):
    long = "word " * 50
    file = tmp_path / "code.py"
    file.write_text(f'''"""Short.

====  ====
a     b
====  ====
{long}
====  ====
"""
text = """{long}"""
''')
    assert list(style.long_sentences(file)) == []


@pytest.mark.parametrize("words", [35, 36])
def test_a_sentence_may_have_35_words(tmp_path, words):
    text = " ".join(["word"] * (words - 1))
    file = page(tmp_path, f"# A title\n\nShort one. {text}\nend. Another.\n")
    assert len(list(style.long_sentences(file))) == (words > 35)


def test_code_tables_and_links_count_for_nothing(tmp_path):
    long = "word " * 40
    text = f"```\n{long}\n```\n\n    {long}\n\n| {long} |\n\nSee `{long}` and [this]({'x' * 130}).\n"
    file = page(tmp_path, text)
    assert list(style.long_sentences(file)) == []
    assert len(list(style.long_lines(file))) == 1  # the last, which is prose


def test_list_items_end_sentences(tmp_path):
    item = "- " + "word " * 20
    assert list(style.long_sentences(page(tmp_path, f"{item}\n{item}\n"))) == []


@pytest.mark.parametrize("name", ["page.md", "code.py"])
def test_a_long_line_is_found_in_prose_alone(tmp_path, name):
    file = tmp_path / name
    long = "x" * 121
    file.write_text(f"# {long}\n" if name == "code.py" else f"a {long}\n")
    assert [line.partition(":")[2].partition(":")[0] for line in style.long_lines(file)] == ["1"]
    file.write_text(f'value = "{long}"\n' if name == "code.py" else f"| {long} |\n")
    assert list(style.long_lines(file)) == []


def test_terms_of_our_own_are_found(tmp_path):
    (found,) = style.wrong_terms(page(tmp_path, "Text with foreign tokens.\n"))
    assert "vocabulary samples" in found


def test_proselint_reads_prose_alone(tmp_path):
    pytest.importorskip("proselint")
    file = page(tmp_path, "It is very good.\n\n```\nvery\n```\n")
    (found,) = style.proselint([file])
    assert found.startswith(f"{file}:1:")
