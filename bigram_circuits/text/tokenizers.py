"""What a tokenizer does of itself: the tokens that it puts around a text, and how each of its tokens is shown."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

BOS = ("sequence", "document", "none", "earlier")
"""Where a BOS may be put: at the start of every sequence and document, of every document, or nowhere; and what version
0.1.0 did: nowhere, but with a separator also where the tokenizer has none."""
_PROBES = ("a", "The", "1")  # texts to find a tokenizer's template with
_OWN = "_own_template"  # attribute of a tokenizer that was changed after it was loaded


# --- the tokens around a text ---


@dataclass(frozen=True)
class Template:
    """The special tokens of a tokenizer, as it was published."""

    before: tuple[int, ...]
    """Ids that it puts before a text: its BOS; empty for most tokenizers of byte-level models."""
    after: tuple[int, ...]
    """Ids that it puts after a text."""
    bos: int | None
    """Id of its BOS token, whether it puts it anywhere or not."""
    eos: int | None
    """Id of its end-of-text token."""

    @property
    def separator(self) -> tuple[int, ...]:
        """What separates documents where nothing is put before them: the end-of-text token, or else the BOS."""
        found = self.eos if self.eos is not None else self.bos
        return () if found is None else (found,)

    @property
    def ids(self) -> set[int]:
        """All of them."""
        return {found for found in (*self.before, *self.after, self.bos, self.eos) if found is not None}

    @property
    def start(self) -> tuple[int, ...]:
        """What a document starts with: the BOS that the tokenizer puts there itself, or else the separator."""
        return self.before or self.separator


def template_of(tokenizer: Any) -> Template:
    """The special tokens that a Hugging Face tokenizer puts around a text, found by encoding one with and without them.

    A hooked model's tokenizer has been changed: it puts a BOS wherever there is one, and a vocabulary without an
    end-of-text token is given one. For a model from `load_model`, this is the template from before that change.
    """
    return getattr(tokenizer, _OWN, None) or _found_template(tokenizer)


def remember_template(tokenizer: Any, template: Template) -> None:
    """Note on a tokenizer the template that it had before it was changed."""
    setattr(tokenizer, _OWN, template)


def _found_template(tokenizer: Any) -> Template:
    before, after = (), ()
    for probe in _PROBES:
        plain, whole = (tokenizer(probe, add_special_tokens=add)["input_ids"] for add in (False, True))
        places = [place for place in range(len(whole) - len(plain) + 1) if whole[place : place + len(plain)] == plain]
        if plain and places:
            before, after = tuple(whole[: places[0]]), tuple(whole[places[0] + len(plain) :])
            break
    return Template(before, after, tokenizer.bos_token_id, tokenizer.eos_token_id)


# --- tokens as words ---

_SHOWN: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()  # the words of whole vocabularies
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PIECE = re.compile(r"<0x[89A-F][0-9A-F]>")  # in a word: a byte that is not ASCII, and not part of a whole character
_WORDS_TRIED, _WORDS_SHOWN, _WORD_LENGTH = 1_000, 3, 20  # of an example of what a tokenizer has no tokens for
_PICTURES = {"\n": "\u23ce", "\t": "\u21e5"} | {
    chr(code): chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"
}
_PICTURES["\x7f"] = "\u2421"
_UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}  # Unicode categories without a glyph of their own


def shown_tokens(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Tokens as readable strings, two different tokens never as the same.

    A token has the space that it stands for in a text, whether the tokenizer writes it as a byte, as a lower block, or
    as the absence of `##`. Line ends, tabs and control characters are symbols, other invisible characters
    their code point (`<U+200B>`), and bytes that are not a character on their own are hexadecimal (`<0xE2>`). Where two
    tokens would still look the same, all but the first have their id after them.

    Args:
        tokenizer: A Hugging Face tokenizer.
        ids: Token ids; one that the tokenizer does not have is shown as `<id>`.
    """
    words = _words(tokenizer)
    return [words[index] if 0 <= index < len(words) else f"<{index}>" for index in ids]


def unknown_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer writes for what it has no tokens for; None if it has none of its own.

    Many tokenizers that can write any text name their end-of-text token as the unknown one, and never write it.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    return None if unknown in template_of(tokenizer).ids else unknown


def pieces_of_characters(tokenizer: Any) -> set[int]:
    """The tokens that are bytes which are no character on their own, where they stand in for a text's own tokens.

    A tokenizer with tokens for every byte can write any text, but one of another script only byte by byte. Where bytes
    are all that a vocabulary has, they stand in for nothing, and the set is empty.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    words = {index: word for index, word in enumerate(_words(tokenizer)) if index not in added}
    pieces = {index for index, word in words.items() if _PIECE.search(word)}
    return pieces if any(len(word) > 1 for index, word in words.items() if index not in pieces) else set()


def joined_pieces(tokenizer: Any, ids: Iterable[int]) -> str:
    """Tokens as text in which bytes are put together to characters again; what is left of broken ones is dropped."""
    shown = "".join(shown_tokens(tokenizer, ids)).encode()
    return re.sub(rb"<0x([0-9A-F]{2})>", lambda byte: bytes.fromhex(byte[1].decode()), shown).decode("utf-8", "ignore")


def words_without_token(tokenizer: Any, text: str) -> tuple[str, ...]:
    """The first words of a text, between spaces, that a tokenizer writes with its unknown token: at most three."""
    found: list[str] = []
    for word in itertools.islice(dict.fromkeys(text.split()), _WORDS_TRIED):
        if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False)["input_ids"]:
            found.append(word[:_WORD_LENGTH])
        if len(found) == _WORDS_SHOWN:
            break
    return tuple(found)


def _words(tokenizer: Any) -> list[str]:
    """The words of the whole vocabulary, by id."""
    try:
        found = _SHOWN.get(tokenizer)
    except TypeError:  # not hashable
        return _all_words(tokenizer)
    size = len(tokenizer)
    if found is None or len(found) < size:  # tokens may have been added since
        found = _SHOWN[tokenizer] = _all_words(tokenizer)
    return found


def _all_words(tokenizer: Any) -> list[str]:
    size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    names = tokenizer.convert_ids_to_tokens(list(range(size)))
    added = {index: str(token) for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    text = _reader(tokenizer, [name for index, name in enumerate(names) if name is not None and index not in added])
    words, taken = [], set()
    for index, name in enumerate(names):
        word = f"<{index}>" if name is None else (_visible(added[index]) if index in added else text(name))
        word = word or f"<{index}>"
        while word in taken:
            word = f"{word}<{index}>"
        taken.add(word)
        words.append(word)
    return words


def _reader(tokenizer: Any, names: Sequence[str]) -> Callable[[str], str]:
    """How the names in a vocabulary are read, by the parts of the tokenizer, or else by the names themselves."""
    parts, model = _parts(tokenizer)
    if "ByteLevel" in parts or (not parts and _looks_byte_level(names)):
        return _from_bytes
    if "Metaspace" in parts or "\u2581" in parts or (not parts and any(name[:1] == "\u2581" for name in names)):
        return _from_metaspace
    if "WordLevel" in parts:
        return lambda name: _visible(f" {name}")
    prefix = getattr(model, "continuing_subword_prefix", None) or ("##" if model is None else None)
    if prefix and any(name.startswith(prefix) for name in names):
        return lambda name: _visible(name[len(prefix) :] if name.startswith(prefix) and name != prefix else f" {name}")
    suffix = getattr(model, "end_of_word_suffix", None) or ("</w>" if model is None else None)
    if suffix and any(name.endswith(suffix) for name in names):
        return lambda name: _visible(f"{name[: -len(suffix)]} " if name.endswith(suffix) else name)
    return _visible


def _parts(tokenizer: Any) -> tuple[set[str], Any]:
    """The kinds of a fast tokenizer's steps, with the block that it writes for a space, and its model."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set(), None
    found = {type(backend.model).__name__}
    waiting = [json.loads(step.__getstate__()) for step in (backend.decoder, backend.pre_tokenizer) if step is not None]
    if backend.normalizer is not None:
        waiting.append(json.loads(backend.normalizer.__getstate__()))
    while waiting:
        step = waiting.pop()
        found.add(step.get("type", ""))
        if step.get("type") == "Replace" and "\u2581" in (step.get("content"), step.get("pattern", {}).get("String")):
            found.add("\u2581")
        waiting += [one for key in ("decoders", "pretokenizers", "normalizers") for one in step.get(key, ())]
    return found, backend.model


def _looks_byte_level(names: Sequence[str]) -> bool:
    alphabet = _byte_of().keys()
    return any("\u0120" in name for name in names) and all(alphabet >= set(name) for name in names)


@cache
def _byte_of() -> dict[str, int]:
    """Character -> byte of byte-level tokenizers: printable ones are themselves, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _from_bytes(name: str) -> str:
    byte_of = _byte_of()
    if not all(character in byte_of for character in name):
        return _visible(name)
    data = bytes(byte_of[character] for character in name)
    return _visible(data.decode("utf-8", "surrogateescape"))


def _from_metaspace(name: str) -> str:
    return name if _BYTE.fullmatch(name) else _visible(name.replace("\u2581", " "))


def _visible(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_glyph, text))


@cache
def _glyph(character: str) -> str:
    if character == " ":
        return character
    if character in _PICTURES:
        return _PICTURES[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"<0x{code - 0xDC00:02X}>"
    if unicodedata.category(character) in _UNSEEN or 0xFE00 <= code <= 0xFE0F:
        return f"<U+{code:04X}>"
    return character
