"""Benchmarks, scripts and notebooks take nothing from the package that it does not have; `.ci/run` runs benchmarks."""

import ast
import json
import re
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import bigram_circuits as bc
from scripts import bill_of_materials

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "notebooks").glob("*.py")]
)


def taken(tree: ast.Module):
    """(module, name) of imports from the package and of attributes of `bc`, also in programs held in strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bigram_circuits"):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bc":
            yield "bigram_circuits", node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "import" in node.value:
            with suppress(SyntaxError):  # prose
                yield from taken(ast.parse(node.value))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_it_takes_is_there(path):
    for module, name in taken(ast.parse(path.read_text())):
        home = import_module(module)
        is_there = hasattr(home, name) or (hasattr(home, "__path__") and find_spec(f"{module}.{name}") is not None)
        assert is_there, f"{module} has no {name}"


def test_a_name_that_is_not_there_would_be_noticed():
    assert not hasattr(bc, "no_such_name")
    assert find_spec("bigram_circuits.no_such_module") is None
    assert list(taken(ast.parse("import bigram_circuits as bc\nbc.find\nfrom bigram_circuits.runs import Run"))) == [
        ("bigram_circuits.runs", "Run"),
        ("bigram_circuits", "find"),
    ]
    assert list(taken(ast.parse("run('from bigram_circuits.runs import Run')"))) == [("bigram_circuits.runs", "Run")]


def test_the_bill_of_materials_holds_what_is_installed(tmp_path):
    script = ROOT / "scripts" / "bill_of_materials.py"
    for out in ("a", "b"):
        subprocess.run(
            [sys.executable, str(script), "--out", str(tmp_path / out)], check=True, stdout=subprocess.DEVNULL
        )
    bill = json.loads((tmp_path / "a" / "sbom.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    versions = {one["name"]: one["version"] for one in bill["components"]}
    for name in ("torch", "numpy", "transformer-lens", "pytest"):
        assert versions[name] == version(name)
    assert all(one["licenses"] and one["purl"] == one["bom-ref"] for one in bill["components"])
    references = {one["bom-ref"] for one in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    needed = {one["ref"]: set(one["dependsOn"]) for one in bill["dependencies"]}
    assert needed.keys() == references
    assert set().union(*needed.values()) <= references
    assert f"pkg:pypi/torch@{version('torch')}" in needed[f"pkg:pypi/bigram-circuits@{version('bigram-circuits')}"]
    licences = (tmp_path / "a" / "licences.txt").read_text()
    assert len(licences.splitlines()) == len(references)
    assert re.search(r"^numpy \S+: .*BSD", licences, re.MULTILINE)
    for name in ("sbom.cdx.json", "licences.txt"):  # the same environment, the same bytes
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_constraints_with_hashes_are_what_pip_installed(tmp_path):
    def installed(name, **download):
        return {"metadata": {"name": name, "version": "1.0"}, "download_info": download}

    digest = "0123456789abcdef" * 4
    wheel = {"archive_info": {"hashes": {"sha256": digest}}}
    report = tmp_path / "installed.json"
    report.write_text(
        json.dumps({"install": [installed("Z_a", **wheel), installed("me", dir_info={"editable": True})]})
    )
    bill_of_materials.main(["--report", str(report), "--out", str(tmp_path)])
    assert (tmp_path / "constraints-hashed.txt").read_text() == f"z-a==1.0 --hash=sha256:{digest}\n"
    report.write_text("[]")
    with pytest.raises(ValueError, match="is no report of"):
        bill_of_materials.main(["--report", str(report), "--out", str(tmp_path)])
