"""The site of the documentation: it builds without a warning, and each public name has its place in the reference."""

import html
import importlib
import logging
import re
import sys
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import ddpm_vlb

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import site_hooks  # noqa: E402

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / path for path in site_hooks.MADE_OF.values())]
BLOCK = re.compile(r"^::: ddpm_vlb\.([\w.]+)\n(?:    options: \{(.*)\}\n)?", re.MULTILINE)
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; a warning of mkdocs, mkdocstrings or the hook is an error."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def text_of(page):
    """A page's Markdown without its fenced blocks."""
    return FENCED.sub("", page.read_text())


def reference():
    """What the `::: ddpm_vlb.` blocks of the reference show, except those of a module's docstring alone."""
    pages = "".join(page.read_text() for page in sorted((ROOT / "docs" / "reference").glob("*.md")))
    return [path for path, options in BLOCK.findall(pages) if "members: false" not in options]


def test_every_public_name_has_one_place():
    """The reference has each name of `__all__` once, and nothing twice."""
    names = [path.rpartition(".")[2] for path in reference()]
    assert sorted(names) == sorted(set(names)) and set(ddpm_vlb.__all__) <= set(names)


def test_the_index_names_every_public_name():
    """So does the reference's first page, once."""
    named = re.findall(r"\[`(\w+)`\]\[ddpm_vlb\.", (ROOT / "docs" / "reference" / "index.md").read_text())
    assert sorted(named) == sorted(ddpm_vlb.__all__)


@pytest.mark.parametrize("path", reference())
def test_a_place_shows_what_is_imported(path):
    """A block is a function or class and not the module of the same name, which mkdocstrings would take for it."""
    module, _, name = f"ddpm_vlb.{path}".rpartition(".")
    folder = ROOT / "src" / module.replace(".", "/")
    assert not (folder / f"{name}.py").exists() and not (folder / name).exists()
    shown = getattr(importlib.import_module(module), name)
    assert shown is getattr(ddpm_vlb, name, shown)


def test_the_site_builds(site):
    """Home is the README, a name of the reference its own heading, and CHANGELOG.md and the benchmarks are there."""
    assert "<h1" in (home := (site / "index.html").read_text()) and "<code>hybrid_loss" in home
    assert 'id="ddpm_vlb.vlb_loss"' in (site / "reference" / "losses" / "index.html").read_text()
    assert (site / "CHANGELOG" / "index.html").exists() and (site / "benchmarks" / "index.html").exists()
    assert not (site / "site_hooks.py").exists()


def test_mathematics_is_marked(site):
    """Each formula of the theory is given to MathJax, and no dollar is left over."""
    text = re.sub(r"`[^`]*`", "", text_of(ROOT / "docs" / "theory.md"))
    displayed = len(re.findall(r"^\$\$$", text, re.MULTILINE)) // 2
    inline = len(re.findall(r"\$[^$\n]+\$", re.sub(r"^\$\$$.*?^\$\$$", "", text, flags=re.MULTILINE | re.DOTALL)))
    page = (site / "theory" / "index.html").read_text()
    assert page.count('<div class="arithmatex">\\[') == displayed > 60
    assert page.count('<span class="arithmatex">\\(') == inline > 400
    assert "$" not in page[page.index("<article") : page.index("</article>")]


def test_a_link_to_a_test_leads_to_its_line(site):
    """And the line is that of the file."""
    page = html.unescape((site / "theory" / "index.html").read_text())
    links = re.findall(r'href="\.\./(source/[\w./]+)/#(__codelineno-0-(\d+))"><code>([\w.]+)<', page)
    assert len(links) > 100
    for path, anchor, line, name in links:
        assert f'id="{anchor}"' in (site / path / "index.html").read_text()
        written = (ROOT / path.removeprefix("source/")).read_text().splitlines()[int(line) - 1]
        assert re.match(rf" *((def|class) )?{name.rpartition('.')[2]}\b", written), name


@pytest.mark.parametrize(
    "uri, link, expected",
    [
        ("theory.md", "[a](notation.md#dtypes)", "[a](notation.md#dtypes)"),
        ("index.md", "[a](docs/theory.md#references)", "[a](theory.md#references)"),
        ("index.md", "![a](docs/samples.png)", "![a](samples.png)"),
        ("index.md", "[a](benchmarks)", "[a](benchmarks/README.md)"),
        ("theory.md", "[a](../tests)", "a"),
        ("reference/index.md", "[a](../../README.md)", "[a](../index.md)"),
        ("benchmarks/README.md", "[a](../LICENSE)", "[a](../source/LICENSE.md)"),
        ("theory.md", "[a](nowhere.md)", "[a](nowhere.md)"),
        ("theory.md", "[a](https://arxiv.org)", "[a](https://arxiv.org)"),
    ],
)
def test_links(uri, link, expected):
    """From places in the repository to places on the site; mkdocs reports what is not there."""
    assert site_hooks.LINK.sub(lambda match: site_hooks.site_link(match, uri), link) == expected


def test_a_link_to_what_a_file_does_not_define_is_told(caplog):
    """Which fails the strict build: a renamed test is found where a document names it."""
    with caplog.at_level(logging.WARNING):
        match = site_hooks.LINK.match("[`ForwardProcess.q_nothing`](../src/ddpm_vlb/forward_process.py)")
        assert site_hooks.site_link(match, "theory.md").endswith("(source/src/ddpm_vlb/forward_process.py.md)")
    assert "ForwardProcess.q_nothing" in caplog.text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_stand_apart(page):
    """Tables, headings and lists have an empty line before them: mkdocs, unlike GitHub, needs it."""
    lines = ["", *text_of(page).splitlines()]
    starts = {r"\|": r"\||$", r"#+ ": r"$", r"([-*]|\d+\.) ": r"([-*]|\d+\.) |  |$"}
    for start, before in starts.items():
        for above, line in zip(lines, lines[1:]):
            assert not re.match(start, line) or re.match(before, above), (above, line)
