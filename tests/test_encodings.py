"""Text is UTF-8 whatever the locale: every file that is read or written as text says so."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("src", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]


def unsaid(source):
    """The lines that leave the encoding of a text file to the locale."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
        opened = name == "open" and isinstance(call.func, ast.Name)
        modes = [
            own.value
            for own in [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode")]
            if isinstance(own, ast.Constant)
        ]
        text = name in ("read_text", "write_text") or (opened and not any("b" in str(mode) for mode in modes))
        if text and "encoding" not in {keyword.arg for keyword in call.keywords}:
            lines.append(call.lineno)
    return lines


def test_every_text_file_has_an_encoding():
    """In the package and the examples."""
    assert len(FILES) > 50
    assert {str(path.relative_to(ROOT)): unsaid(path.read_text(encoding="utf-8")) for path in FILES} == {
        str(path.relative_to(ROOT)): [] for path in FILES
    }


@pytest.mark.parametrize("source", ["p.read_text()", "p.write_text('a')", "open(p)", "open(p, 'w')"])
def test_a_missing_encoding_is_seen(source):
    """The rule is not blind."""
    assert unsaid(source) == [1]
