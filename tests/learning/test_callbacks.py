"""Callbacks see every step and the end, and change nothing; the ready-made ones write real logs."""

import json
import time

import numpy as np
import pytest

import bigram_circuits as bc
from tests.conftest import D_VOCAB

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (16, 16))
CORPUS = bc.Corpus.from_tokens(TEXT, TEXT[:4])
TARGET = bc.count_ngrams(TEXT, 2, d_vocab=D_VOCAB)
RECIPE = bc.SparsifyConfig(max_steps=5, batch_size=4, retries=0)


class Watcher:
    def __init__(self):
        self.records, self.ends = [], []

    def on_step(self, record):
        self.records.append(record)

    def on_end(self, found):
        self.ends.append(found)


def test_they_see_every_step_and_the_end_and_change_nothing(tiny_model, tmp_path):
    plain = bc.find_subnetwork(tiny_model, TARGET, CORPUS, RECIPE)
    one, other = Watcher(), Watcher()
    found = bc.find_subnetwork(tiny_model, TARGET, CORPUS, RECIPE, run_dir=tmp_path, callbacks=[one, other])
    assert one.records == other.records == found.history == plain.history
    assert [end is found for end in one.ends] == [True]
    assert found.subnetwork == plain.subnetwork
    again = Watcher()
    bc.find_subnetwork(tiny_model, TARGET, CORPUS, RECIPE, run_dir=tmp_path, callbacks=[again])
    assert (again.records, again.ends) == ([], [])  # it was found before


def test_a_run_that_goes_on_tells_the_steps_that_are_done_now(tiny_model, tmp_path):
    class Stops(Watcher):
        def on_step(self, record):
            super().on_step(record)
            if record.step == 2:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        bc.find_subnetwork(tiny_model, TARGET, CORPUS, RECIPE, run_dir=tmp_path, callbacks=[Stops()])
    watcher = Watcher()
    found = bc.find_subnetwork(tiny_model, TARGET, CORPUS, RECIPE, run_dir=tmp_path, callbacks=[watcher])
    assert watcher.records == found.history
    assert found.subnetwork == bc.find_subnetwork(tiny_model, TARGET, CORPUS, RECIPE).subnetwork


def test_an_object_that_is_no_callback_is_refused(tiny_model):
    with pytest.raises(ValueError, match="a callback needs the methods on_step and on_end; str lacks one"):
        bc.find_subnetwork(tiny_model, TARGET, CORPUS, RECIPE, callbacks=["print"])


@pytest.mark.filterwarnings("ignore")  # of tensorboard's own dependencies
def test_tensorboard_holds_the_numbers_of_every_step(tiny_model, tmp_path):
    found = bc.find_subnetwork(tiny_model, TARGET, CORPUS, RECIPE, callbacks=[bc.TensorBoard(tmp_path)])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    curve = events.Scalars("attempt 0/cross_entropy")
    assert [point.step for point in curve] == [record.step for record in found.history]
    np.testing.assert_allclose([point.value for point in curve], [r.cross_entropy for r in found.history], rtol=1e-6)
    assert "attempt 0/step" not in events.Tags()["scalars"]


BLOCK, HEADER = 1 << 15, 7  # bytes of a block of the log format of LevelDB, and of a header in it


def wandb_records(file):
    """The records of an offline file: that of wandb begins with 7 bytes, then goes on as a log of LevelDB does."""
    data, at, whole = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # the whole of a record, or its last part
            yield whole
            whole = b""


def read_wandb(file):
    """What an offline file of wandb holds: the rows that were logged, and the summary."""
    from wandb.proto.wandb_internal_pb2 import Record

    logged, summary = [], {}
    for data in wandb_records(file):
        record = Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            logged.append({one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in items})
        for one in record.summary.update:
            summary[one.key or "/".join(one.nested_key)] = json.loads(one.value_json)
    return logged, summary


@pytest.mark.filterwarnings("ignore")  # of wandb's own dependencies
def test_wandb_writes_its_files_offline(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    callback = bc.WandB(project="circuits", mode="offline", dir=str(tmp_path))
    found = bc.find_subnetwork(tiny_model, TARGET, CORPUS, RECIPE, callbacks=[callback])
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 60  # its service may still be writing
    while "kept" not in (read := read_wandb(file))[1] and time.monotonic() < deadline:
        time.sleep(0.2)
    logged, summary = read
    assert [row["step"] for row in logged] == [record.step for record in found.history]
    assert [row["attempt 0/cross_entropy"] for row in logged] == [record.cross_entropy for record in found.history]
    assert summary["kept"] == found.subnetwork.kept
