"""Build hook of the site: writes results.md out of the recorded results, so that no figure is ever typed by hand."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

__all__ = ["on_files", "results_page"]

_HEAD = """# Results

This page is generated, at every build of the site, from the `results.json` files that `noisewise compare` writes; no
figure in it is typed by hand. A value stands with its standard error and its floor: what perfect samples of the same
size would score.
"""

_NOTHING_RECORDED = """
No run has been recorded yet, so there is nothing to show. A run of your own: `noisewise compare digs --scale quick`
takes about a minute and writes `results.json` and `report.html`.
"""


def results_page(folder: Path) -> str:
    """The page's Markdown: the tables of every `folder/*/results.json`, or a plain word that none is recorded."""
    recorded = sorted(folder.glob("*/results.json"))
    if not recorded:
        return _HEAD + _NOTHING_RECORDED
    from noisewise.metrics.results import Results

    return "\n".join([_HEAD, *(Results.load(path).markdown() for path in recorded)]) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated page to the site's files; called by MkDocs."""
    content = results_page(Path(config.docs_dir) / "results")
    files.append(File.generated(config, "results.md", content=content))
    return files
