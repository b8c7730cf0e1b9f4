"""The documents: every message of the library is explained, the examples in them run, and the site is built."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_gnp.argument_checks import EXCLUDE


ROOT = Path(__file__).parents[1]
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
# What is raised or logged as a variable or a call, and how that sentence begins, or goes on after what depends.
ELSEWHERE = {
    "missing": "The gradient-norm penalty uses",
    "SENTENCE.format": "takes a moment of the optimizer",
    "sentence.format": "The gradient-norm penalty does not run with",
    "self._refusal": "calls backward outside of Trainer.training_step",
    "never_reached": "training_step never reaches Trainer.training_step",
    "called_twice": "calls training_step twice for one micro-batch",
    "_too_early": "shards a model together with its optimizer",
    "FP16": "Sharpness is not measured in fp16",
    "warning": "The checkpoint was trained with other gnp arguments",
}
WORDS = 4


def messages() -> Iterator[tuple[str, Any]]:
    """Where each message of the package is, and what it is made of."""
    for path in sorted((ROOT / "hf_gnp").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            if isinstance(node, ast.Raise) or ast.unparse(call.func) in ("logger.warning", "warnings.warn"):
                yield f"{path.relative_to(ROOT)}:{call.lineno}", call.args[0]


def first_words(message: ast.expr) -> str:
    """The first words that do not depend on the run."""
    if isinstance(message, ast.Constant):
        texts = [message.value]
    elif isinstance(message, ast.JoinedStr):
        texts = [part.value for part in message.values if isinstance(part, ast.Constant)]
    else:
        return ELSEWHERE[ast.unparse(message.func if isinstance(message, ast.Call) else message)]
    longest = next((text for text in texts if len(text.split()) >= WORDS), max(texts, key=len))
    return " ".join(re.split(r"[:;.] ", longest)[0].split()[:WORDS]).rstrip(".,:;")


def plain(text: str) -> str:
    return " ".join(re.sub(r"[*`]", "", text).split())


@pytest.mark.parametrize(
    ("place", "message"), list(messages()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_message_is_explained(place, message):
    words = plain(first_words(message))
    assert words in plain(TROUBLESHOOTING), f"docs/troubleshooting.md does not explain {place}: {words!r}"


@pytest.mark.parametrize(("argument", "excluded", "reason"), EXCLUDE)
def test_every_exclusion_is_explained(argument, excluded, reason):
    words = plain(f"{argument} {' '.join(reason.split()[:WORDS])}")
    assert words in plain(TROUBLESHOOTING)


@pytest.mark.parametrize("words", ELSEWHERE.values())
def test_messages_that_are_made_elsewhere_are_in_the_source(words):
    source = " ".join(path.read_text() for path in (ROOT / "hf_gnp").rglob("*.py"))
    assert words in " ".join(source.split())


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0, f"{code}\n{result.stderr[-4000:]}"


def test_the_quickstart_runs(tmp_path):
    """All its Python, one after the other, as a reader would."""
    run("\n".join(python_blocks("docs/quickstart.md")), tmp_path)
    assert list((tmp_path / "outputs" / "quickstart").glob("checkpoint-*"))


README_SETTING = """
import sys
sys.path.insert(0, {tests!r})
from tiny import make_data, make_model, collate
from transformers import Trainer
model, train_dataset = make_model("bert"), make_data("bert")
class MyTrainer(Trainer): ...
"""


def test_the_readme_runs(tmp_path):
    """The lines after the change, and the ready-made classes, with a tiny model; `output_dir` is the reader's own."""
    [change] = re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    new = "\n".join(line[1:] for line in change.splitlines() if not line.startswith("-"))
    blocks = python_blocks("README.md")
    assert "GNPTrainer(" in new and any("GNPMixin" in block for block in blocks)
    run("\n".join([README_SETTING.format(tests=str(ROOT / "tests")), new, *blocks]), tmp_path)
    assert (tmp_path / "out").is_dir()


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="a part of the docs extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text()
    for name in ("GNPTrainer", "GNPTrainingArguments", "GNPMixin", "measure_sharpness"):
        assert f'id="hf_gnp.{name}"' in reference or f'id="hf_gnp.sharpness.{name}"' in reference
    assert "gnp_warmup_type" in reference
    # Formulas and transformers' links are read by the hooks.
    assert "\\lVert" not in reference and "[<code>" not in reference and "*optional*" not in reference
    figure = tmp_path / "site" / "figures" / "step.svg"
    assert "second pass, at θ + e" in figure.read_text()
