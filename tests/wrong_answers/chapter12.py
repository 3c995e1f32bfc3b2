"""What readers of chapter 12 plausibly write: (exercise, what is wrong with it, code)."""

_ASK = (
    "def ask(z, y, W_q, W_k, W_v, heads):\n"
    "    q, k, v = z @ W_q.T, y @ W_k.T, y @ W_v.T\n"
    "    found = []\n"
    "    for a, b, c in zip(*(x.chunk(heads, dim=-1) for x in (q, k, v))):\n"
    "        scores = a @ b.T / a.shape[-1] ** 0.5\n"
    "        found.append(scores.softmax(-1) @ c)\n"
    "    return torch.cat(found, dim=-1)"
)
_MASKED = (
    "def masked(scores, keep):\n"
    "    scores = scores.masked_fill(~keep[:, None], float('-inf'))\n"
    "    return scores.softmax(-1)"
)
_LIES = (
    "def lies_on(maps, word, mask):\n"
    "    looks = maps[..., word].mean(0)\n"
    "    return (looks * mask).sum() / looks.sum() / mask.mean()"
)
_ROWS = (
    "def word_rows(pieces):\n"
    "    found, mine = [], []\n"
    "    for row, piece in enumerate(pieces, start=1):\n"
    "        mine.append(row)\n"
    "        if piece.endswith('</w>'):\n"
    "            found.append(mine)\n"
    "            mine = []\n"
    "    return found"
)

WRONG = [
    ("12.1", "the root of the whole width", _ASK.replace("a.shape[-1]", "z.shape[-1]")),
    ("12.1", "no root", _ASK.replace(" / a.shape[-1] ** 0.5", "")),
    ("12.1", "the words ask, the places answer", _ASK.replace("softmax(-1) @ c", "softmax(0) @ c")),
    ("12.1", "values from the keys", _ASK.replace("y @ W_v.T", "y @ W_k.T")),
    ("12.1", "one head for all", _ASK.replace("chunk(heads", "chunk(1")),
    (
        "12.2",
        "zero after the softmax",
        "def masked(scores, keep):\n    return scores.softmax(-1) * keep[:, None]",
    ),
    ("12.2", "a score of zero", _MASKED.replace("float('-inf')", "0.0")),
    ("12.2", "the other way round", _MASKED.replace("~keep", "keep")),
    ("12.2", "over the places", _MASKED.replace("softmax(-1)", "softmax(-2)")),
    (
        "12.2",
        "in place",
        _MASKED.replace("scores = scores.masked_fill", "scores.masked_fill_"),
    ),
    ("12.3", "the share, not the ratio", _LIES.replace(" / mask.mean()", "")),
    ("12.3", "the mean weight on the thing", _LIES.replace(" / looks.sum() / mask.mean()",
                                                            " / mask.sum()")),
    ("12.3", "one head only", _LIES.replace(".mean(0)", "[0]")),
    ("12.3", "half-covered places do not count",
     _LIES.replace("looks * mask", "looks * (mask == 1)")),
    ("12.4", "the start is forgotten", _ROWS.replace("start=1", "start=0")),
    ("12.4", "a row a word", "def word_rows(pieces):\n"
     "    words = ''.join(pieces).split('</w>')[:-1]\n"
     "    return [[i] for i in range(1, len(words) + 1)]"),
    ("12.4", "a row a piece", "def word_rows(pieces):\n"
     "    return [[i] for i in range(1, len(pieces) + 1)]"),
]  # fmt: skip
