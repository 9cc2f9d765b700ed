"""What the site has beyond `docs/`: the README as its first page, the benchmarks' pages, and the design notes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    """Add pages that stand elsewhere in the repository."""
    extra = {f"benchmarks/{page.name}": page.read_text() for page in sorted((ROOT / "benchmarks").glob("*.md"))}
    extra |= {name: (ROOT / name).read_text() for name in ROOT_PAGES}
    extra["index.md"] = (ROOT / "README.md").read_text()
    for name, text in extra.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_config(config: Any) -> Any:
    """List the design notes and the benchmarks in the navigation."""
    design = [f"design/{page.name}" for page in sorted((ROOT / "docs" / "design").glob("*.md"))]
    pages = [f"benchmarks/{page.name}" for page in sorted((ROOT / "benchmarks").glob("*.md"))]
    config.nav += [
        {"Explanation": design},
        {"Benchmarks": pages},
        {"Project": [{"Security": "SECURITY.md"}, {"Contributing": "CONTRIBUTING.md"}, {"Changes": "CHANGELOG.md"}]},
    ]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links lead to where the pages stand on the site; of links to other files the text remains."""
    known = {file.src_uri for file in files}

    def link(found: re.Match[str]) -> str:
        target = found.group(2).removeprefix("docs/").removeprefix("../")
        return f"[{found.group(1)}]({target})" if target in known else found.group(1)

    if page.file.src_uri not in ("index.md", *ROOT_PAGES) and "](../benchmarks/" not in markdown:
        return markdown
    return re.sub(r"\[([^\]]+)\]\(([^)#:]+)\)", link, markdown)
