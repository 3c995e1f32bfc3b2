"""What readers of chapter 5 plausibly write: (exercise, what is wrong with it, code)."""

_BACK = (
    "def look_back(q, k, v):\n"
    "    scores = q @ k.T / q.shape[1] ** 0.5\n"
    "    later = torch.ones_like(scores, dtype=torch.bool).triu(1)\n"
    "    return scores.masked_fill(later, float('-inf')).softmax(1) @ v"
)
_LOSS = (
    "def clip_loss(pictures, words, temperature):\n"
    "    pictures = pictures / pictures.norm(dim=1, keepdim=True)\n"
    "    words = words / words.norm(dim=1, keepdim=True)\n"
    "    logits = pictures @ words.T / temperature\n"
    "    here = torch.arange(len(logits))\n"
    "    cross_entropy = torch.nn.functional.cross_entropy\n"
    "    return (cross_entropy(logits, here) + cross_entropy(logits.T, here)) / 2"
)
_ANSWERS = (
    "def answers(pictures, wordings):\n"
    "    unit = wordings / wordings.norm(dim=2, keepdim=True)\n"
    "    classes = unit.mean(1)\n"
    "    classes = classes / classes.norm(dim=1, keepdim=True)\n"
    "    return (pictures @ classes.T).argmax(1)"
)
_CLOSER = (
    "def closer(words, pictures, share):\n"
    "    way = pictures.mean(0) - words.mean(0)\n"
    "    words, pictures = words + share / 2 * way, pictures - share / 2 * way\n"
    "    return words / words.norm(dim=1, keepdim=True),"
    " pictures / pictures.norm(dim=1, keepdim=True)"
)

WRONG = [
    ("5.1", "no mask", _BACK.replace(".masked_fill(later, float('-inf'))", "")),
    ("5.1", "the token itself is hidden too", _BACK.replace("triu(1)", "triu(0)")),
    ("5.1", "it looks ahead", _BACK.replace("triu(1)", "tril(-1)")),
    ("5.1", "zero instead of minus infinity", _BACK.replace("float('-inf')", "0.0")),
    ("5.1", "no square root", _BACK.replace(" ** 0.5", "")),
    ("5.1", "softmax over the wrong side", _BACK.replace("softmax(1)", "softmax(0)")),
    (
        "5.2",
        "one way only",
        _LOSS.replace(
            "(cross_entropy(logits, here) + cross_entropy(logits.T, here)) / 2",
            "cross_entropy(logits, here)",
        ),
    ),
    ("5.2", "a sum of both", _LOSS.replace(") / 2", ")")),
    ("5.2", "times the temperature", _LOSS.replace("/ temperature", "* temperature")),
    ("5.2", "lengths are kept", _LOSS.replace(" / words.norm(dim=1, keepdim=True)", "")),
    (
        "5.3",
        "long wordings count more",
        _ANSWERS.replace(" / wordings.norm(dim=2, keepdim=True)", ""),
    ),
    (
        "5.3",
        "the mean is left short",
        _ANSWERS.replace("    classes = classes / classes.norm(dim=1, keepdim=True)\n", ""),
    ),
    ("5.3", "the first wording only", _ANSWERS.replace("unit.mean(1)", "unit[:, 0]")),
    ("5.3", "the similarities themselves", _ANSWERS.replace(".argmax(1)", "")),
    (
        "5.4",
        "away from each other",
        _CLOSER.replace("words + share", "words - share").replace(
            "pictures - share", "pictures + share"
        ),
    ),
    ("5.4", "each goes the whole way", _CLOSER.replace("share / 2", "share")),
    ("5.4", "only the words move", _CLOSER.replace("pictures - share / 2 * way", "pictures")),
    (
        "5.4",
        "length 1 is forgotten",
        "def closer(words, pictures, share):\n"
        "    way = pictures.mean(0) - words.mean(0)\n"
        "    return words + share / 2 * way, pictures - share / 2 * way",
    ),
]
