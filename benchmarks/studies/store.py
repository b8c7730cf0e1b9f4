"""The runs of a study, a line each in a JSON file."""

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock


Run = dict[str, Any]


class Store:
    """The runs in a JSON file, which is replaced as a whole each time one is added. Processes may share it."""

    def __init__(self, path: Path):
        self.path = path
        self.runs = self._read()

    def _read(self) -> list[Run]:
        return json.loads(self.path.read_text(encoding="utf-8"))["runs"] if self.path.is_file() else []

    def add(self, run: Run) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            self.runs = [*self._read(), run]
            new = self.path.with_suffix(".new")
            lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in self.runs)
            new.write_text(f'{{"runs": [\n{lines}\n]}}\n', encoding="utf-8")
            os.replace(new, self.path)

    def of(self, settings: dict[str, Any], methods: dict[str, dict[str, Any]]) -> dict[str, dict[int, Run]]:
        """Of each method the runs by seed, those with the gnp arguments that `methods` says it has."""
        found: dict[str, dict[int, Run]] = {method: {} for method in methods}
        for run in self.runs:
            if run["settings"] == settings and methods.get(run["method"]) == run["gnp"]:
                found[run["method"]][run["seed"]] = run
        return found
