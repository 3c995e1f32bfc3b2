"""What readers of chapter 16 plausibly write: (exercise, what is wrong with it, code)."""

_CHANGE = (
    "def change_words(first, then, timesteps, k):\n"
    "    def denoise(x, t):\n"
    "        late = k < len(timesteps) and t[0] <= timesteps[k]\n"
    "        return (then if late else first)(x, t)\n"
    "    return denoise"
)
_MORE = (
    "def more_than_chance(answers):\n"
    "    same, other = [], []\n"
    "    for p, one in enumerate(answers):\n"
    "        for q, two in enumerate(answers):\n"
    "            if p != q:\n"
    "                for s, a in enumerate(one):\n"
    "                    for r, b in enumerate(two):\n"
    "                        (same if s == r else other).append(a == b)\n"
    "    return sum(same) / len(same) - sum(other) / len(other)"
)
_APART = (
    "def apart(a, b):\n"
    "    length = (a.norm(dim=-1) + b.norm(dim=-1)) / 2\n"
    "    return (a - b).norm(dim=-1) / length"
)
_SWAP = (
    "def swap_rate(said, shown):\n"
    "    swapped = right = 0\n"
    "    for (one, two), seen in zip(said, shown):\n"
    "        turned = {(one[0], two[1]), (two[0], one[1])}\n"
    "        swapped += set(seen) == turned\n"
    "        right += set(seen) == {one, two}\n"
    "    return swapped / (swapped + right)"
)

WRONG = [
    ("16.1", "one step late", _CHANGE.replace("<= timesteps[k]", "< timesteps[k]")),
    ("16.1", "the other way round", _CHANGE.replace("then if late else first",
                                                     "first if late else then")),
    ("16.1", "k is taken for a timestep", _CHANGE.replace("t[0] <= timesteps[k]", "t[0] <= k")),
    ("16.1", "never at the end means the last step",
     _CHANGE.replace("k < len(timesteps) and t[0] <= timesteps[k]",
                     "t[0] <= timesteps[min(k, len(timesteps) - 1)]")),
    ("16.1", "counts its calls", "def change_words(first, then, timesteps, k):\n"
     "    calls = []\n"
     "    def denoise(x, t):\n"
     "        calls.append(0)\n"
     "        return (first if len(calls) <= k else then)(x, t)\n"
     "    return denoise"),
    ("16.2", "chance is not taken off", _MORE.replace(" - sum(other) / len(other)", "")),
    ("16.2", "a picture is compared with itself", _MORE.replace("if p != q", "if True")),
    ("16.2", "chance includes the same seed",
     _MORE.replace("(same if s == r else other).append(a == b)",
                   "other.append(a == b); same.extend([a == b] * (s == r))")),
    ("16.2", "a ratio", _MORE.replace("len(same) - sum", "len(same) / (1e-9 + sum").replace(
        "/ len(other)", "/ len(other))")),
    ("16.3", "not divided", _APART.replace(" / length", "")),
    ("16.3", "by the first one's length", _APART.replace("(a.norm(dim=-1) + b.norm(dim=-1)) / 2",
                                                          "a.norm(dim=-1)")),
    ("16.3", "by the sum of the lengths", _APART.replace(" / 2\n", "\n")),
    ("16.3", "over all rows at once", _APART.replace("dim=-1", "dim=None")),
    ("16.4", "of all pictures", _SWAP.replace("(swapped + right)", "len(said)")),
    ("16.4", "order matters", _SWAP.replace("set(seen)", "tuple(seen)").replace(
        "turned = {", "turned = (").replace("one[1])}", "one[1]))").replace(
        "{one, two}", "(one, two)")),
    ("16.4", "half a swap counts",
     _SWAP.replace("set(seen) == turned", "set(seen) & turned != set()")),
    ("16.4", "the right ones", _SWAP.replace("return swapped /", "return right /")),
]  # fmt: skip
