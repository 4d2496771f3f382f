"""The commands and settings that the pages show: README, CONTRIBUTING and the pages of docs/."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {"reference.md"}
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    if path.name not in GENERATED
}


def commands(page: str, *, optional: bool) -> list[str]:
    """Return the `align` commands in a page's shell blocks; `optional` keeps what is in `[--brackets]`."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", PAGES[page], re.S))
    lines = blocks.replace("\\\n", " ").replace("$beta", "0.1").splitlines()
    kept = [re.sub(r"\[(-.*?)\]", r"\1" if optional else "", line.split(" # ")[0].strip()) for line in lines]
    return [
        re.sub(r"^python -m align\.", "align ", line) for line in kept if re.match(r"(align|python -m align\.)", line)
    ]


def inline_settings(page: str) -> list[str]:
    """Return the keys of every `key=value` in a page's running text; capitals are environment variables."""
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.S)
    spans = " ".join(re.findall(r"`([^`\n]+)`", text))
    return re.findall(r"(?<![\w./:,\"'-])([a-z][a-z0-9_.]*)=", spans)


def write_recipe_files(folder: Path) -> None:
    """Write what the page of recipes takes: the files of the example, logs where a reader has them, and the mixture."""
    rows = folder / "recipes"
    runpy.run_path(str(ROOT / "examples/recipe_rows.py"))["main"](rows)
    for name in ("taskmaster.json", "crosswoz.json", "banking77.csv"):
        (rows / name).rename(folder / name)
    mixture = re.search(r"```yaml\n(.*?)```", PAGES["docs/recipes.md"], re.S)[1]
    (rows / "personas.yaml").write_text(mixture, encoding="utf-8")
    (rows / "personas_test.yaml").write_text(mixture.replace("_train", "_test"), encoding="utf-8")
