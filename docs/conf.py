"""Sphinx: ``sphinx-build -W -n docs build`` makes the site, with no network."""

from __future__ import annotations

import html
import importlib
import os
import re
from typing import TYPE_CHECKING, Any

import torch
from docutils import nodes
from docutils.nodes import Element, Text
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from latex2mathml.converter import convert as latex_to_mathml
from sphinx.addnodes import pending_xref
from sphinx.errors import ExtensionError

import focaldet
from focaldet.backbones import BACKBONES, build_backbone

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "focaldet"
author = "the authors of focaldet"
project_copyright = author
version = release = focaldet.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxext.opengraph",
]
exclude_patterns = ["_build", "build"]

html_theme = "furo"
html_title = f"focaldet {version}"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["focaldet.css"]
html_math_renderer = "mathml"
html_theme_options = {
    # The theme's stacks begin with fonts that give wide monospace on some systems.
    "light_css_variables": {"api-font-size": "var(--font-size--small)"},
}

# Read the Docs sets the address. Without one, as on your machine, there is nothing to put in a sitemap.
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")
if html_baseurl:
    extensions.append("sphinx_sitemap")
    sitemap_url_scheme = "{link}"  # the address contains the language and the version
    sitemap_excludes = ["search.html", "genindex.html", "py-modindex.html"]
ogp_site_url = html_baseurl
ogp_image = "_static/social_card.png"
ogp_image_alt = "focaldet: RetinaNet and the focal loss for PyTorch"
ogp_social_cards = {"enable": False}  # generated ones would need a font from the network
ogp_custom_meta_tags = ['<meta name="twitter:card" content="summary_large_image" />']

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

default_role = "py:obj"  # single backticks in docstrings link where they can
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

autodoc_default_options = {"members": True, "exclude-members": "extra_repr"}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Names of other projects, and such as are only spelled in annotations. No inventories are fetched.
nitpick_ignore_regex = [
    ("py:obj", r".*"),
    (
        "py:.*",
        r"(torch|torchvision|nn|np|npt|numpy|PIL|Image|os|pathlib|matplotlib|supervision)(\..*)?",
    ),
    ("py:.*", r"(collections|typing|typing_extensions)(\..*)?"),
    ("py:.*", r"(pl|pytorch_lightning|huggingface_hub)(\..*)?"),
    (
        "py:class",
        r"Focaldet(Optimized)?RetinaNet|Exif|Logger|ResultsFormat|dict\[str|(focaldet\..*\.)?_(Model|Images)|SupportsToCoco|Normalizer|Reduction|Report|ImageFiles|FormatName|OutputFolder|Severity|Shape|RuntimeName|(File|Run)Precision|Batch",
    ),  # aliases kept inside
    (
        "py:class",
        r"Tensor|Path|Transform|Mapping|Sequence|Iterable|Iterator|Callable|PathLike|Module|NDArray",
    ),
]

_MODULES = (
    *("anchor_grid", "anchors", "backbones", "box_coder", "boxes", "config", "criterion"),
    *(
        "datasets",
        "datasets.checks",
        "datasets.readers",
        "datasets.writers",
        "detections",
        "errors",
    ),
    "evaluation",
    *("export", "fpn", "heads", "images", "losses", "matching", "postprocess", "pretrained"),
    "results",
    *("retinanet", "structures", "training", "transforms", "visualization"),
    "errors",  # last: some errors are documented with the modules that raise them
)


def _homes() -> dict[str, str]:
    """Map the short names by which docstrings and annotations call things to documented ones."""
    homes: dict[str, str] = {}
    for module in _MODULES:
        full = f"focaldet.{module}"
        for name in importlib.import_module(full).__all__:
            homes.setdefault(name, f"{full}.{name}")
    return homes | {f"focaldet.{name}": homes[name] for name in focaldet.__all__ if name in homes}


_HOMES = _homes()


def _resolve_short_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Any
) -> Any:
    """Resolve ``focaldet.FPN`` and a bare ``Detections``, whose pages call them by their modules."""
    if node.get("refdomain") != "py":
        return None
    target = node.get("reftarget", "")
    stem, dot, member = target, "", ""
    if target not in _HOMES:
        stem, dot, member = target.rpartition(".")  # focaldet.RetinaNet.predict
    if stem not in _HOMES:
        return None
    return env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, "obj", f"{_HOMES[stem]}{dot}{member}", node, contnode
    )


def _qualify_ambiguous_names(app: Sphinx, doctree: Any) -> None:
    """Make a name that two modules have that of :data:`_HOMES`, except in the drop-in for torchvision."""
    del app
    for node in doctree.findall(pending_xref):
        target = node.get("reftarget")
        if target in _AMBIGUOUS and node.get("py:module") != "focaldet.torchvision":
            node["reftarget"] = _HOMES[target]


_AMBIGUOUS = ("RetinaNet", "OptimizedRetinaNet", "DownloadError")


def _keep_colons(*event: Any) -> None:
    """Stop napoleon from reading what stands before a colon as a type: types are in signatures."""
    _, what, _, _, _, lines = event
    if what in ("attribute", "data", "property") and lines and ":" in lines[0]:
        lines[0] = f": {lines[0]}"
    for index, line in enumerate(lines[:-1]):
        if line.strip() == "Returns:":
            text = lines[index + 1].lstrip()
            lines[index + 1] = f"{' ' * (len(lines[index + 1]) - len(text))}: {text}"


def _skip_field_aliases(*event: Any) -> bool | None:
    """Leave out the members of a NamedTuple, whose docstrings say no more than their numbers."""
    _, _, _, member, _, _ = event
    return True if str(member.__doc__).startswith("Alias for field number") else None


class _BackboneTable(Directive):
    """The directive ``backbones``: the table of the backbones known by name, from the code."""

    def run(self) -> list[Any]:
        head = ("name", "channels of C3, C4, C5", "BatchNorm eps", "weights in torchvision.models")
        lines = [f"| {' | '.join(head)} |", "|---|---|---|---|"]
        for name, spec in BACKBONES.items():
            with torch.device("meta"):
                channels = ", ".join(map(str, build_backbone(name).channels))
            weights = f"`{spec.weights}`" if spec.weights else "none"
            lines.append(f"| `{name}` | {channels} | {spec.norm_eps:g} | {weights} |")
        node = Element()
        self.state.nested_parse(StringList(lines), self.content_offset, node)
        return node.children


def _unlink_builtin_list(_: Sphinx, doctree: Any) -> None:
    """Keep ``list`` in annotations from leading to ``focaldet.pretrained.list``."""
    for node in [*doctree.findall(pending_xref)]:
        if (node.get("reftype"), node.get("reftarget")) == ("class", "list"):
            node.replace_self(Text("list"))


def _mathml(formula: str, display: str) -> str:
    """Convert a formula to MathML, which browsers draw without scripts."""
    markup = latex_to_mathml(formula, display=display)
    # What latex2mathml does not know, it passes on as text: a command, or the & of an environment.
    if (unknown := re.search(r"\\[A-Za-z]+|>&<", html.unescape(markup))) is not None:
        raise ExtensionError(
            f"latex2mathml cannot convert {unknown[0].strip('<>')} in the formula {formula!r}. "
            "Write the formula differently."
        )
    # TeX separates a function such as log from what stands next to it; MathML Core leaves that to the author.
    names = "log|exp|max|min|ln"
    gap = '<mspace width="0.167em" />'
    markup = re.sub(rf"(<mi>(?:{names})</mi>)(?!<mo)", rf"\1{gap}", markup)
    markup = re.sub(rf"(</(?:mi|mn|msub|msup)>)(<mi>(?:{names})</mi>)", rf"\1{gap}\2", markup)
    # A name in upright letters is one identifier, not a product of letters.
    return re.sub(
        r'<mrow>((?:<mi mathvariant="normal">[A-Za-z]</mi>){2,})</mrow>',
        lambda match: f"<mi>{re.sub('<[^>]*>', '', match[1])}</mi>",
        markup,
    )


def _visit_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _visit_math_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    translator.body.append(f"{_mathml(node.astext(), 'block')}</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the hooks, the directive and the renderer of formulas."""
    app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_math_block, None))
    app.add_directive("backbones", _BackboneTable)
    app.connect("doctree-read", _unlink_builtin_list)
    app.connect("doctree-read", _qualify_ambiguous_names)
    app.connect("missing-reference", _resolve_short_name)
    app.connect("autodoc-process-docstring", _keep_colons, priority=400)  # napoleon's is 500
    app.connect("autodoc-skip-member", _skip_field_aliases)
