"""What YAML may hold in a configuration: both readings of unquoted values, and odd files as an error of one line."""

from __future__ import annotations

import pytest

from stack import yaml_text
from stack.yaml_text import Plain, parse


def test_an_unquoted_value_keeps_its_text():
    assert parse("[007, 1e-3, on, ~, 2024-11-05, '5', x]") == [
        Plain("007", 7),
        Plain("1e-3", 0.001),
        Plain("on", True),
        Plain("~", None),
        "2024-11-05",
        "5",
        "x",
    ]
    assert parse("{1: a, on: b, null: c}") == {"1": "a", "on": "b", "null": "c"}
    assert parse("a:") == {"a": None}
    assert parse("!!str 5") == "5"


def test_anchors_and_merge_keys_are_expanded():
    assert parse("x: &x {a: k, b: l}\ny: {<<: *x, b: m}\nz: *x") == {
        "x": {"a": "k", "b": "l"},
        "y": {"a": "k", "b": "m"},
        "z": {"a": "k", "b": "l"},
    }


LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' is given twice"),
        ("a: {x: 1, x: 2}", "key 'x' is given twice"),
        ("a: 1\n---\nb: 2", "another document"),
        ("[a]: b", "a key is a list or a mapping"),
        ("a: !!python/object/apply:os.system [x]", "python/object/apply:os.system' is not supported"),
        ("a: !!int 'x'", "'x' is not of its tag"),
        ("\ta: b", "cannot start any token"),
        ("a: b\0", "unacceptable character"),
        ("a: &a [*a]", "aliases expand"),
        (LAUGHS, "aliases expand"),
        ("[" * 1_000_000, "nested more than 100 levels"),
        ("- " * 200_000, "nested more than 100 levels"),
        ("a: [1", "flow sequence"),
    ],
)
def test_odd_yaml_is_refused_in_one_line(text, says):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        parse(text)
    assert says in str(caught.value)


def test_the_encoding_of_a_file_is_utf_8(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + "a: é".encode())
    assert yaml_text.read(path) == {"a": "é"}
    for encoding in ("cp1252", "utf-16", "utf-32"):
        path.write_bytes("a: é".encode(encoding))
        with pytest.raises(ValueError, match="save the file in UTF-8"):
            yaml_text.read(path)
    path.write_bytes(b"a: b\n" * 3_000_000)
    with pytest.raises(ValueError, match="larger than 10 MB"):
        yaml_text.read(path)
