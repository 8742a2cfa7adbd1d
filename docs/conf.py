"""The documentation site: Sphinx over the pages where they lie, so that their links hold here and in a checkout."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from featurepipe import __version__  # noqa: E402  # of this checkout
from featurepipe.cli.parser import COMMANDS, EXIT_CODES, build_parser, sections  # noqa: E402
from featurepipe.jobs.text import job_keys  # noqa: E402

project = "featurepipe"
author = "the featurepipe authors"
copyright = "Apache License 2.0"  # noqa: A001  # what Sphinx calls it
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "pipelines/README.md",
    "benchmarks/*.md",
    "featurepipe/store/FORMAT.md",
    "featurepipe/heads/bundle/BUNDLE.md",
    "featurepipe/data/README.md",
    "README.md",
    "SECURITY.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
exclude_patterns = [".*", "build", "demo-output", "tests", "**/__pycache__"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # the docstrings say types, units and shapes
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = f"featurepipe {__version__}"
html_static_path: list[str] = []
html_extra_path = ["_site"]  # what the root of the site has: a way to its first page
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
html_theme_options: dict[str, Any] = {
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    "footer_start": ["sphinx-version"],
    "footer_end": [],
    "show_toc_level": 2,
}


class Commands(SphinxDirective):
    """All commands and their options, as the parser has them: ``featurepipe-commands``."""

    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        """Returns a section for each command, under the job that it is for."""
        parser = build_parser()
        (choices,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))  # noqa: SLF001
        sections = [self._of_job(job, {name: choices[name] for name in names}) for job, names in COMMANDS.items()]
        return [*sections, nodes.literal_block(EXIT_CODES, EXIT_CODES, language="text")]

    def _of_job(self, job: str, parsers: dict[str, argparse.ArgumentParser]) -> nodes.Node:
        section = self._section(job.capitalize(), f"job-{job}")
        section += [self._of_command(name, parser) for name, parser in parsers.items()]
        return section

    def _of_command(self, name: str, parser: argparse.ArgumentParser) -> nodes.Node:
        section = self._section(f"featurepipe {name}", f"command-{name}")
        usage = parser.format_usage()
        section += [nodes.paragraph(text=parser.description or ""), nodes.literal_block(usage, usage, language="text")]
        for title, actions in sections(parser):
            section += [nodes.rubric(text=title), self._options(actions, parser)]
        if parser.epilog:
            section += nodes.literal_block(parser.epilog, parser.epilog, language="text")
        return section

    def _options(self, actions: list[argparse.Action], parser: argparse.ArgumentParser) -> nodes.Node:
        formatter = parser._get_formatter()  # noqa: SLF001
        found = nodes.definition_list()
        for action in actions:
            term = nodes.term("", "", nodes.literal(text=formatter._format_action_invocation(action)))  # noqa: SLF001
            told = formatter._expand_help(action) if action.help else ""  # noqa: SLF001
            found += nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph(text=told)))
        return found

    def _section(self, title: str, name: str) -> nodes.section:
        section = nodes.section("", nodes.title(text=title), ids=[nodes.make_id(name)], names=[name])
        self.state.document.note_explicit_target(section)
        return section


class JobKeys(SphinxDirective):
    """All keys of a job file with their defaults, as its tables declare them: ``featurepipe-job-keys``."""

    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        """Returns a section for the keys outside tables, and one for each table."""
        found = []
        for title, keys in job_keys().items():
            name = nodes.make_id(f"table-{title}")
            section = nodes.section("", nodes.title(text=title), ids=[name], names=[name])
            self.state.document.note_explicit_target(section)
            listed = nodes.definition_list()
            for key, what, text in keys:
                term = nodes.term("", "", nodes.literal(text=key), nodes.Text(what))
                listed += nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph(text=text)))
            section += listed if keys else nodes.paragraph(text="It has no keys.")
            found.append(section)
        return found


class Notebooks(MystParser):
    """A notebook as a page: its text, its code, and the outputs that it has stored."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Reads the notebook as the Markdown that it amounts to."""
        super().parse("\n\n".join(_as_markdown(json.loads(inputstring))), document)


def _as_markdown(notebook: dict[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield text
            continue
        yield f"```python\n{text}\n```"
        for output in cell["outputs"]:
            shown = output.get("data", {"text/plain": output.get("text", "")})
            for kind, lines in shown.items():
                yield _output(kind, "".join(lines))


def _output(kind: str, text: str) -> str:
    if kind == "image/png":
        text = f'<p><img src="data:image/png;base64,{text.strip()}" alt="what the code above draws"></p>'
    if kind in {"image/png", "text/html"}:
        return f"````{{raw}} html\n{text}\n````"
    return f"````{{code-block}} text\n:class: output\n\n{text}\n````"


def setup(app: Sphinx) -> None:
    """Adds the directives, and notebooks as a kind of page."""
    app.add_directive("featurepipe-commands", Commands)
    app.add_directive("featurepipe-job-keys", JobKeys)
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(Notebooks)
