"""What tokenizers of each kind put around a text, and how their tokens are shown."""

import copy
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

import bigram_circuits as bc
from bigram_circuits.analysis.prompts import prompt_tokens, token_id, token_words
from bigram_circuits.tasks.builtin import repeated_random_tokens
from bigram_circuits.text.corpus import token_array
from bigram_circuits.text.tokenizers import Template, shown_tokens, template_of
from tests.conftest import byte_tokenizer, save_tiny

STORIES260K = Path(__file__).parents[3] / "shared/models/stories260K"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DOCUMENTS = [f"{'a be ' * (3 + number % 5)}cd" for number in range(40)]


def wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def sentencepiece(*, with_bos: bool = True):
    """Like the tokenizer of Llama: a block for a space, one before the text, bytes for what has no token."""
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *LETTERS,
        "\u2581a",
        "\u2581be",
        "\n",
    ]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    merges = [("\u2581", "a"), ("\u2581b", "e"), ("\u2581", "b")]
    vocabulary["\u2581b"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if with_bos:  # as it was published
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return wrapped(tokenizer)


def wordpiece():
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "un", "##un", "##s", "s", "able", ".", *LETTERS[:4]]
    tokenizer = Tokenizer(models.WordPiece({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    return wrapped(tokenizer, **special)


def words():
    names = ["<unk>", "the", "cat", "sat"]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(tokenizer, unk_token="<unk>")


def end_of_word():
    names = ["<unk>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|odd|>"]
    tokenizer = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", end_of_word_suffix="</w>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return wrapped(tokenizer, unk_token="<unk>")


def byte_level():
    """With added tokens that look like others: two spaces as one token, a line end, and a symbol for one."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("  ", "\u23ce", "\u200b", "<0xE2>")])
    return tokenizer


KINDS = {
    "sentencepiece": sentencepiece,
    "wordpiece": wordpiece,
    "words": words,
    "end of word": end_of_word,
    "byte level": byte_level,
}


# --- tokens as words ---


@pytest.mark.parametrize("kind", KINDS)
def test_two_tokens_never_look_the_same_and_none_is_invisible(kind):
    tokenizer = KINDS[kind]()
    shown = shown_tokens(tokenizer, range(len(tokenizer) + 2))
    assert len(set(shown)) == len(shown)
    for word in shown:
        assert word
        assert all(character.isprintable() for character in word), ascii(word)
    assert shown[-1] == f"<{len(tokenizer) + 1}>"  # an embedding's row without a token


@pytest.mark.parametrize(
    ("kind", "text", "shown"),
    [
        ("sentencepiece", "a be\n\u00e9", [" a", " be", "\u23ce", "<0xC3>", "<0xA9>"]),
        ("wordpiece", "un uns able.", [" un", " un", "s", " able", " ."]),
        ("words", "the cat sat", [" the", " cat", " sat"]),
        ("end of word", "ab c", ["a", "b ", "c "]),
        ("byte level", "a b\n\x07\u00e9", ["a", " ", "b", "\u23ce", "\u2407", "<0xC3>", "<0xA9>"]),
    ],
)
def test_a_passage_reads_with_its_spaces(kind, text, shown):
    tokenizer = KINDS[kind]()
    assert shown_tokens(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]) == shown


def test_special_tokens_are_shown_by_name_and_tokens_that_are_added_later_too():
    tokenizer = sentencepiece()
    assert shown_tokens(tokenizer, [1, 2]) == ["<s>", "</s>"]
    tokenizer.add_tokens(["later on"])
    assert shown_tokens(tokenizer, [len(tokenizer) - 1]) == ["later on"]


def test_a_tokenizer_without_a_backend_is_read_by_its_names():
    class Slow:
        def __init__(self, names):
            self.names = names

        def __len__(self):
            return len(self.names)

        def get_vocab(self):
            return {name: index for index, name in enumerate(self.names)}

        def convert_ids_to_tokens(self, ids):
            return [self.names[index] for index in ids]

    assert shown_tokens(Slow(["\u2581the", "the", "<0x0A>"]), range(3)) == [" the", "the", "<0x0A>"]
    assert shown_tokens(Slow(["\u0120the", "the", "\u010a"]), range(3)) == [" the", "the", "\u23ce"]
    assert shown_tokens(Slow(["the", "##se"]), range(2)) == [" the", "se"]


def test_the_stories_model_shows_its_spaces():
    if not STORIES260K.is_dir():
        pytest.skip("the model stories260K is not beside this checkout")
    model = bc.load_model(STORIES260K, device="cpu")
    tokens = prompt_tokens(model, "Once upon a time")[0].tolist()
    assert "".join(token_words(model, tokens)) == "<s> Once upon a time"
    every = token_words(model, range(model.cfg.d_vocab))
    assert len(set(every)) == len(every)


# --- the tokens around a text ---


@pytest.mark.parametrize(
    ("kind", "template"),
    [
        ("sentencepiece", Template((1,), (), 1, 2)),
        ("wordpiece", Template((1,), (2,), None, None)),
        ("words", Template((), (), None, None)),
        ("byte level", Template((), (), 0, 0)),
    ],
)
def test_the_template_is_found_by_comparing_encodings(kind, template):
    assert template_of(KINDS[kind]()) == template


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama whose tokenizer puts a BOS before a text."""
    return hooked(tmp_path_factory.mktemp("llama"), sentencepiece())


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A tiny Llama whose tokenizer has no special tokens."""
    return hooked(tmp_path_factory.mktemp("bare"), sentencepiece(with_bos=False))


def hooked(folder, tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    save_tiny(folder, config)
    tokenizer.save_pretrained(folder)
    return bc.load_model(folder, device="cpu")


def corpus_of(tokenizer, **options):
    return bc.load_corpus(DOCUMENTS, **{"tokenizer": tokenizer, "context_length": 12, "held_out": 0.0} | options)


def test_where_the_tokenizer_puts_a_bos_every_document_is_encoded_as_it_does(llama):
    expected = [token for document in DOCUMENTS for token in sentencepiece()(document)["input_ids"]]
    corpus = corpus_of(llama.tokenizer, bos="document")
    assert corpus.train.reshape(-1).tolist() == expected[: corpus.train.size]
    assert "<s> at the start of every document" in repr(corpus)


def test_every_sequence_begins_with_the_bos_by_default_where_the_tokenizer_puts_one(llama):
    corpus = corpus_of(llama.tokenizer)
    assert corpus.fingerprint == corpus_of(llama.tokenizer, bos="sequence").fingerprint
    assert (corpus.train[:, 0] == 1).all()
    assert (corpus.train[:, 1] != 1).all()  # never two
    assert "<s> at the start of every sequence and document" in repr(corpus)
    plain = corpus_of(llama.tokenizer, bos="document").train.reshape(-1)
    body, expected = (
        [token for token in stream.tolist() if token != 1] for stream in (corpus.train.reshape(-1), plain)
    )
    assert len(body) > 300
    assert all(token == other for token, other in zip(body, expected, strict=False))
    assert 2 not in corpus.train  # no end of text that the tokenizer does not write


@pytest.mark.parametrize("length", [3, 5, 12, 64])
def test_a_bos_at_every_start_keeps_the_text_and_the_bound_on_tokens(llama, length):
    corpus = corpus_of(llama.tokenizer, context_length=length, max_tokens=200)
    assert (corpus.train[:, 0] == 1).all()
    assert corpus.train.size <= 200
    assert corpus.train.size > 200 - 2 * length - 200 // length


def test_without_bos_documents_are_separated_by_the_end_of_text(llama):
    plain = sentencepiece()
    expected = [t for document in DOCUMENTS for t in (2, *plain(document, add_special_tokens=False)["input_ids"])]
    corpus = corpus_of(llama.tokenizer, bos="none")
    assert corpus.train.reshape(-1).tolist() == expected[: corpus.train.size]
    assert corpus.fingerprint == corpus_of(llama.tokenizer, bos="earlier").fingerprint


def test_a_tokenizer_without_special_tokens_gets_no_separator(bare):
    plain = sentencepiece(with_bos=False)
    expected = [token for document in DOCUMENTS for token in plain(document, add_special_tokens=False)["input_ids"]]
    corpus = corpus_of(bare.tokenizer)
    assert corpus.train.reshape(-1).tolist() == expected[: corpus.train.size]
    assert "nothing between documents" in repr(corpus)
    assert corpus_of(bare.tokenizer, bos="earlier").train.max() >= len(plain)  # the token that hooking added
    with pytest.raises(ValueError, match="this tokenizer has no BOS token"):
        corpus_of(bare.tokenizer, bos="sequence")
    assert prompt_tokens(bare, "a be").tolist() == [plain("a be", add_special_tokens=False)["input_ids"]]
    assert repeated_random_tokens(bare, prompts=2, period=4).tokens.shape == (2, 8)


def test_a_bos_that_the_tokenizer_has_but_does_not_put_can_be_asked_for(tiny_model):
    assert template_of(tiny_model.tokenizer) == Template((), (), 0, 0)  # though hooking made it put one
    plain, asked = (corpus_of(tiny_model.tokenizer, bos=bos) for bos in (None, "sequence"))
    assert (asked.train[:, 0] == 0).all()
    assert plain.fingerprint == corpus_of(tiny_model.tokenizer, bos="earlier").fingerprint
    assert (
        plain.train.reshape(-1).tolist()[: 12 * 3] == corpus_of(byte_tokenizer()).train.reshape(-1).tolist()[: 12 * 3]
    )


def test_what_a_tokenizer_puts_at_the_end_is_kept(tmp_path):
    corpus = bc.load_corpus(["un uns"] * 9, tokenizer=wordpiece(), context_length=6, held_out=0.0)
    assert corpus.train[0].tolist() == [1, 4, 4, 6, 2, 1]
    assert "[SEP] at its end" in repr(corpus)


def test_a_prompt_begins_as_a_document_does(llama):
    expected = sentencepiece()("a be")["input_ids"]
    assert prompt_tokens(llama, "a be").tolist() == [expected]
    assert prompt_tokens(llama, "<s>a be")[0].tolist().count(1) == 1  # written already: not twice
    assert (repeated_random_tokens(llama, prompts=2, period=4).tokens[:, 0] == 1).all()


def test_a_token_is_found_by_text_or_as_it_is_shown(llama):
    names = sentencepiece().get_vocab()
    assert token_id(llama, "be") == token_id(llama, " be") == names["\u2581be"]
    assert token_id(llama, "<0xE9>") == names["<0xE9>"]
    assert token_id(llama, "<s>") == 1
    with pytest.raises(ValueError, match="'be be' is 2 tokens"):
        token_id(llama, "be be")


def test_a_copied_tokenizer_keeps_its_template(bare):
    assert template_of(copy.deepcopy(bare.tokenizer)) == Template((), (), None, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bos": "first"}, "bos must be one of sequence, document, none, earlier, not 'first'"),
        ({"context_length": 2}, "context_length must be at least 3, with the BOS, not 2"),
    ],
)
def test_a_wrong_choice_is_answered_in_one_line(llama, options, words):
    with pytest.raises(ValueError, match=words):
        corpus_of(llama.tokenizer, **options)


# --- padding ---


def test_padding_is_left_out_of_a_corpus():
    tokenizer = wordpiece()
    texts = ["un", "un uns able", "a b", "a"] * 5
    batch = tokenizer(texts, padding=True, return_tensors="np")
    assert (batch["input_ids"] == 0).any()
    expected = [token for text in texts for token in tokenizer(text)["input_ids"]]
    for tokens, mask in ((batch, None), (batch["input_ids"], (batch["attention_mask"],) * 2)):
        corpus = bc.Corpus.from_tokens(tokens, tokens, mask=mask)
        assert corpus.train.reshape(-1).tolist() == expected[: corpus.train.size]
        assert corpus.context_length == 6  # the longest text
    whole = np.ones((3, 4), np.int64)
    whole[:, 1] = 2
    assert np.array_equal(bc.Corpus.from_tokens(whole, whole, mask=(whole > 0, whole > 0)).train, whole)


def test_padding_without_a_mask_is_noticed():
    tokenizer = wordpiece()
    batch = tokenizer(["a", "un uns able un", "a b", "a"], padding=True, return_tensors="np")
    with pytest.warns(UserWarning, match=r"3 of 4 sequences end with two or more tokens 0: if they are padding"):
        bc.Corpus.from_tokens(batch["input_ids"], batch["input_ids"])
    with pytest.raises(ValueError, match="of these tokens are padding, which would count as text"):
        token_array(batch)


@pytest.mark.parametrize(
    ("tokens", "mask", "words"),
    [
        ([[1, 2], [3]], None, "rows have different lengths: pad them, and give the mask"),
        ([[1, 2], [3, 4]], [[1, 1]], r"a mask is int64 \(1, 2\) but should be 0 or 1"),
        ([[1, 2], [3, 4]], [[1, 2], [0, 1]], "should be 0 or 1"),
        ({"labels": [[1]]}, None, r"the fields \['labels'\], but 'input_ids' is needed"),
    ],
)
def test_a_mask_that_does_not_fit_is_answered_in_one_line(tokens, mask, words):
    with pytest.raises(ValueError, match=words) as caught:
        bc.Corpus.from_tokens(tokens, [[1, 2], [3, 4]], mask=None if mask is None else (mask, None))
    assert "\n" not in str(caught.value)
