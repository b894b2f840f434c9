"""A hook of mkdocs: README.md is the site's home page."""

from pathlib import Path

from mkdocs.structure.files import File

README = Path(__file__).parent.parent / "README.md"


def on_files(files, config):
    content = README.read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=content))
    return files
