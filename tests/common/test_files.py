"""Damaged files of JSON are refused in one line with the reason."""

from common.files import read_json
from tests.helpers import refusal


def test_a_file_that_is_not_a_json_object_is_refused(tmp_path):
    path = tmp_path / "config.json"
    assert refusal(path, read_json) == "cannot be read (No such file or directory)"
    for content in (
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 500_000,
        b'{"x": ' * 99_999,
        b" " * (2 << 20),
        b'{"r": ' + b"9" * 9999 + b"}",
    ):
        path.write_bytes(content)
        assert "JSON" in refusal(path, read_json)
