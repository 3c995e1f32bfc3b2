"""What readers of chapter 9 plausibly write: (exercise, what is wrong with it, code)."""

_TURN = (
    "def turn(a, b, share):\n"
    "    angle = (a * b).sum(1, keepdim=True).clamp(-1, 1).acos()\n"
    "    here, there = ((1 - share) * angle).sin(), (share * angle).sin()\n"
    "    return (here * a + there * b) / angle.sin()"
)
_TOLD = (
    "def told(place, before, after, theta):\n"
    "    from companion.manipulations import slerp\n"
    "    before = before / before.norm(dim=1, keepdim=True)\n"
    "    after = after / after.norm(dim=1, keepdim=True)\n"
    "    change = after - before\n"
    "    change = change * place.norm() / change.norm()\n"
    "    return slerp(place, change, theta)"
)
_FIRST = (
    "def first(places, known, k):\n"
    "    mean = known.mean(0)\n"
    "    variances, columns = torch.linalg.eigh(torch.cov(known.T))\n"
    "    some = columns.flip(1)[:, :k]\n"
    "    return mean + (places - mean) @ some @ some.T"
)
_DEGRADE = (
    "def degrade(small):\n"
    "    F = torch.nn.functional\n"
    "    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * 0.6**2)).to(small)\n"
    "    kernel = torch.outer(line, line) / line.sum() ** 2\n"
    "    wide = F.pad(small, (1, 1, 1, 1), mode='replicate')\n"
    "    return F.conv2d(wide, kernel.expand(3, 1, 3, 3), groups=3)"
)

WRONG = [
    (
        "9.1",
        "the straight line",
        "def turn(a, b, share):\n    return (1 - share) * a + share * b",
    ),
    (
        "9.1",
        "the straight line, made 1 long: on the arc, at an uneven pace",
        "def turn(a, b, share):\n"
        "    x = (1 - share) * a + share * b\n"
        "    return x / x.norm(dim=1, keepdim=True)",
    ),
    ("9.1", "one angle for all rows", _TURN.replace(".sum(1, keepdim=True)", ".sum()")),
    ("9.1", "not divided by the sine", _TURN.replace(" / angle.sin()", "")),
    ("9.1", "the other way round", _TURN.replace("here * a + there * b", "here * b + there * a")),
    ("9.2", "from after to before", _TOLD.replace("after - before", "before - after")),
    (
        "9.2",
        "lengths are kept",
        _TOLD.replace("    after = after / after.norm(dim=1, keepdim=True)\n", ""),
    ),
    ("9.2", "towards the caption", _TOLD.replace("change = after - before", "change = after")),
    (
        "9.2",
        "a length of 1",
        _TOLD.replace("slerp(place, change, theta)", "slerp(place / place.norm(), change, theta)"),
    ),
    (
        "9.2",
        "added, not turned",
        _TOLD.replace("slerp(place, change, theta)", "place + theta * change"),
    ),
    ("9.3", "the narrowest first", _FIRST.replace("columns.flip(1)", "columns")),
    ("9.3", "the mean is forgotten", _FIRST.replace("mean + (places - mean)", "places")),
    ("9.3", "the scores themselves", _FIRST.replace(" @ some.T", "")),
    ("9.3", "the axes are rows", _FIRST.replace("columns.flip(1)[:, :k]", "columns.flip(1)[:k].T")),
    ("9.4", "black outside", _DEGRADE.replace("mode='replicate'", "mode='constant'")),
    ("9.4", "weights that do not sum to 1", _DEGRADE.replace(" / line.sum() ** 2", "")),
    ("9.4", "another width", _DEGRADE.replace("0.6**2", "0.6")),
    ("9.4", "mirrored outside", _DEGRADE.replace("mode='replicate'", "mode='reflect'")),
]
