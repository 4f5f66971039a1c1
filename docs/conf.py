"""The site: `make docs`."""

from importlib.metadata import version as version_of
from pathlib import Path

from sphinx.application import Sphinx

project = "lightning-curvature"
author = copyright = "The lightning-curvature project"
version = release = version_of("lightning-curvature")
# README's links are whole, so that they hold on PyPI too; on the site they lead from page to page.
REPOSITORY = "https://github.com/lightning-curvature/lightning-curvature"
URLS = (f"{REPOSITORY}/blob/main/docs/", f"{REPOSITORY.replace('github', 'raw.githubusercontent')}/main/docs/")

extensions = ["myst_parser", *(f"sphinx.ext.{name}" for name in ("autodoc", "autosummary", "mathjax", "napoleon"))]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = "lightning-curvature"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "navigation_with_keys": True,
}
html_show_sphinx = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False
toc_object_entries_show_parents = "hide"


def _lead_from_page_to_page(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    for url in URLS:
        content[0] = content[0].replace(url, "")
    content[0] = content[0].replace("](docs/", "](")


def setup(app: Sphinx) -> None:
    """Register the change of links in included pages."""
    app.connect("include-read", _lead_from_page_to_page)
