"""The rooms of the package: a module imports only from its own layer or from one below."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import bigram_circuits as bc

PACKAGE = Path(bc.__file__).parent
LAYERS = [
    {"reference.documents", "files", "checksums", "locks"},
    {"corpus", "ngrams", "sites", "gates", "metrics", "results", "markup"},
    {"models", "targets"},
    {"layouts"},
    {"subnetwork"},
    {"runs", "masking", "published", "sharing", "planted"},
    {"memory", "evaluation", "analysis.conditions", "analysis.tasks", "analysis.prompts", "analysis.parts"},
    {"analysis.comparisons", "analysis.affine", "analysis.overlap", "analysis.location", "analysis.attribution"},
    {
        "analysis.lens",
        "analysis.geometry",
        "analysis.passages",
        "analysis.faithful_tokens",
        "analysis.ablation",
        "analysis.sufficiency",
    },
    {"training"},
    {"analysis.trajectories", "analysis.suite"},
    {"paths", "falsification"},
    {"report.figures", "report.blocks"},
    {"report.document", "report.story", "report.compared"},
    {"report.page", "report.comparison"},
    {"cli", "reference.train"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
LIGHT = LAYERS[0] | LAYERS[1]  # no transformer_lens, no transformers, no model


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ("bigram_circuits", "bigram_circuits.analysis"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def modules() -> dict[str, set[str]]:
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): imports(path) for path in paths}


def test_every_module_has_a_layer():
    assert set(modules()) == set(LEVEL)


def test_arrows_only_go_down():
    for module, imported in modules().items():
        for name in imported:
            other = name.removeprefix("bigram_circuits.")
            if other in LEVEL:
                assert LEVEL[other] <= LEVEL[module], f"{module} imports {other}, which is above it"


def test_values_and_formulas_know_no_model_library():
    for module in LIGHT:
        for name in modules()[module]:
            assert not name.startswith(("transformer_lens", "transformers")), f"{module} imports {name}"


def test_importing_the_package_loads_nothing_heavy():
    started = time.monotonic()
    code = "import sys, bigram_circuits; print('torch' in sys.modules, 'transformer_lens' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
    assert time.monotonic() - started < 30  # generous: a crowded machine; what counts is that nothing was loaded


def test_the_table_of_contents_is_complete():
    for name in dir(bc):
        assert getattr(bc, name) is not None
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed - {"annotations", "import_module", "TYPE_CHECKING", "Any"} == set(bc._HOME_OF)
