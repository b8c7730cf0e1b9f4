"""
Adds what pytest wrote of one part to results.json, and prints it as a table.

    python table.py output_folder part exit_code
"""

import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path


OUTCOMES = ("failure", "error", "skipped")


def read(path: Path) -> dict[str, dict[str, str]]:
    """By test: its outcome, its seconds, and the distance that it printed."""
    found = {}
    for case in ET.parse(path).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in OUTCOMES), "passed")
        printed = "".join(child.text or "" for child in case if child.tag == "system-out")
        distance = re.search(r"(\S+) of the distance travelled", printed)
        entry = {"outcome": outcome, "seconds": case.get("time", "")}
        found[case.get("name", "")] = entry | ({"distance": distance.group(1)} if distance else {})
    return found


def main(output: str, part: str, code: str) -> None:
    folder = Path(output)
    results_file, xml = folder / "results.json", folder / f"{part}.xml"
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    tests = read(xml) if xml.exists() else {}  # none where it ran out of time
    results[part] = {"exit_code": int(code), "tests": tests}
    results_file.write_text(json.dumps(results, indent=1))
    print(f"{part}: {'ran out of time' if code == '124' else f'exit code {code}'}, log in {folder / part}.log")
    for name, test in tests.items():
        print(f"  {test['outcome']:8} {test['seconds']:>8} s  {test.get('distance', ''):>8}  {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
