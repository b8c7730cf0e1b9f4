"""The documentation: every message of the library is in it, and the site is built without a warning."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_gnp
from hf_gnp.arguments import EXCLUDE


ROOT = Path(__file__).parents[1]
SOURCES = [ast.parse(path.read_text()) for path in sorted(Path(hf_gnp.__file__).parent.rglob("*.py"))]


def literal(node: ast.AST) -> str:
    """A string as the source has it, with … for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def texts(node: ast.AST, depth: int = 2) -> Iterator[str]:
    """The strings that an argument of an exception or of a warning may be, through constants and functions."""
    if text := literal(node):
        yield text
    elif depth and isinstance(node, ast.Name | ast.Call | ast.Attribute):
        target = node.func if isinstance(node, ast.Call) else node
        if isinstance(target, ast.Attribute) and target.attr == "format":
            target = target.value
        name = target.id if isinstance(target, ast.Name) else getattr(target, "attr", None)
        for tree in SOURCES:
            for found in ast.walk(tree):
                if isinstance(found, ast.Assign) and any(getattr(t, "id", None) == name for t in found.targets):
                    yield from texts(found.value, depth - 1)
                if isinstance(found, ast.FunctionDef) and found.name == name:
                    for inner in ast.walk(found):
                        if isinstance(inner, ast.Return) and inner.value is not None:
                            yield from texts(inner.value, depth - 1)


def messages() -> set[str]:
    found: set[str] = set()
    for tree in SOURCES:
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                found |= set(texts(node.exc.args[0]))
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_call and node.func.attr in ("warning", "warn") and node.args:
                found |= set(texts(node.args[0]))
    return found


def first_words(message: str) -> str:
    """The first words that say something: a name that is filled in comes before them at times."""
    parts = [part.strip(" ,.:'\"(){}=") for part in re.split(r"…|\{\w+\}", message)]
    words = next((part for part in parts if len(part.split(":")[0].split()) > 2), "").split(":")[0].split()[:4]
    return " ".join(words).rstrip(".,:;")


def test_every_message_is_in_troubleshooting():
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
    all_messages = messages()
    assert len(all_messages) > 60  # else the scan finds nothing
    assert [message for message in sorted(all_messages) if first_words(message) not in page] == []
    assert [message for message in all_messages if not first_words(message)] == ["… …: leave out …."]
    for argument, _, reason in EXCLUDE:  # which that one is filled with
        assert f"`{argument} {' '.join(reason.split()[:4])}" in page, argument


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="an extra: docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    reference = (tmp_path / "site" / "reference" / "index.html").read_text()
    for name in hf_gnp.__all__:
        assert f"hf_gnp.{name}" in reference, name
