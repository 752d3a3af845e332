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
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _cut(digits: str) -> pre_tokenizers.PreTokenizer:
    """The rule of Llama 3 and Qwen 2, which differ in how many digits may stand together."""
    rule = Regex(f"{_CONTRACTIONS}|{_WORDS}|{digits}|{_REST}")
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(rule, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


_RULES = {
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
    "llama-bpe": _cut(r"\p{N}{1,3}"),
    "qwen2": _cut(r"\p{N}"),
    "gpt-2": _BYTE_LEVEL,
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
        if self.model not in ("gpt2", "llama") or (self.model == "gpt2" and self.pre not in _RULES):
            raise ValueError(
                f"its tokenizer is of kind {self.model!r}, {self.pre!r}; supported are llama (SentencePiece), and gpt2 "
                f"with {', '.join(_RULES)}"
            )
        pieces, count = self.model == "llama", len(self.tokens)
        for holds, otherwise in (
            (
                len(self.token_type) == count == len(set(self.tokens)),
                "tokens and token_type are not one of each for every token",
            ),
            (pieces or self.merges is not None, "merges are missing"),
            (not pieces or len(self.scores or ()) == count, "scores are not one for every token"),
            (
                not pieces or _UNKNOWN in self.token_type,
                "no token is of the unknown type, as in SentencePiece one is",
            ),
        ):
            if not holds:
                raise ValueError(otherwise)

    def of_type(self, kind: int) -> list[str]:
        return [token for token, its in zip(self.tokens, self.token_type, strict=True) if its == kind]


def _ends(given: GgufTokenizer) -> dict[str, int]:
    """The tokens that are added to a text, "bos" before and "eos" after it, by number."""
    pieces = given.model == "llama"
    begins = (pieces or given.pre == "llama-bpe") if given.add_bos_token is None else given.add_bos_token
    found = {}
    for name, wanted, told, usual in (
        ("bos", begins, given.bos_token_id, 1),
        ("eos", given.add_eos_token, given.eos_token_id, 2),
    ):
        number = usual if told is None and pieces else told
        if wanted:
            if number is None or not 0 <= number < len(given.tokens):
                raise ValueError(
                    f"tokenizer: {name} is added to a text, but {name}_token_id = {number} is not a token's number; "
                    "copy the file again."
                )
            found[name] = number
    return found


def _byte_pairs(given: GgufTokenizer) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(given.tokens)}
    merges = [(first, second) for first, _, second in (merge.partition(" ") for merge in given.merges or [])]
    for merge in merges:
        if not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ValueError(
                f"tokenizer: merges {merge[0]!r} and {merge[1]!r}, which are not all tokens; copy it again."
            )
    # Llama 3 keeps a word that is a token whole, whatever the merges.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=given.pre == "llama-bpe"))
    if given.pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _RULES[given.pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_pieces(given: GgufTokenizer) -> Tokenizer:
    """SentencePiece merges, at each step, the neighbours whose joint piece has the largest score."""
    vocabulary = {token: number for number, token in enumerate(given.tokens)}
    scores = dict(zip(given.tokens, given.scores or [], strict=True))
    pieces = given.of_type(_NORMAL)
    known = set(pieces)
    found = sorted(
        (-scores[piece], -cut, piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(first, second) for _, _, first, second in found],
            unk_token=given.of_type(_UNKNOWN)[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    first = [normalizers.Prepend("▁")] if given.add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if given.add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def tokenizer_of(given: GgufTokenizer) -> Tokenizer:
    """The tokenizer. Raises ValueError for merges, pieces or ends that do not fit together."""
    ends = _ends(given)
    tokenizer = _sentence_pieces(given) if given.model == "llama" else _byte_pairs(given)
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in given.of_type(_CONTROL)])
    tokenizer.add_tokens([AddedToken(x, special=False, normalized=False) for x in given.of_type(_USER_DEFINED)])
    if ends:
        names = {end: given.tokens[number] for end, number in ends.items()}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in (names.get("bos"), "$A", names.get("eos")) if part],
            special_tokens=[(names[end], number) for end, number in ends.items()],
        )
    return tokenizer
