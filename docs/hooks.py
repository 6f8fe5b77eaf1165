"""mkdocs: pages of the site that are files of the repository's root, where their readers look for them first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add them; what lies in docs/ is beside them then."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = text.replace("](docs/", "](")
        for other, named in PAGES.items():
            text = text.replace(f"]({named})", f"]({other})")
        files.append(File.generated(config, page, content=text))
    return files
