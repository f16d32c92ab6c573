"""The promises of the house: a light import, documented modules, no pickle, pages that tell the truth."""

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import noisewise
from noisewise.cli import METHODS
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.results import Results, Row

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src" / "noisewise").rglob("*.py"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)


def loaded_by(statement: str, heavy: tuple[str, ...]) -> list[str]:
    """Which of the modules `heavy` a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*[name for name in {heavy!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_import_loads_no_torch():
    assert loaded_by("import noisewise; noisewise.__version__", ("torch", "numpy", "matplotlib")) == []


@pytest.mark.parametrize(
    "package",
    [
        "sampling",
        "targets",
        "metrics",
        "denoising",
        "diffusion",
        "energy",
        "networks",
        "neural",
        "retrieval",
        "sequence",
    ],
)
def test_package_init_imports_nothing_heavy(package):
    assert loaded_by(f"import noisewise.{package}", ("torch", "matplotlib", "ot", "sklearn", "arviz", "jax")) == []


@pytest.mark.parametrize(
    "package",
    [
        "",
        ".sampling",
        ".targets",
        ".metrics",
        ".denoising",
        ".diffusion",
        ".energy",
        ".networks",
        ".neural",
        ".sequence",
    ],
)
def test_every_public_name_exists(package):
    module = importlib.import_module(f"noisewise{package}")
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize(
    "package",
    [
        "sampling",
        "targets",
        "metrics",
        "denoising",
        "diffusion",
        "energy",
        "networks",
        "neural",
        "retrieval",
        "sequence",
    ],
)
def test_no_file_hides_the_public_name_that_it_holds(package):
    # importing the file a/b.py sets the attribute b of a to the module, over a lazy re-export of the same name
    module = importlib.import_module(f"noisewise.{package}")
    folder = ROOT / "src" / "noisewise" / package
    # listops is a module on purpose: a generator, its vocabulary and its rules
    for name in ({path.stem for path in folder.glob("*.py")} & set(module.__all__)) - {"listops"}:
        importlib.import_module(f"noisewise.{package}.{name}")
        assert not inspect.ismodule(getattr(module, name))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_module_has_docstring_and_names_its_public_parts(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no docstring"
    targets = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    names = {name.id for node in targets for name in ast.walk(node) if isinstance(name, ast.Name)}
    assert "__all__" in names, f"{path} has no __all__"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_nothing_is_pickled_or_drawn_from_the_global_generator(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.partition(".")[0] for name in imported} & {
                "pickle",
                "dill",
                "cloudpickle",
                "joblib",
                "shelve",
            }
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in {"torch.load", "torch.save", "eval", "exec", "np.random.seed", "random.seed"}, call
            if call in {"np.load", "numpy.load"}:
                assert "allow_pickle=False" in ast.unparse(node)
            if call in {"torch.randn", "torch.rand", "torch.randint", "torch.randperm", "torch.multinomial"}:
                assert {"generator", None} & {keyword.arg for keyword in node.keywords}, (
                    f"{ast.unparse(node)} has no generator"
                )


def test_no_file_speaks_of_the_machine_it_was_written_on():
    hosts = re.compile(r"/(?:work|opt|root|home)/|\bpypi\.org|files\.pythonhosted|download\.pytorch", re.IGNORECASE)
    checked = [
        *SOURCES,
        *PAGES,
        *(ROOT / name for name in ("Makefile", "constraints.txt", "pyproject.toml", "mkdocs.yml")),
    ]
    assert not [str(path) for path in checked if hosts.search(path.read_text(encoding="utf-8"))]


def test_changelog_citation_and_package_agree_on_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[([\d.]+)\]", changelog, re.MULTILINE).group(1) == noisewise.__version__
    assert f"version: {noisewise.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_constraints_pin_every_requirement_of_the_project():
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert pins["torch"] == "2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    names = {re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in wanted} - {"noisewise"}
    # the file says why
    names -= {"aeon"}
    assert names <= pins.keys()


def test_readme_table_shows_every_method_in_its_state():
    rows = re.findall(
        r"^\| ([^|]+) \| [^|]+ \| \**(ready|planned)\** \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert rows == [(method.name, method.state) for method in METHODS]


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            there = (page.parent / link).resolve()
            assert there.exists() or there == ROOT / "docs" / "results.md", f"{page.name} links to {link}"


def test_results_page_is_made_of_recorded_results_and_says_so_when_there_are_none(tmp_path):
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert "No run has been recorded" in hooks.results_page(tmp_path)
    row = Row("FittedDiGS", "two modes", 0, {"weight": Measurement(0.6875, se=0.015625, n=3)})
    results = Results("digs", "quick", "noisewise compare digs", [row])
    results.save(tmp_path / "quick" / "results.json")
    page = hooks.results_page(tmp_path)
    assert page.endswith(results.markdown() + "\n")
    assert "0.6875" in page or "0.688" in page
    assert "No run" not in page


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_examples_of_the_page_run_and_find_the_weight(page):
    blocks = python_blocks(ROOT / page)
    assert blocks
    space: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), space)
    # both pages show the two modes with weights .3 and .7; 4 standard errors of 4000 independent draws are .03
    weight = (space["draws"].positions[..., 0] > 0).double().mean().item()
    assert weight == pytest.approx(0.7, abs=0.05)
