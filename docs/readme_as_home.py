"""A hook of mkdocs: README.md is the site's home page; CONTRIBUTING.md and CHANGELOG.md are pages of it.

Links whose text is the name of a page's file, which readers of the sources want, show the page's title here.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files, config):
    for source, page in PAGES.items():
        content = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        content = re.sub(r"\]\((\w+\.md)\)", lambda link: f"]({PAGES.get(link[1], link[1])})", content)
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    def titled(link):
        target = files.get_file_from_path(link[2])
        title = target and re.search(r"^# (.+)$", target.content_string, re.MULTILINE)
        return f"[{title[1]}]({link[2]}{link[3] or ''})" if title else link[0]

    return re.sub(r"\[`?((?:docs/)?\w+\.md)`?\]\((\w+\.md)(#[\w-]+)?\)", titled, markdown)
