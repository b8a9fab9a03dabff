"""How Sphinx builds the documentation: `make docs`.

The pages are Markdown (MyST). The theme is Furo: one sidebar, no settings, readable on a phone.
"""

import dataclasses
import importlib
import inspect
import re
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective


project = "vla-adapter-hf"
author = "the vla-adapter-hf authors"
version = release = installed_version("vla-adapter-hf")
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "vla-adapter-hf"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
smartquotes = False  # options begin with two hyphens
copybutton_exclude = ".linenos, .gp, .go"

# Headings get anchors, so that pages can link to sections; a link to a missing page or anchor is a warning, and so an
# error.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]
# Notebooks are shown with the outputs that are committed; tests/test_examples.py runs them.
nb_execution_mode = "off"
nb_merge_streams = True


def copy_notebooks() -> None:
    """The examples' notebooks as pages, with their links to pages as seen from there."""
    folder = Path(__file__).parent / "tutorials"
    folder.mkdir(exist_ok=True)
    for notebook in sorted(Path(__file__).parents[1].glob("examples/*.ipynb")):
        text = notebook.read_text(encoding="utf-8").replace("](../docs/", "](../")
        (folder / notebook.name).write_text(text, encoding="utf-8")


copy_notebooks()

# Docstrings are written as transformers writes them: sections of Google's style, single backticks, [`Name`] for a
# reference.
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
python_use_unqualified_type_names = True


def convert_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Markdown in a docstring as reStructuredText: references, links and fenced code."""
    text = "\n".join(lines)
    text = re.sub(
        r"(?<!`)`(?!`)([^`]+)`(?!`)", r"``\1``", text
    )  # Markdown's code is reStructuredText's with two backticks
    text = re.sub(r"\[``([\w.]+)``\]", r":py:obj:`\1`", text)
    text = re.sub(r"\[([^\]`]+)\]\((https?://[^)]+)\)", r"`\1 <\2>`__", text)
    text = re.sub(r"^( *)```(\w*)\n(.*?)^ *```$", _code_block, text, flags=re.DOTALL | re.MULTILINE)
    lines[:] = text.split("\n")


def _code_block(match: re.Match) -> str:
    indent, kind, code = match.groups()
    body = "\n".join(f"    {line}" if line.strip() else "" for line in code.split("\n"))
    return f"\n{indent}.. code-block:: {kind or 'text'}\n\n{body}"


def shorten_signature(app, what, name, obj, options, signature, return_annotation):
    """Leave out what transformers documents: training arguments have more than a hundred parameters."""
    if name.endswith("TrainingArguments"):
        return "(output_dir, ..., early_stopping_patience=None)", return_annotation
    if name.endswith(".VLAAdapterConfig"):
        return "(*, " + signature.partition("*, ")[2], return_annotation  # without the fields of every configuration
    return None


class OptionTable(SphinxDirective):
    """A table of options: of a `vla-adapter` command, or with `:fields:` of a dataclass given by its full name."""

    required_arguments = 1
    option_spec = {"fields": directives.flag}

    def run(self) -> list[nodes.Node]:
        summary, rows = self._fields() if "fields" in self.options else self._command()
        lines = [*summary.strip().splitlines(), "", "| option | default | meaning |", "|---|---|---|"]
        lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
        content = StringList(lines, source=self.env.doc2path(self.env.docname))
        container = nodes.container(classes=["options"])
        self.state.nested_parse(content, self.content_offset, container)
        return container.children

    def _command(self) -> tuple[str, list[tuple[str, str, str]]]:
        from vla_adapter_cli import load_command

        command = load_command(self.arguments[0])
        rows = []
        for parameter in command.params:
            argument = parameter.param_type_name == "argument"
            name = parameter.name.upper() if argument else ", ".join(parameter.opts + parameter.secondary_opts)
            default = None if parameter.required else parameter.default
            rows.append((f"`{name}`", _shown(default), " ".join((getattr(parameter, "help", "") or "").split())))
        return inspect.cleandoc(command.help or ""), rows

    def _fields(self) -> tuple[str, list[tuple[str, str, str]]]:
        module, _, name = self.arguments[0].rpartition(".")
        fields = dataclasses.fields(getattr(importlib.import_module(module), name))
        return "", [(f"`--{f.name}`", _shown(f.default), f.metadata.get("help", "")) for f in fields]


def _shown(default) -> str:
    if default is None or default is dataclasses.MISSING or default is False or callable(default):
        return ""
    return f"`{default}`"


def setup(app) -> None:
    app.add_directive("option-table", OptionTable)
    app.connect("autodoc-process-docstring", convert_docstring, priority=100)
    app.connect("autodoc-process-signature", shorten_signature)
