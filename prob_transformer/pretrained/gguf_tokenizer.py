"""Tokenizers of GGUF files, rebuilt from their vocabularies: byte-level ones of four kinds, and SentencePiece.

A GGUF file holds tokens, merges or scores, and the name of the rule that cuts a text before the merges apply. Rules are
those of the models' own tokenizers: smollm, llama-bpe (Llama 3), qwen2, gpt-2; SentencePiece needs none. What is added
at the ends of a text follows the file's fields, with the defaults of llama.cpp.
"""

import msgspec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_NORMAL = 1

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cut(digits: str) -> pre_tokenizers.PreTokenizer:
    """The rule of Llama 3 and Qwen 2, which differ in how many digits may stand together."""
    rule = Regex(f"{_CONTRACTIONS}|{_WORDS}|{digits}|{_REST}")
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(rule, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


_RULES = {
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": lambda: _cut(r"\p{N}{1,3}"),
    "qwen2": lambda: _cut(r"\p{N}"),
    "gpt-2": _byte_level,
}


class GgufTokenizer(msgspec.Struct):
    """The fields `tokenizer.ggml.*` that say how a text is cut."""

    model: str
    tokens: list[str]
    token_type: list[int]
    pre: str = "default"
    merges: list[str] | None = None
    scores: list[float] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool = False
    add_space_prefix: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        kinds = ", ".join(_RULES)
        if self.model not in ("gpt2", "llama") or (self.model == "gpt2" and self.pre not in _RULES):
            raise ValueError(
                f"its tokenizer is of kind {self.model!r}, {self.pre!r}; supported are llama (SentencePiece), and gpt2 "
                f"with {kinds}"
            )
        if len(self.token_type) != len(self.tokens) or len(set(self.tokens)) != len(self.tokens):
            raise ValueError("tokens and token_type are not one of each for every token")
        if self.model == "gpt2" and self.merges is None:
            raise ValueError("merges are missing")
        if self.model == "llama" and (self.scores is None or len(self.scores) != len(self.tokens)):
            raise ValueError("scores are not one for every token")
        if self.model == "llama" and _UNKNOWN not in self.token_type:
            raise ValueError("no token is of the unknown type, as in SentencePiece one is")
        self.added()

    def added(self) -> dict[str, int]:
        """The tokens that are added to a text, "bos" before and "eos" after it, by number."""
        pieces = self.model == "llama"
        begins = (pieces or self.pre == "llama-bpe") if self.add_bos_token is None else self.add_bos_token
        found = {}
        for name, wanted, number, usual in (
            ("bos", begins, self.bos_token_id, 1),
            ("eos", self.add_eos_token, self.eos_token_id, 2),
        ):
            if not wanted:
                continue
            if number is None and pieces:
                number = usual
            if number is None or not 0 <= number < len(self.tokens):
                raise ValueError(f"{name} is added to a text, but {name}_token_id = {number} is not a token's number")
            found[name] = number
        return found

    def of_type(self, kind: int) -> list[str]:
        return [token for token, its in zip(self.tokens, self.token_type, strict=True) if its == kind]


def _byte_pairs(given: GgufTokenizer) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(given.tokens)}
    merges = [(first, second) for first, _, second in (merge.partition(" ") for merge in given.merges or [])]
    for merge in merges:
        if not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ValueError(
                f"tokenizer: merges {merge[0]!r} and {merge[1]!r}, which are not all tokens; copy it again."
            )
    # Llama 3 keeps a word that is a token whole, whatever the merges.
    whole = given.pre == "llama-bpe"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole))
    if given.pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _RULES[given.pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_pieces(given: GgufTokenizer) -> Tokenizer:
    """SentencePiece merges, at each step, the neighbours whose joint piece has the largest score."""
    vocabulary = {token: number for number, token in enumerate(given.tokens)}
    pieces = {
        token: score
        for token, score, kind in zip(given.tokens, given.scores or [], given.token_type, strict=True)
        if kind == _NORMAL
    }
    found = []
    for piece, score in pieces.items():
        parts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        found += [(-score, -len(a), a, b) for a, b in parts if a in pieces and b in pieces]
    merges = [(first, second) for _, _, first, second in sorted(found)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token=given.of_type(_UNKNOWN)[0], fuse_unk=True, byte_fallback=True
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    first = [normalizers.Prepend("▁")] if given.add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if given.add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def tokenizer_of(given: GgufTokenizer) -> Tokenizer:
    """The tokenizer. Raises ValueError for merges or pieces that do not fit together."""
    tokenizer = _sentence_pieces(given) if given.model == "llama" else _byte_pairs(given)
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in given.of_type(_CONTROL)])
    tokenizer.add_tokens([AddedToken(x, special=False, normalized=False) for x in given.of_type(_USER_DEFINED)])
    names = {name: given.tokens[number] for name, number in given.added().items()}
    if names:
        template = [names.get("bos"), "$A", names.get("eos")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in template if part], special_tokens=[(names[k], n) for k, n in given.added().items()]
        )
    return tokenizer
