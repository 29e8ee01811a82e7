import copy
import json
import pickle
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import tokengrams
import torch

import bigram_circuits as bc
from bigram_circuits.cli import main
from bigram_circuits.recipe import Request
from bigram_circuits.text import indexes
from tests.conftest import UNFIT_INPUTS

D_VOCAB = 300


@pytest.fixture(scope="module")
def stream():
    """Tokens of a corpus: repetitive, so that contexts of any length occur again."""
    draw = np.random.default_rng(0)
    words = [draw.integers(0, D_VOCAB, 7) for _ in range(60)]
    return np.concatenate([words[i] for i in draw.integers(0, 60, 500)]).astype(np.uint16)


@pytest.fixture(scope="module")
def texts(stream):
    """Batches: text of the corpus, and tokens of which it holds no pair."""
    text = torch.from_numpy(stream[:240].astype(np.int64)).view(8, 30)
    return text, torch.randint(0, D_VOCAB, (4, 20), generator=torch.Generator().manual_seed(0))


def write_tokengrams(tokens, path, width="<u2", vocab=D_VOCAB):
    tokens.astype(width).tofile(path.with_suffix(".bin"))
    tokengrams.MemmapIndex.build(str(path.with_suffix(".bin")), str(path.with_suffix(".idx")), vocab=vocab)
    return path.with_suffix(".idx")


def write_infini_gram(documents, folder):
    """A folder as `infini_gram.indexing` writes it, by sorting all suffixes in Python."""
    folder.mkdir()
    data = b"".join(b"\xff\xff" + one.astype("<u2").tobytes() for one in documents)
    starts = np.cumsum([0, *(2 + 2 * len(one) for one in documents[:-1])])
    (folder / "tokenized.0").write_bytes(data)
    starts.astype("<u8").tofile(folder / "offset.0")
    width = int(np.ceil(np.log2(len(data)) / 8))
    ordered = sorted(range(0, len(data), 2), key=lambda at: data[at:])
    (folder / "table.0").write_bytes(b"".join(at.to_bytes(width, "little") for at in ordered))
    return folder


def assert_same(target, expected, tokens):
    """That a target has the numbers of dense log-probabilities, [batch, pos, d_vocab]."""
    logits = torch.randn(*tokens.shape, D_VOCAB, generator=torch.Generator().manual_seed(1), requires_grad=True)
    probs, log_q = expected.exp(), logits.log_softmax(-1)
    torch.testing.assert_close(target.log_probs(tokens), expected.float(), atol=1e-6, rtol=1e-6)
    dense = -(probs * log_q).sum(-1)
    torch.testing.assert_close(target.cross_entropy(logits, tokens), dense.float(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(target.entropy(tokens), torch.special.entr(probs).sum(-1).float(), atol=1e-6, rtol=1e-6)
    following = expected[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(target.surprisal(tokens), -following.float(), atol=1e-6, rtol=1e-6)
    assert torch.equal(target.top1(tokens), expected.argmax(-1))
    ours, theirs = (torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (
        target.cross_entropy(logits, tokens), dense))  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def by_counting(documents, order, tokens):
    """log P(next | longest context of up to `order - 1` tokens that was seen before a token), by plain dictionaries."""
    after = {}
    for one in documents:
        one = one.tolist()
        for at in range(len(one)):
            for length in range(min(order - 1, at) + 1):
                after.setdefault(tuple(one[at - length : at]), Counter())[one[at]] += 1
    rows = torch.zeros(*tokens.shape, D_VOCAB, dtype=torch.float64)
    for i, row in enumerate(tokens.tolist()):
        for end in range(1, len(row) + 1):
            context = tuple(row[max(0, end - order + 1) : end]) if order > 1 else ()
            while context not in after:
                context = context[1:]
            for token, count in after[context].items():
                rows[i, end - 1, token] = count / after[context].total()
    return rows.log()


@pytest.mark.parametrize("order", [1, 2, 3, 9])
def test_an_index_of_tokengrams_gives_what_plain_counting_gives(stream, texts, tmp_path, order):
    target = bc.IndexTarget(write_tokengrams(stream, tmp_path / "all"), d_vocab=D_VOCAB, order=order)
    for tokens in texts:
        assert_same(target, by_counting([stream], order, tokens), tokens)
    if order > 3:
        return
    table = bc.count_ngrams(stream[None].astype(np.int32), order, d_vocab=D_VOCAB)
    for tokens in texts:
        assert torch.equal(target.log_probs(tokens), table.log_probs(tokens))
        assert torch.equal(target.entropy(tokens), table.entropy(tokens))


def test_frequent_and_rare_contexts_are_counted_in_two_ways_with_the_same_result(stream, texts, tmp_path, monkeypatch):
    path = write_tokengrams(stream, tmp_path / "all")
    expected = by_counting([stream], 3, texts[0])
    for share in (1, 10_000):  # occurrences are listed; counts of all tokens are asked for
        monkeypatch.setattr(indexes, "_DENSE_COSTS", share)
        assert_same(bc.IndexTarget(path, d_vocab=D_VOCAB, order=3), expected, texts[0])


def test_a_folder_of_several_indexes_is_their_sum(stream, texts, tmp_path):
    parts = stream[:1500], stream[1500:]
    for number, part in enumerate(parts):
        write_tokengrams(part, tmp_path / f"part{number}")
    target = bc.IndexTarget(tmp_path, d_vocab=D_VOCAB, order=3)
    assert_same(target, by_counting(parts, 3, texts[0]), texts[0])


@pytest.mark.parametrize("order", [1, 2, 4])
def test_an_infini_gram_index_gives_the_same_within_documents(stream, texts, tmp_path, order):
    documents = np.split(stream, [70, 71, 1500])
    target = bc.IndexTarget(write_infini_gram(documents, tmp_path / "index"), d_vocab=D_VOCAB, order=order)
    for tokens in texts:
        expected = by_counting(documents, order, tokens)
        if order > 1:  # a context that only ever ends a document was seen before no token, and is not one
            assert not (target.log_probs(tokens).exp().sum(-1) - 1).abs().gt(1e-5).any()
        assert_same(target, expected, tokens)


@pytest.fixture
def service(stream):
    """A service as infini-gram's, which counts the stream; `service.answer` can be replaced."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(asked)
            body = json.dumps(server.answer(asked)).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    def answer(asked):
        query, tokens = asked["query_ids"], stream.tolist()
        n = len(query)
        found = Counter(tokens[at + n] for at in range(len(tokens) - n) if tokens[at : at + n] == query)
        by_token = {str(token): {"cont_cnt": count, "prob": 0.0} for token, count in found.items()}
        return {"prompt_cnt": found.total(), "result_by_token_id": by_token, "approx": False}

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answer, server.url = [], answer, f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_service_is_asked_for_each_context_once(stream, texts, service):
    target = bc.IndexTarget("infini-gram:some_index", d_vocab=D_VOCAB, order=2, address=service.url)
    tokens = texts[0][:2]
    assert_same(target, by_counting([stream], 2, tokens), tokens)
    assert {one["index"] for one in service.asked} == {"some_index"}
    assert len(service.asked) == len(set(tokens.flatten().tolist()))
    assert_same(target, by_counting([stream], 2, tokens[:1]), tokens[:1])  # in another batch
    assert len(service.asked) == len(set(tokens.flatten().tolist()))


def test_what_a_service_does_not_count_exactly_is_refused(texts, service):
    target = bc.IndexTarget("infini-gram:some_index", d_vocab=D_VOCAB, address=service.url)
    for answer, message in (
        ({"error": "no such index"}, "refused to look up .*no such index"),
        ({"prompt_cnt": 9, "result_by_token_id": {"1": {"cont_cnt": 9}}, "approx": True}, "no exact counts"),
        ({"prompt_cnt": 9, "result_by_token_id": {"1": {"cont_cnt": 8}}, "approx": False}, "no exact counts"),
        ({"count": 3}, "without counts"),
        ([], "not an object"),
    ):
        service.answer = lambda asked, answer=answer: answer
        with pytest.raises(ValueError, match=message):
            target.log_probs(texts[0])
    nobody = bc.IndexTarget("infini-gram:some_index", d_vocab=D_VOCAB, address="http://127.0.0.1:1/")
    with pytest.raises(OSError, match="could not be asked"):
        nobody.log_probs(texts[0])


def test_rows_are_kept_within_a_limit_and_fetched_again(stream, texts, tmp_path):
    path = write_tokengrams(stream, tmp_path / "all")
    target, scarce = (bc.IndexTarget(path, d_vocab=D_VOCAB, order=3, cache_bytes=n) for n in (1 << 30, 1))
    for tokens in (*texts, texts[0]):
        assert torch.equal(scarce.log_probs(tokens), target.log_probs(tokens))
        assert torch.equal(target.log_probs(tokens.int()), target.log_probs(tokens))


def test_copies_open_the_index_again(stream, texts, tmp_path):
    target = bc.IndexTarget(write_tokengrams(stream, tmp_path / "all"), d_vocab=D_VOCAB, order=3)
    for again in (copy.deepcopy(target), pickle.loads(pickle.dumps(target))):
        assert again.fingerprint == target.fingerprint
        assert torch.equal(again.log_probs(texts[0]), target.log_probs(texts[0]))


def test_the_fingerprint_is_of_the_contents(stream, tmp_path):
    prints = set()
    for name, tokens in (("a", stream), ("b", stream), ("c", stream[::-1])):
        path = write_tokengrams(tokens, tmp_path / name)
        prints |= {bc.IndexTarget(path, d_vocab=D_VOCAB, order=order).fingerprint for order in (2, 3)}
    assert len(prints) == 4


def test_wrong_indexes_are_refused_in_one_line(stream, texts, tmp_path):
    path = write_tokengrams(stream, tmp_path / "all")
    (tmp_path / "empty").mkdir()
    cases = {
        "there is no index": lambda: bc.IndexTarget(tmp_path / "none.idx", d_vocab=D_VOCAB),
        "is no index": lambda: bc.IndexTarget(tmp_path / "empty", d_vocab=D_VOCAB),
        "order must be": lambda: bc.IndexTarget(path, d_vocab=D_VOCAB, order=0),
        "name of an index is missing": lambda: bc.IndexTarget("infini-gram:", d_vocab=D_VOCAB),
        "the suffix array of all.bin": lambda: bc.IndexTarget(path, d_vocab=70_000),
        "outside the vocabulary of 20 ": lambda: bc.IndexTarget(path, d_vocab=20).log_probs(texts[0][:1] % 20),
        "read over a vocabulary": lambda: bc.IndexTarget(path, d_vocab=20).log_probs(texts[0]),
    }
    for message, make in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            make()
        assert "\n" not in str(caught.value)
    infini_gram = write_infini_gram([stream], tmp_path / "index")
    (infini_gram / "table.0").write_bytes(b"123")
    with pytest.raises(ValueError, match="do not fit"):
        bc.IndexTarget(infini_gram, d_vocab=D_VOCAB)


def test_large_ids_are_read_too(tmp_path, stream):
    large = stream.astype(np.int64) * 300
    path = write_tokengrams(large, tmp_path / "large", "<u4", D_VOCAB * 300)
    target = bc.IndexTarget(path, d_vocab=D_VOCAB * 300, order=3)
    table = bc.count_ngrams(large[None], 3, d_vocab=D_VOCAB * 300)
    tokens = torch.from_numpy(large[:60]).view(4, 15)
    assert torch.equal(target.surprisal(tokens), table.surprisal(tokens))


@UNFIT_INPUTS
def test_a_run_on_an_index_is_found_and_opened_again(tiny_folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    assert (
        Request.of(index="infini-gram:x", order=5).command() == "bigram-circuits find --order 5 --index infini-gram:x"
    )
    with pytest.raises(ValueError, match="an index holds n-grams"):
        Request.of(index="some.idx", target="model")
    with pytest.raises(ValueError, match="1, 2 or 3"):
        Request.of(order=4)
    texts = [json.dumps({"text": f"{word} of the king and the queen " * 9}) for word in "abcdefgh"]
    (tmp_path / "text.jsonl").write_text("\n".join(texts))
    model = bc.load_model(tiny_folders["gpt2"])
    options = {"context_length": 32, "held_out": 0.3}
    corpus = bc.load_corpus(tmp_path / "text.jsonl", tokenizer=model.tokenizer, **options)
    path = write_tokengrams(corpus.train.ravel(), tmp_path / "text", vocab=model.cfg.d_vocab)
    own = [str(tiny_folders["gpt2"]), "--corpus", "text.jsonl", "--context-length", "32", "--held-out", "0.3"]
    own += ["--max-steps", "2", "--no-analysis", "--batch-size", "2", "--random-seeds", "1"]
    assert main(["find", "--index", "text.idx", "--order", "4", *own, "--out", str(folder)]) == 0
    run = bc.load_run(folder)
    assert (run.rebuild.index, run.rebuild.order, run.rebuild.target) == (str(path), 4, "ngram")
    assert run.settings.target.kind == "IndexTarget"
    assert main(["evaluate", str(folder), "--random-seeds", "1"]) == 0
    assert "4-gram" in (folder / "report.html").read_text()
    path.with_suffix(".bin").rename(tmp_path / "moved.bin")
    path.rename(tmp_path / "moved.idx")
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--random-seeds", "1"]) == 1
    assert "no longer there: say with --index INDEX" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "--random-seeds", "1", "--index", str(tmp_path / "moved.idx")]) == 0
