"""Hook of MkDocs: adds the pages that lie outside docs/, and makes links between files of the repository work there.

Documents link to each other by their places in the repository, as GitHub shows them. On the site, such a link leads to
the page of the file, and is called by its title if its text is the name of the file. A link to a file that has no page
becomes its text.
"""

import functools
import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

# Page of the site: file of the repository.
PAGES = {
    "index.md": "README.md",
    "kernels.md": "kernels/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
} | {f"api/{file.name}": f"docs_site/api/{file.name}" for file in sorted((ROOT / "docs_site/api").glob("*.md"))}

_PAGE_OF = {source: page for page, source in PAGES.items()}
_WITHOUT_NAVIGATION = ("index.md", "gallery.md")
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of files outside docs/."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Returns the text of a page, with the links of the site."""
    here = page.file.src_uri
    if here in _WITHOUT_NAVIGATION:  # they are alone in their tabs
        page.meta["hide"] = ["navigation"]
    source = PAGES.get(here, f"docs/{here}")

    def on_site(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups(default="")
        if ":" in target:  # another host
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        to = _PAGE_OF.get(file, file.removeprefix("docs/"))
        if files.get_file_from_path(to) is None:
            if not (ROOT / file).exists():
                raise PluginError(f"{source} links to {target}, which does not exist.")
            return text
        if text in (target, posixpath.basename(target)):
            text = _title(file)
        return f"{image}[{text}]({os.path.relpath(to, posixpath.dirname(here) or '.')}{anchor})"

    return _outside_blocks(functools.partial(_LINK.sub, on_site), markdown)


@event_priority(-100)  # after the search has written its index
def on_post_build(config: MkDocsConfig) -> None:
    """Writes the index of the search as a script, too, which pages that are opened as files can load."""
    index = Path(config.site_dir) / "search/search_index.json"
    index.with_suffix(".js").write_text(f"var __index = {index.read_text()}")


def _title(file: str) -> str:
    """Returns the first heading of a document."""
    return (ROOT / file).read_text().split("\n", 1)[0].removeprefix("# ")


def _outside_blocks(change: Callable[[str], str], markdown: str) -> str:
    """Returns the text with a change everywhere but in blocks of code, which keep only the name of their language."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return "".join(re.sub(r"^(```\w+).*", r"\1", part) if part.startswith("```") else change(part) for part in parts)
