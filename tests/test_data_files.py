"""Local files of every kind: the documents in them, and one line about what cannot be used."""

import csv
import gzip
import io
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from models_zoo import tiny_tokenizer

from kvq_calib.data import check_dataset, files, load_windows
from kvq_calib.data.local import read_documents
from kvq_calib.errors import DataError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def decode(tokenizer, row):
    return "".join(tokenizer.convert_ids_to_tokens(row.tolist()))


def test_jsonl_and_folders_are_joined_in_order(tmp_path, tokenizer):
    (tmp_path / "b.jsonl").write_text('{"text": "three", "id": 1}\n\n{"text": "four"}\n')
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "ignored.md").write_text("nothing")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.raw").write_text("five")
    assert read_documents(str(tmp_path), tokenizer) == ["one", "three", "four", "five"]
    windows = load_windows(str(tmp_path), tokenizer, samples=1, seqlen=21, split="evaluation")
    assert decode(tokenizer, windows.ids[0]) == "one\n\nthree\n\nfour\n\nfive"[:21]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("bad.jsonl", b'{"text": 5}', 'line 1: no string under "text"'),
        ("bad.jsonl", b"[1]", 'line 1: no string under "text"'),
        ("bad.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("bad.jsonl", b'{"text": "half \\ud800"}', 'line 1: "text" is not Unicode text'),
        ("bad.txt", b"abc\xff", "not UTF-8 text"),
        ("bad.md", b"abc", "unknown kind"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"not UTF-8 text \(after line"),
        ("bad.jsonl", b"\0" * 50, "line 1: not JSON"),
        ("bad.jsonl", b'{"text": null}', 'line 1: no string under "text" but null'),
        (
            "bad.jsonl",
            b'{"body": "a", "id": 1}',
            'line 1: no string under "text"; choose one of body, id with --text',
        ),
        ("bad.jsonl", b'{"text": ["a"]}', 'line 1, "text": message 1 is not an object with a role'),
        ("bad.jsonl", b'{"messages": []}', 'line 1, "messages": a chat without a message'),
        (
            "bad.jsonl",
            b'{"messages": [{"role": "user", "content": 3}]}',
            "the content of message 1 is not text",
        ),
        ("bad.json", b'[{"text": "a"}, 7]', 'record 2: no string under "text", for the record is a number'),
        ("bad.json", b'{"text": "a"', "bad.json: not JSON"),
        ("bad.json", b'{"text": "a"}\n{"text": 5}', 'line 2: no string under "text" but a number'),
        ("bad.json", b"\xff\xfe{\0", "not UTF-8 text"),
        ("bad.csv", b"id,body\n1,a\n", 'has no column "text"; choose one of id, body with --text-field'),
        ("bad.csv", b'id,text\n1,"a"b\n', "bad.csv is not CSV after line 1"),
        ("bad.csv", b"id,text\n1\n", 'line 2: no string under "text" but null'),
        ("bad.csv", b"id,text\n1,\xff\n", "not UTF-8 text"),
        ("bad.parquet", b"PAR1 and nothing", "not a readable Parquet file"),
        ("bad.parquet", b"", "not a readable Parquet file"),
        ("bad.txt.gz", gzip.compress(b"abc" * 100)[:20], "cannot read .*bad.txt.gz: Truncated"),
        ("bad.jsonl.zst", b"no zstd at all", "cannot read .*bad.jsonl.zst: ZSTD"),
        ("bad.parquet.gz", b"abc", "unknown kind"),
        ("bad.gz", b"abc", "unknown kind"),
        ("zeros.txt", b"\0" * 50, "is not text: character 0 is a NUL"),
        ("empty.txt", b"", "empty.txt holds no text"),
        ("empty.jsonl", b"\n\n", "empty.jsonl holds no text"),
        ("empty.json", b"[]", "empty.json holds no text"),
        ("empty.csv", b"text\n", "empty.csv holds no text"),
    ],
)
def test_bad_files_are_one_line_errors(tmp_path, tokenizer, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        load_windows(str(tmp_path / name), tokenizer, samples=1, seqlen=4)
    assert "\n" not in str(caught.value)
    if not any(
        place in reason for place in ("line 2", "after line", "record 2")
    ):  # a beginning tells as much
        with pytest.raises(DataError, match=reason):
            check_dataset(str(tmp_path / name))


def test_a_text_of_one_character_is_one_token(tmp_path, tokenizer):
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(
        DataError, match=r"one\.txt has 1 token, less than one window of 4; use a smaller --seqlen"
    ):
        load_windows(str(tmp_path / "one.txt"), tokenizer, samples=1, seqlen=4)


def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer):
    for name, content in (("a.txt", "one"), ("b.jsonl", '{"text": "two"}'), ("c.csv", "text\nthree\n")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_documents(str(tmp_path), tokenizer) == ["one", "two", "three"]


DOCUMENTS = ['one,\n "two"', "drei\u2028\U0001f600", "", "x" * 2000]


def written(folder, name, documents, field="text"):
    """A file of the kind that its name says, with these documents under `field`."""
    file, rows = folder / name, [{"id": i, field: document} for i, document in enumerate(documents)]
    if ".parquet" in name:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)
        return str(file)
    if ".jsonl" in name:
        text = "".join(json.dumps(row) + "\r\n" for row in rows)
    elif ".json" in name:
        text = json.dumps(rows, indent=1, ensure_ascii=False)
    else:
        table = io.StringIO()
        writer = csv.DictWriter(table, ["id", field])
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
    data = text.encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    elif name.endswith(".zst"):
        data = pyarrow.Codec("zstd").compress(data, asbytes=True)
    file.write_bytes(data)
    return str(file)


KINDS = [f".{kind}{compressed}" for kind in ("jsonl", "json", "csv") for compressed in ("", ".gz", ".zst")]


@pytest.mark.parametrize("kind", [*KINDS, ".parquet"])
@pytest.mark.parametrize("field", ["text", "body"])
def test_every_kind_of_file_gives_its_documents(tmp_path, tokenizer, kind, field):
    file = written(tmp_path, f"a{kind}", DOCUMENTS, field)
    check_dataset(file, field)
    assert read_documents(file, tokenizer, field) == DOCUMENTS
    windows = load_windows(file, tokenizer, samples=2, seqlen=50, text_field=field)
    plain = tmp_path / "plain.txt"
    plain.write_text("\n\n".join(DOCUMENTS), newline="")
    expected = load_windows(str(plain), tokenizer, samples=2, seqlen=50)
    assert torch.equal(windows.ids, expected.ids)
    extra = {} if field == "text" else {"text_field": field}
    assert windows.source == {**expected.source, "dataset": f"a{kind}", **extra}
    with pytest.raises(DataError, match='"missing"; choose one of id, '):
        check_dataset(file, "missing")


@pytest.mark.parametrize("name", ["a.txt", "a.RAW"])
@pytest.mark.parametrize(
    "compress", [None, gzip.compress, lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True)]
)
def test_compressed_text(tmp_path, tokenizer, name, compress):
    data = "\ufeffÄ\r\nß\rend".encode()
    if compress is not None:
        name += ".gz" if compress is gzip.compress else ".zst"
        data = compress(data)
    (tmp_path / name).write_bytes(data)
    assert read_documents(str(tmp_path / name), tokenizer) == ["Ä\nß\nend"]


def test_many_gzip_members_are_one_text(tmp_path, tokenizer):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert read_documents(str(tmp_path / "a.txt.gz"), tokenizer) == ["one two"]


def test_json_that_is_lines_or_one_object(tmp_path, tokenizer):
    (tmp_path / "lines.json").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    (tmp_path / "object.json").write_text('{\n "text": "c"\n}\n')
    assert read_documents(str(tmp_path), tokenizer) == ["a", "b", "c"]


def test_ids_of_plain_text_and_lines_are_what_they_were(tmp_path, tokenizer):
    """Of the first version; a run is compared with others by these."""
    letters = "".join(LETTERS[i % 26] for i in range(300))
    squares = "".join(LETTERS[i * i % 26] for i in range(200))
    (tmp_path / "text.raw").write_bytes(("\ufeffÄ line\r\n\u2028" + letters).encode())
    (tmp_path / "text.jsonl").write_bytes(
        f'{{"text": "{squares}\u2028\\n", "id": 1}}\r\n\n{{"text": ""}}\n{{"text": "four{"x" * 40}"}}'.encode()
    )
    found = {
        (name, split): load_windows(
            str(tmp_path / name), tokenizer, samples=5, seqlen=24, split=split, seed=3
        ).source["sha256"][:16]
        for name in ("text.raw", "text.jsonl", "")
        for split in ("calibration", "evaluation")
    }
    assert found == {
        ("text.raw", "calibration"): "d00a2cf65f9ef174",
        ("text.raw", "evaluation"): "4cae3176f5ddeb8c",
        ("text.jsonl", "calibration"): "fb1539b7ac9618e5",
        ("text.jsonl", "evaluation"): "446cccb3018f4650",
        ("", "calibration"): "5bd14326b32c55e1",
        ("", "evaluation"): "446cccb3018f4650",
    }


def test_globs_take_known_kinds_in_order(tmp_path, tokenizer):
    for name, content in (("b.txt", "two"), ("a.txt", "one"), ("c.md", "no"), ("deep/d.txt", "three")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert read_documents(f"{tmp_path}/*", tokenizer) == ["one", "two"]
    assert read_documents(f"{tmp_path}/**/*.txt", tokenizer) == ["one", "two", "three"]
    windows = load_windows(f"{tmp_path}/[ab].txt", tokenizer, samples=1, seqlen=8)
    assert windows.source["dataset"] == "[ab].txt"
    (tmp_path / "[ab].txt").write_text("named so")  # a file that is there is no pattern
    assert read_documents(f"{tmp_path}/[ab].txt", tokenizer) == ["named so"]
    with pytest.raises(DataError, match=r"\*\.md matches no \.txt, .* files"):
        check_dataset(f"{tmp_path}/*.md")


@pytest.fixture
def piped(monkeypatch):
    """Puts bytes on standard input."""

    def pipe(data):
        files._standard_input.cache_clear()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    yield pipe
    files._standard_input.cache_clear()


@pytest.mark.parametrize(
    ("data", "documents"),
    [
        (b"plain text", ["plain text"]),
        (b'{ "no": JSON', ['{ "no": JSON']),
        (b"[1, 2]", ["[1, 2]"]),
        (b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),
        (b'\xef\xbb\xbf\n[{"text":\n "a"}]', ["a"]),
        (gzip.compress(b'{"text": "a"}'), ["a"]),
        (pyarrow.Codec("zstd").compress(b"plain", asbytes=True), ["plain"]),
    ],
)
def test_standard_input_is_read_once(piped, tokenizer, data, documents):
    piped(data)
    check_dataset("-")
    assert read_documents("-", tokenizer) == documents  # though check_dataset has read it


def test_parquet_on_standard_input(piped, tmp_path, tokenizer):
    piped(Path(written(tmp_path, "a.parquet", DOCUMENTS)).read_bytes())
    assert read_documents("-", tokenizer) == DOCUMENTS
    windows = load_windows("-", tokenizer, samples=2, seqlen=50)
    assert windows.source["dataset"] == "standard input"


def test_standard_input_that_cannot_be_used(piped, monkeypatch):
    piped(b'{"text": 5}')
    with pytest.raises(DataError, match='standard input, record 1: no string under "text" but a number'):
        check_dataset("-")
    piped(b"")
    with pytest.raises(DataError, match="standard input holds no text"):
        check_dataset("-")
    piped(gzip.compress(b"abc")[:-9])
    with pytest.raises(DataError, match="cannot read standard input: Truncated"):
        check_dataset("-")
    piped(b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(DataError, match="no text on standard input: pipe some"):
        check_dataset("-")


def test_columns_that_are_no_text(tmp_path):
    table = pyarrow.table({"text": [1, 2], "raw": [b"a", b"b"], "none": pyarrow.array([None, "b"])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for field, reason in (("text", "a number"), ("raw", "of type bytes"), ("none", "null")):
        with pytest.raises(DataError, match=f'row 1: no string under "{field}" but {reason}'):
            check_dataset(str(tmp_path / "a.parquet"), field)


def test_a_field_of_a_named_data_set_is_refused(tokenizer):
    for name in ("c4", "wikitext2", "python-docs"):
        for refused in (
            lambda name=name: check_dataset(name, "body"),
            lambda name=name: load_windows(name, tokenizer, samples=1, seqlen=8, text_field="body"),
        ):
            with pytest.raises(DataError, match=f"--text-field is for records in files; {name} has"):
                refused()
        check_dataset(name)


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("bos", [False, True])
def test_chats_go_through_the_template(tmp_path, kind, bos):
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.chat_template = TEMPLATE
    for field, options in (("messages", {}), ("dialogue", {"text_field": "dialogue"})):
        file = written(tmp_path, f"{field}.{kind}", [CHAT, CHAT[:1]], field)
        check_dataset(file, **options)
        first = "" if bos else "<bos>"  # every window begins with one already
        chat = f"{first}[user]hi<eos>[assistant]yes<eos>"
        assert read_documents(file, tokenizer, options.get("text_field", "text")) == [
            chat,
            f"{first}[user]hi<eos>",
        ]
        windows = load_windows(file, tokenizer, samples=1, seqlen=12, split="evaluation", **options)
        tokens = tokenizer.convert_ids_to_tokens(windows.ids[0].tolist())
        assert tokens[:2] == ["<bos>", "["]


def test_text_comes_before_messages(tmp_path, tokenizer):
    rows = [{"text": "plain", "messages": CHAT}, {"text": None, "messages": CHAT}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chatty = tiny_tokenizer()
    chatty.chat_template = TEMPLATE
    assert read_documents(str(tmp_path / "a.jsonl"), chatty)[0] == "plain"
    with pytest.raises(DataError, match=r"line 2 is a chat, .* no chat template; use the model") as caught:
        read_documents(str(tmp_path / "a.jsonl"), tokenizer)
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_the_messages(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"row 1: .* template fails \(roles must alternate\)"):
        read_documents(written(tmp_path, "a.parquet", [CHAT], "messages"), tokenizer)


def test_the_limit_of_csv_fields_is_put_back(tmp_path, tokenizer):
    limit = csv.field_size_limit()
    documents = [*DOCUMENTS, "x" * (limit + 1)]
    assert read_documents(written(tmp_path, "a.csv", documents), tokenizer) == documents
    check_dataset(str(tmp_path / "a.csv"))
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("text", "seqlen", "most"),
    [("x", 8, 4), ("x" * 28, 33, 31), ("x" * 29, 33, None), ("\ufdfa", 64, 36), ("\ufdfa", 37, None)],
)
def test_a_text_that_can_fill_no_window_is_refused_without_a_tokenizer(tmp_path, text, seqlen, most):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    if most is None:
        check_dataset(str(tmp_path / "a.txt"), seqlen=seqlen)
        return
    with pytest.raises(DataError, match=f"a.txt has at most {most} tokens, less than one window of {seqlen}"):
        check_dataset(str(tmp_path / "a.txt"), seqlen=seqlen)


def test_all_records_and_files_count_and_chats_can_be_of_any_length(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abcde"}\n' * 3)
    (tmp_path / "b.txt").write_text("fgh")
    check_dataset(str(tmp_path), seqlen=31)  # 3 * (5 + 3) + 3 + 3, and a beginning of the sequence
    with pytest.raises(DataError, match="at most 30 tokens"):
        check_dataset(str(tmp_path), seqlen=32)
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    check_dataset(str(tmp_path), seqlen=4096)
