import itertools
import json

import numpy as np
import pytest

import bigram_circuits as bc
from bigram_circuits.measures.statistics import mean_over_log_size


@pytest.fixture(scope="module")
def task(random_tokens):
    corpus = bc.Corpus.from_tokens(np.tile(random_tokens, (4, 1)), random_tokens)
    return corpus, bc.count_ngrams(corpus.train, 2, d_vocab=257)


CONFIG = bc.SparsifyConfig(max_steps=25, batch_size=8, learning_rate=0.1, beta_growth=1.2, retries=0)


def test_a_path_is_nested_and_measured_and_saved(tiny_model, task, tmp_path):
    corpus, target = task
    path = bc.find_path(tiny_model, target, corpus, CONFIG, [5.0, 0.0, 1.0], run_dir=tmp_path / "path")
    subnetworks = [found.subnetwork for found in path.found]
    assert [found.config.sparsity_weight for found in path.found] == [0.0, 1.0, 5.0]
    for larger, smaller in itertools.pairwise(subnetworks):
        assert (smaller - larger).kept == 0
        assert smaller.kept < larger.kept
    for subnetwork, measured in zip(subnetworks, path.measured, strict=True):
        alone = bc.evaluate(tiny_model, subnetwork, target, corpus.held_out, controls=False).subnetwork
        assert measured == alone
    saved = json.loads((tmp_path / "path" / "path.json").read_text())
    assert [point["kept"] for point in saved["points"]] == [subnetwork.kept for subnetwork in subnetworks]
    assert saved["points"][0]["faithfulness"] == pytest.approx(1 - path.measured[0].kl / path.empty.kl)
    assert bc.load_run(tmp_path / "path" / "weight-5").subnetwork == subnetworks[2]
    assert f"{path.cpr:.3f}" in str(path)
    assert list(path.to_dataframe().index) == [0.0, 1.0, 5.0]
    if max(path.faithfulness) <= 1:
        assert path.cpr + path.cmd == pytest.approx(1)


def test_the_mean_over_log_size_is_an_area():
    sizes = np.array([0.1, 0.001, 0.01])
    assert mean_over_log_size(sizes, np.array([1.0, 1.0, 1.0])) == pytest.approx(1)
    # heights 0, 1/2, 1 at equal distances on the log axis
    assert mean_over_log_size(sizes, np.array([1.0, 0.0, 0.5])) == pytest.approx(0.5)
    assert mean_over_log_size(np.array([0.01, 0.1, 1.0]), np.array([0.0, 0.0, 1.0])) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="at least two different sizes above 0"):
        mean_over_log_size(np.array([0.1, 0.1]), np.array([1.0, 1.0]))


def test_paths_that_make_no_sense_are_refused(tiny_model, task):
    corpus, target = task
    with pytest.raises(ValueError, match="at least two different sparsity weights"):
        bc.find_path(tiny_model, target, corpus, CONFIG, [1.0, 1.0])
    with pytest.raises(ValueError, match="leave out target_fraction"):
        bc.find_path(tiny_model, target, corpus, bc.SparsifyConfig(target_fraction=0.1), [1.0, 2.0])
