"""Make the site of files that are written to be read in the repository.

The Markdown links to files by their place in the repository, in docs/ and outside. On the site

- README.md is the home page; CHANGELOG.md, CONTRIBUTING.md and the Markdown of benchmarks/ are pages as they stand;
- any other file that a page links to is a page with its text, and a link whose text names a function or a class, as
  [`test_bayes`](../tests/test_forward_process.py) does, leads to its line;
- a link to a folder leads to its README, or is its words alone.

So the site is whole without an address of the repository, and `mkdocs build --strict` finds what leads nowhere.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
AS_THEY_STAND = ["CHANGELOG.md", "CONTRIBUTING.md"]
AS_THEY_STAND += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("*.md"))
MADE_OF = {"index.md": "README.md"} | {path: path for path in AS_THEY_STAND}  # pages, and the files that they are
SOURCES = "source/"

LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?![a-z]+:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"`((?:\w+\.)*(?!py`)\w+)`")
LINE_ID = "__codelineno-0-{}"

log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files outside docs/, then those of the files that pages link to."""
    for uri, path in MADE_OF.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    linked = {target for file in files.documentation_pages() for target in targets(file)}
    for path in sorted(linked):
        if (ROOT / path).is_file() and page_of(path) == source_page(path):
            files.append(File.generated(config, source_page(path), content=source_markdown(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page from places in the repository into places on the site."""
    uri = page.file.src_uri
    if uri.startswith(SOURCES):
        return markdown
    parts = FENCED.split(markdown)  # every second one is a fenced block
    parts[::2] = [LINK.sub(lambda match: site_link(match, uri), part) for part in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Tell mkdocs, which checks anchors, those of a source page's lines, which it does not see by itself."""
    if page.file.src_uri.startswith(SOURCES) and page.present_anchor_ids is not None:
        page.present_anchor_ids |= set(re.findall(f'id="({LINE_ID.format("[0-9]+")})"', html))
    return html


def targets(file: File) -> set[str]:
    """The places in the repository that a page links to."""
    text = "".join(FENCED.split(file.content_string)[::2])
    return {repository_path(match["path"], file.src_uri) for match in LINK.finditer(text)}


def repository_path(link: str, uri: str) -> str:
    """Where in the repository a relative link of the page `uri` leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(MADE_OF.get(uri, f"docs/{uri}")), link))


def page_of(path: str) -> str | None:
    """The page or file of the site that stands for a place in the repository; None for a folder without a README."""
    for uri, made_of in MADE_OF.items():
        if path == made_of:
            return uri
    if (ROOT / path).is_dir():
        return page_of(f"{path}/README.md") if (ROOT / path / "README.md").exists() else None
    return path.removeprefix("docs/") if path.startswith("docs/") else source_page(path)


def source_page(path: str) -> str:
    """The page with the text of a file."""
    return f"{SOURCES}{path}.md"


def source_markdown(path: str) -> str:
    """A file's text as a page, which the search leaves out."""
    language = {".py": "python", ".yaml": "yaml", ".yml": "yaml"}.get(Path(path).suffix, "text")
    head = f"---\ntitle: {path}\nhide: [navigation, toc]\nsearch: {{exclude: true}}\n---\n\n# `{path}`\n\n"
    return f'{head}````{{.{language} linenums="1"}}\n{(ROOT / path).read_text().rstrip()}\n````\n'


def site_link(match: re.Match[str], uri: str) -> str:
    """A link of the page `uri` as it is on the site."""
    path = repository_path(match["path"], uri)
    if not (ROOT / path).exists():
        return match[0]  # mkdocs says so
    page = page_of(path)
    if page is None:
        return match["text"]
    anchor = match["anchor"] or ""
    if page == source_page(path) and (name := NAME.fullmatch(match["text"])):
        line = line_of(name[1], (ROOT / path).read_text())
        if line is None:
            log.warning(f"{uri} links to {name[1]} in {path}, which does not define it.")
        else:
            anchor = "#" + LINE_ID.format(line)
    return f"{match['image']}[{match['text']}]({posixpath.relpath(page, posixpath.dirname(uri) or '.')}{anchor})"


def line_of(name: str, source: str) -> int | None:
    """The line on which a module defines a function, a class, or a method or field as `Class.name`."""
    start = 0
    for part in name.split("."):
        found = re.compile(rf"^ *(?:def |class )?{part}\b(?= *[(:=])", re.MULTILINE).search(source, start)
        if found is None:
            return None
        start = found.end()
    return source.count("\n", 0, start) + 1
