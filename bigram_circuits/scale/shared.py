"""What the runs of a sweep share: tokenised texts and count tables, each made once and read by all.

The first that needs one makes it while it holds a lock; the others wait for it and map it into memory. Models need
nothing like this: huggingface_hub downloads a file once, under a lock of its own. A worker also keeps the last model,
text and target, so that runs with the same ones, which come one after another, load nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from bigram_circuits.models.model import Model
from bigram_circuits.recipe import Inputs
from bigram_circuits.storage.files import checked_json, damaged, read_checked_json, whole_folder, write_text
from bigram_circuits.storage.typed import Record
from bigram_circuits.targets.base import Target
from bigram_circuits.text.corpus import Corpus, Named, fingerprint_of, hash_of_tokenizer
from bigram_circuits.text.ngrams import NGramTable
from bigram_circuits.workflow import Subjects, corpus_of, load_named, subjects_of_task, target_named

_REMEDY = "remove its folder, and the same command makes it again"


@dataclass(frozen=True)
class StoredText(Record):
    """What a `Corpus` holds besides its arrays, but for the files that were read."""

    source: str
    documents: tuple[int, int]
    fingerprint: str
    tokenizer_hash: str
    starts: str
    named: Named | None
    without_token: tuple[str, ...]
    sample: str


class Shared:
    """The store of a sweep, and the model, text and target that were used last."""

    def __init__(self, folder: Path, device: str | None = None) -> None:
        self._folder = folder
        self._device = device
        self._last: dict[str, tuple[Any, Any]] = {}  # what for -> (what it was asked for, what it is)

    def subjects(self, inputs: Inputs) -> Subjects:
        """Model, text and target of a run.

        Raises:
            ValueError: If they do not fit together, or a file of the store is damaged.
            OSError: If something cannot be loaded.
        """
        of_model, of_text, of_target = keys_of(inputs)
        model = self._kept("model", of_model, lambda: load_named(inputs, self._device))
        if inputs.task is not None:
            return self._kept("target", of_target, lambda: subjects_of_task(inputs, model))
        corpus = self._kept("text", of_text, lambda: self.corpus(inputs, model))
        target = self._kept("target", of_target, lambda: self.target(inputs, model, corpus))
        return Subjects(model, corpus, target, inputs)

    def _kept(self, what: str, asked: Any, make: Any) -> Any:
        """What was made last, if it was asked for the same; otherwise it is freed first."""
        if what not in self._last or self._last[what][0] != asked:
            for kind in {"model": ("model", "text", "target"), "text": ("text", "target")}.get(what, (what,)):
                self._last.pop(kind, None)
            self._last[what] = asked, make()
        return self._last[what][1]

    def is_loaded(self, inputs: Inputs) -> int:
        """How much of a run's model, text and target is loaded: 0 to 3."""
        wanted = zip(("model", "text", "target"), keys_of(inputs), strict=True)
        return sum(what in self._last and self._last[what][0] == asked for what, asked in wanted)

    # --- the store ---

    def corpus(self, inputs: Inputs, model: Model) -> Corpus:
        """The text of a run, tokenised for its model."""
        place = self._folder / f"text-{_key(_text(inputs), _tokenizer(model, inputs))}"
        with self._alone(place):
            if not place.is_dir():
                _write_corpus(place, corpus_of(inputs, inputs.corpus, model))
        return _read_corpus(place)

    def target(self, inputs: Inputs, model: Model, corpus: Corpus) -> Target | NGramTable:
        """The target of a run; a table of counts is stored."""
        kind = inputs.kind_of_target
        if kind.kind != NGramTable.kind or inputs.index is not None:
            return target_named(inputs, model, corpus)
        asked = _key(corpus.fingerprint, inputs.target, inputs.order, model.cfg.d_vocab)
        place = self._folder / f"table-{asked}.safetensors"
        with self._alone(place):
            if not place.is_file():
                kind.make(model, corpus, inputs.order).save(place)
        return NGramTable.load(place)

    @contextmanager
    def _alone(self, place: Path) -> Iterator[None]:
        """Within the block, no other process makes the same; waits until none does."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            yield


def keys_of(inputs: Inputs) -> tuple[Any, Any, Any]:
    """What model, text and target of a run depend on: runs for which it is the same can share them."""
    model = (inputs.model, inputs.revision, inputs.dtype, inputs.unchecked)
    text = (*model, inputs.corpus, inputs.task, inputs.context_length, inputs.max_tokens, inputs.text_column)
    text += (inputs.share_held_out, inputs.bos)
    return model, text, (*text, inputs.target, inputs.order, inputs.index, inputs.measure)


def _write_corpus(place: Path, corpus: Corpus) -> None:
    with whole_folder(place) as fresh:
        np.save(fresh / "train.npy", corpus.train)
        np.save(fresh / "held_out.npy", corpus.held_out)
        rest = {name: getattr(corpus, name) for name in StoredText.__annotations__}
        write_text(fresh / "text.json", checked_json(StoredText(**rest).to_json()), guard=False)


def _read_corpus(place: Path) -> Corpus:
    with damaged(place / "text.json", _REMEDY):
        rest = StoredText.from_json(read_checked_json(place / "text.json", _REMEDY))
    with damaged(place, _REMEDY):
        train, held_out = (
            np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("train", "held_out")
        )
        if fingerprint_of(train, held_out) != rest.fingerprint:
            raise ValueError("its tokens are not those that were written")
    return Corpus(train, held_out, **{name: getattr(rest, name) for name in StoredText.__annotations__})


def _key(*asked: Any) -> str:
    return hashlib.blake2b(json.dumps(asked).encode(), digest_size=12).hexdigest()


def _text(inputs: Inputs) -> list[Any]:
    """What determines a text before it is tokenised; of files, when each was changed last."""
    asked = [inputs.corpus, inputs.context_length, inputs.max_tokens, inputs.share_held_out, inputs.text_column]
    path = Path(inputs.corpus)
    if inputs.corpus == "reference" or not path.exists():
        return asked
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    return [*asked, [(str(one), (status := one.stat()).st_size, status.st_mtime_ns) for one in files]]


def _tokenizer(model: Model, inputs: Inputs) -> list[Any]:
    """What determines how a text is tokenised, and how many tokens a sequence can have."""
    tokenizer: Any = model.tokenizer
    fast = getattr(tokenizer, "backend_tokenizer", None)
    how = fast.to_str() if fast is not None else [inputs.model, inputs.revision]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return [type(tokenizer).__name__, hash_of_tokenizer(tokenizer), how, special, inputs.bos, model.cfg.n_ctx, os.name]
