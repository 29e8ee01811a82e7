"""Write what is installed: a bill of materials (CycloneDX 1.6, JSON), licences, and constraints with hashes.

`python scripts/bill_of_materials.py [--out FOLDER]` describes the packages of the environment that it runs in, from
their own metadata, and writes `sbom.cdx.json` and `licences.txt`. With `--report FILE`, the report of the `pip install`
that made the environment (`make` leaves it in `.venv/installed.json`), it also writes `constraints-hashed.txt`: every
package with its version and the SHA-256 of the file that it came from, for `pip install --require-hashes --requirement`
on a machine of the same kind. The same environment gives the same files.
"""

import argparse
import json
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "bigram-circuits"


def installed() -> dict[str, Distribution]:
    """Return the installed packages by normalised name; the first on the path counts, as it does for imports."""
    found: dict[str, Distribution] = {}
    for one in distributions():
        found.setdefault(canonicalize_name(one.metadata["Name"]), one)
    return dict(sorted(found.items()))


def licence(one: Distribution) -> str:
    """Return a package's licence, as it states it: an SPDX expression, its classifiers, or a short text."""
    if expression := one.metadata.get("License-Expression"):
        return expression
    classifiers = [line.rsplit(" :: ", 1)[1] for line in one.metadata.get_all("Classifier", ()) if "License ::" in line]
    stated = [line for line in classifiers if line != "OSI Approved"]
    text = " ".join((one.metadata.get("License") or "").split())
    return " or ".join(stated) or (text if 0 < len(text) <= 80 else "not stated")


def needs(one: Distribution, among: dict[str, Distribution]) -> list[str]:
    """Return the installed packages that a package requires here, without extras."""
    required = [Requirement(line) for line in one.requires or ()]
    wanted = [part for part in required if part.marker is None or part.marker.evaluate({"extra": ""})]
    return sorted({canonicalize_name(part.name) for part in wanted} & among.keys())


def reference(name: str, version: str) -> str:
    """Return a package's URL in the sense of the purl standard."""
    return f"pkg:pypi/{name}@{version}"


def hashes(report: Path) -> dict[str, tuple[str, str]]:
    """Return the version and SHA-256 of every file that pip installed from a package index, by normalised name.

    Raises:
        ValueError: If the report is not one of `pip install --report`.
    """
    try:
        installs = json.loads(report.read_text(encoding="utf-8"))["install"]
        return {
            canonicalize_name(one["metadata"]["name"]): (one["metadata"]["version"], digest)
            for one in installs
            if (digest := one["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256"))
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(report)!r} is no report of `pip install --report`: {error}") from error


def bill(found: dict[str, Distribution]) -> dict[str, Any]:
    """Describe the packages as a CycloneDX document."""
    ids = {name: reference(name, one.version) for name, one in found.items()}

    def component(name: str, one: Distribution) -> dict[str, Any]:
        kind = "application" if name == PROJECT else "library"
        stated = one.metadata.get("License-Expression")
        licences = [{"expression": stated}] if stated else [{"license": {"name": licence(one)}}]
        return {
            "type": kind, "bom-ref": ids[name], "name": name, "version": one.version, "purl": ids[name],
            "licenses": licences,
        }  # fmt: skip

    described = {name: component(name, one) for name, one in found.items()}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": described.get(PROJECT)} if PROJECT in described else {},
        "components": [one for name, one in described.items() if name != PROJECT],
        "dependencies": [
            {"ref": ids[name], "dependsOn": [ids[other] for other in needs(one, found)]} for name, one in found.items()
        ],
    }


def main(argv: list[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="where to write them (default: here)"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="what `pip install --report` wrote")
    arguments = parser.parse_args(argv)
    folder, pinned = arguments.out, hashes(arguments.report) if arguments.report else {}
    folder.mkdir(parents=True, exist_ok=True)
    found = installed()
    (folder / "sbom.cdx.json").write_text(json.dumps(bill(found), indent=2) + "\n", encoding="utf-8")
    lines = [f"{name} {one.version}: {licence(one)}" for name, one in found.items()]
    (folder / "licences.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    unstated = sum(line.endswith(": not stated") for line in lines)
    if pinned:
        rows = [f"{name}=={release} --hash=sha256:{digest}" for name, (release, digest) in sorted(pinned.items())]
        (folder / "constraints-hashed.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(found)} packages, {unstated} without a stated licence: {folder / 'sbom.cdx.json'}, licences.txt")


if __name__ == "__main__":
    main()
