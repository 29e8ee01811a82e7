"""Fuzz the reader of pickled masks, guided by the coverage of its code: `python benchmarks/fuzz_pickles.py`.

For each input: the reader refuses it with a one-line ValueError, or gives what Python's own unpickler gives (one that
makes nothing but boolean arrays), within a second and without more memory than the file explains. Needs Atheris
(`pip install atheris`), which is not installed with this project; `--smoke` only tries the seeds, without it.
"""

import argparse
import io
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

READER = "bigram_circuits.storage.pickles"
ALLOWED = {"ndarray", "dtype", "_reconstruct", "_frombuffer", "encode"}


def seeds() -> list[bytes]:
    """Files of masks in every protocol."""
    rng = np.random.default_rng(0)
    arrays = {
        "h.0.weight": rng.random((3, 4)) < 0.5,
        "h.1.weight": np.asfortranarray(rng.random((4, 3)) < 0.5),
        "h.2.weight": (rng.random((2, 3, 4)) < 0.5).transpose(1, 0, 2),
    }
    arrays["again"] = arrays["h.0.weight"]
    contents = [arrays, {"orig_model_name": "some/model", "w": np.ones(2, bool)}, {}]
    return [pickle.dumps(content, protocol) for content in contents for protocol in (2, 3, 4, 5)]


class Trusted(pickle.Unpickler):
    """Python's own unpickler, for the names that the reader knows."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for."""
        if name not in ALLOWED:
            raise AssertionError(f"the reader accepted a file that refers to {module}.{name}")
        return super().find_class(module, name)


def check(data: bytes, path: Path, read: Any, outcomes: Counter[str]) -> None:
    """Raise AssertionError, or what the reader should not raise, if the reader does wrong with these bytes."""
    path.write_bytes(data)
    started = time.process_time()
    try:
        found, said = read(path, most=1 << 20), ""
    except ValueError as error:
        found, said = None, str(error)
    assert time.process_time() - started < 1
    if found is None:
        outcomes["refused"] += 1
        assert "\n" not in said, said
        assert len(said) < 1000, said
        return
    outcomes["read"] += 1
    trusted = Trusted(io.BytesIO(data)).load()
    assert type(trusted) is dict, trusted
    assert list(found) == list(trusted), (found, trusted)
    for name, value in found.items():
        same = trusted[name]
        if isinstance(value, np.ndarray):
            outcomes["arrays"] += 1
            assert isinstance(same, np.ndarray), (name, same)
            assert (value.dtype, value.shape) == (same.dtype, same.shape), name
            assert value.tobytes() == same.tobytes(), name
        elif isinstance(value, str | int | bytes | bytearray):
            assert type(value) is type(same), name
            assert value == same, name


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, help="folder that keeps what was found, to go on from")
    parser.add_argument("--smoke", action="store_true", help="only try the seeds")
    arguments = parser.parse_args(argv)
    outcomes: Counter[str] = Counter()
    atheris = None if arguments.smoke else import_module("atheris")
    with nullcontext() if atheris is None else atheris.instrument_imports(include=[READER]):
        read = import_module(READER).read_boolean_arrays
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.pickle"
        if atheris is None:
            for data in seeds():
                check(data, path, read, outcomes)
                check(data[:-7], path, read, outcomes)
            print(f"{outcomes['read']} files read, {outcomes['refused']} refused")
            return
        corpus = arguments.corpus or Path(folder) / "corpus"
        corpus.mkdir(exist_ok=True, parents=True)
        for number, data in enumerate(seeds()):
            (corpus / f"seed-{number}").write_bytes(data)
        words = [
            b"numpy\ndtype\n",
            b"numpy\nndarray\n",
            b"numpy._core.multiarray\n_reconstruct\n",
            b"\x95\0\0\0\0\0\0\0\0",
        ]
        words += [b"numpy._core.numeric\n_frombuffer\n", b"_codecs\nencode\n", b"latin1", b"\x89\x88\x87R"]
        escaped = ["".join(f"\\x{byte:02x}" for byte in word) for word in words]
        (Path(folder) / "words").write_text("".join(f'"{word}"\n' for word in escaped))
        options = [
            f"-max_total_time={arguments.seconds}",
            f"-dict={folder}/words",
            "-max_len=2048",
            "-rss_limit_mb=1500",
        ]
        atheris.Setup(
            [sys.argv[0], *options, "-timeout=5", "-print_final_stats=1", str(corpus)],
            lambda data: check(data, path, read, outcomes),
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
