"""The documents: the examples in them run, and the site is built."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fork import fork_script


ROOT = Path(__file__).parents[2]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(f"import os\nos.chdir({str(folder)!r})\n{code}")
    fork_script(script, timeout=1200)


def test_quickstart_runs(tmp_path):
    """All its Python, one after the other, as a reader would."""
    run("\n".join(python_blocks("docs/quickstart.md")), tmp_path)
    assert list((tmp_path / "outputs" / "quickstart").glob("checkpoint-*"))


README_SETTING = """
from tiny import make_data, make_model, collate
from transformers import Trainer
model, train_dataset = make_model("bert"), make_data("bert")
class MyTrainer(Trainer): ...
"""


def test_readme_runs(tmp_path):
    """The lines after the change, and the ready-made classes, with a tiny model; `output_dir` is the reader's own."""
    [change] = re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    new = "\n".join(line[1:] for line in change.splitlines() if not line.startswith("-"))
    blocks = python_blocks("README.md")
    assert "GNPTrainer(" in new and any("GNPMixin" in block for block in blocks)
    run("\n".join([README_SETTING, new, *blocks]), tmp_path)
    assert (tmp_path / "out").is_dir()


def test_site_is_built_without_a_warning(tmp_path):
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
