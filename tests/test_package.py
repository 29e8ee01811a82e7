"""What is shipped: wheel and source distribution hold what they must, no more; the version is the same everywhere."""

import graphlib
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import grimp
import pytest
import yaml

import bigram_circuits as bc

ROOT = Path(__file__).parents[1]
PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "bigram_circuits").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
CONFIGURATION = [ROOT / ".pre-commit-config.yaml", *sorted((ROOT / ".github").rglob("*.yml"))]


def loaded(path):
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the source distribution, and the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as file:
        yield file


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    info = f"bigram_circuits-{bc.__version__}.dist-info"
    about = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert set(wheel.namelist()) == PACKAGE | about
    assert "bigram_circuits/py.typed" in PACKAGE
    assert "bigram_circuits/models/reference/model.safetensors" in PACKAGE
    assert "bigram-circuits = bigram_circuits.cli:run" in wheel.read(f"{info}/entry_points.txt").decode()


def test_the_metadata_say_where_the_project_is(wheel):
    text = wheel.read(f"bigram_circuits-{bc.__version__}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert metadata["Name"] == "bigram-circuits"
    assert metadata["Version"] == bc.__version__
    assert metadata["License-Expression"] == "MIT"
    urls = dict(value.split(", ") for value in metadata.get_all("Project-URL", []))
    assert set(urls) == {"Homepage", "Documentation", "Issues", "Changelog"}
    assert loaded(ROOT / "CITATION.cff")["repository-code"] == urls["Homepage"]
    assert urls["Homepage"] in (ROOT / "CHANGELOG.md").read_text()


def test_the_source_distribution_holds_what_the_wheel_is_made_from(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    beside = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}
    assert names == PACKAGE | beside


def test_the_version_is_the_same_everywhere():
    citation = loaded(ROOT / "CITATION.cff")
    assert str(citation["version"]) == bc.__version__
    assert citation["license"] == "MIT"
    assert f"## [{bc.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", CONFIGURATION, ids=lambda path: path.name)
def test_configuration_is_yaml(path):
    assert isinstance(loaded(path), dict)


def test_a_release_waits_for_all_other_jobs_and_for_a_tag():
    jobs = loaded(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    release = jobs["release"]
    assert set(release["needs"]) == set(jobs) - {"release"}
    assert release["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert release["permissions"] == {"id-token": "write"}


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_forms_have_a_name_and_fields(name):
    form = loaded(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    assert all(field["type"] in {"markdown", "textarea"} for field in form["body"])
    ids = [field["id"] for field in form["body"] if "id" in field]
    assert len(ids) == len(set(ids)) >= 3


def test_no_module_imports_itself_by_way_of_others():
    """Such a circle fails for whoever happens to import its other end first."""
    graph = grimp.build_graph("bigram_circuits", exclude_type_checking_imports=True, cache_dir=None)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert list(graphlib.TopologicalSorter(imported).static_order())  # raises a CycleError


def test_no_file_holds_the_marks_of_an_unfinished_merge():
    marks = re.compile(r"^(<{7} |>{7} )", re.MULTILINE)
    kinds = {".css", ".html", ".js", ".json", ".md", ".py", ".toml", ".txt", ".yml"}
    folders = [ROOT / name for name in ("benchmarks", "bigram_circuits", "docs", "notebooks", "scripts", "tests")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in kinds and path.is_file()]
    files += [path for path in ROOT.iterdir() if path.suffix in kinds]
    assert len(files) > 100
    assert [path.name for path in files if marks.search(path.read_text(errors="replace"))] == []
