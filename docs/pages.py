"""MkDocs's hook: the pages that are generated when the site is built, and links that leave docs/.

Generated are the reference of settings, from their declarations, that of commands, from their own help, that of the
names for Python, from their docstrings, and a page of the packaged configs. On GitHub a link such as
`../moco_dist/launchers/examples/pretrain.sbatch` shows that file; on the site it leads to a page with the file's text.
"""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from moco_dist.cli.configured import SCHEMAS  # noqa: E402
from moco_dist.cli.main import COMMANDS, main  # noqa: E402
from moco_dist.config import packaged  # noqa: E402
from moco_dist.config.section import declared  # noqa: E402
from moco_dist.config.source import default_text, leaf_fields, type_name  # noqa: E402
from moco_dist.launchers.options import OPTIONS  # noqa: E402

# Pages of the repository's top that are pages of the site too.
FROM_THE_TOP = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
CHANGES = {
    "shapes": "the shapes of weights or queue: no checkpoint of another value can be loaded",
    "result": "what is computed",
    "speed": "how fast, or with how much memory",
    "place": "where it is computed, or where data is read",
    "record": "how far a run goes now, and what is written of it",
}
API = """# Names for Python

[From Python](python.md) shows them at work; `PretrainConfig` has the [settings](settings.md#pretrain) of `pretrain`.

::: moco_dist.api
"""
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and a page for each file of the repository that a page links to."""
    pages = {"settings.md": settings(), "commands.md": commands(), "configs.md": configs(), "api.md": API}
    pages |= {page: (ROOT / name).read_text(encoding="utf-8") for name, page in FROM_THE_TOP.items()}
    texts = [file.content_string for file in files.documentation_pages()] + list(pages.values())
    for target in sorted({link[1].removeprefix("../") for text in texts for link in LINK.finditer(text)}):
        path = ROOT / target
        if target not in FROM_THE_TOP and not target.startswith("docs/") and path.exists() and path != ROOT / "docs":
            pages |= sources(path)
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of docs/, as they are on GitHub, lead to the site's own pages."""
    at_the_top = page.file.src_uri in FROM_THE_TOP.values()

    def moved(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        if not at_the_top and not target.startswith("../"):
            return link[0]
        target = target.removeprefix("../")
        if target.startswith("docs/"):
            return f"]({target.removeprefix('docs/')}{anchor})"
        return f"]({FROM_THE_TOP.get(target, source_page(target))}{anchor})"

    return markdown if page.file.src_uri.startswith("source/") else LINK.sub(moved, markdown)


def source_page(target: str) -> str:
    return f"source/{target.rstrip('/')}.md"


def sources(path: Path) -> dict[str, str]:
    """A page with the text of a file of the repository; of a folder, a list of its files, and a page of each."""
    name = path.relative_to(ROOT).as_posix()
    search = "---\nsearch:\n  exclude: true\n---\n"
    if path.is_dir():
        inside = [file for file in sorted(path.iterdir()) if file.is_file()]
        lines = [f"- [{file.name}]({path.name}/{file.name}.md)" for file in inside]
        pages = {source_page(name): "\n".join([f"{search}# {name}", "", *lines])}
        for file in inside:
            pages |= sources(file)
        return pages
    kind = {".sbatch": "bash", ".yaml": "yaml", ".py": "python"}.get(path.suffix, "text")
    return {source_page(name): f"{search}# {name}\n\n{fenced(path.read_text(encoding='utf-8'), kind)}"}


def fenced(text: str, kind: str = "text") -> str:
    return f"~~~~{kind}\n{text.rstrip()}\n~~~~\n"


def settings() -> str:
    """Every setting of every command that takes a config, from its declaration."""
    parts = [
        "# Settings",
        "In a YAML file a setting lies in its section; on the command line it is a flag, such as "
        "`--optim.base-lr 0.06`. `moco-dist COMMAND --help` says the same. [Configs](configs.md) are made of these.",
        "What another value of a setting changes:",
        "\n".join(f"- **{name}**: {text}" for name, text in CHANGES.items()),
    ]
    for command, schema in SCHEMAS.items():
        parts.append(f"## {command}")
        for name, field in leaf_fields(schema).items():
            it = declared(field)
            default = "**required**" if field.is_required() else f"default `{default_text(field.default)}`"
            facts = [f"`{type_name(field.annotation)}`", default]
            facts += [f"unit: {it['unit']}"] if it["unit"] else []
            facts += [f"changes {it['changes']}"]
            facts += [f"source: {it['source']}"] if it["source"] else []
            parts += [f"### `{name}` {{ #{command}.{name} }}", f"{plain(field.description or '')}.", " · ".join(facts)]
    return "\n\n".join(parts)


def plain(text: str) -> str:
    """Text of a help message, in Markdown."""
    return re.sub(r"([\\*_<>\[\]|])", r"\\\1", text)


def commands() -> str:
    """Every command's own help; where it would go on with every setting, a link to them."""
    overview = help_of()
    parts = ["# Commands", fenced(overview)]
    for name, (what, _) in COMMANDS.items():
        parts += [f"## {name}", f"{what[0].upper()}{what[1:]}."]
        text, dash, _ = help_of(name).partition("\n  --") if name in SCHEMAS else (help_of(name), "", "")
        parts.append(fenced(text))
        if dash:
            parts.append(f"Its flags are its settings: [{name}](settings.md#{name}).")
        choices = re.search(r"^  \{([\w,]+)\}$", text, re.MULTILINE)
        for action in [*(choices[1].split(",") if choices else []), *(OPTIONS if name == "launch" else [])]:
            own = help_of(name, action).removeprefix(text)  # launch says its usage again
            parts += [f"### {name} {action}", fenced(own.lstrip("\n"))]
    return "\n\n".join(parts)


def help_of(*words: str) -> str:
    """What `moco-dist WORDS --help` prints in a terminal of 72 columns."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "72"
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return said.getvalue().replace(sys.executable, "python")


def configs() -> str:
    """The packaged configs, whole: each begins with what it is for."""
    parts = ["# Configs", "Each is given by its name, as in `moco-dist pretrain mocov2_r50_200ep`; "
             "`moco-dist configs show NAME > mine.yaml` makes one yours."]  # fmt: skip
    for name in packaged.names():
        parts += [f"## `{name}`", fenced(packaged.text(name), "yaml")]
    return "\n\n".join(parts)
