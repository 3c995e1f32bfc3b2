"""What readers of chapter 15 plausibly write: (exercise, what is wrong with it, code)."""

_BUDGET = (
    "def budget(trained, asked):\n"
    "    ours = sum(forward * n for forward, n in trained)\n"
    "    frozen = sum(forward * n for forward, n in asked)\n"
    "    return 3 * ours + frozen"
)
_SIDE = (
    "def at_side(layers, attention, side, other):\n"
    "    area = (other / side) ** 2\n"
    "    return layers * area + attention * area**2"
)
_UNEQUAL = (
    "def unequal(seen):\n"
    "    n = len(seen)\n"
    "    different = sum(a != b for a in seen for b in seen)\n"
    "    return different / (n * (n - 1))"
)
_HALF = (
    "def half(runs):\n"
    "    x = torch.tensor(runs, dtype=torch.float64)\n"
    "    return 4.302653 * x.std() / len(x) ** 0.5"
)

WRONG = [
    ("15.1", "backward forgotten", _BUDGET.replace("3 *", "1 *")),
    ("15.1", "backward as dear as forward", _BUDGET.replace("3 *", "2 *")),
    ("15.1", "frozen networks go backward too", _BUDGET.replace("+ frozen", "+ 3 * frozen")),
    ("15.1", "frozen networks are free", _BUDGET.replace(" + frozen", "")),
    ("15.2", "by the side, not the area", _SIDE.replace("** 2\n", "** 1\n")),
    ("15.2", "attention as the layers", _SIDE.replace("area**2", "area")),
    ("15.2", "the other way round", _SIDE.replace("other / side", "side / other")),
    ("15.3", "a picture with itself", _UNEQUAL.replace("(n * (n - 1))", "n**2")),
    ("15.3", "each pair counted once, divided as if twice",
     _UNEQUAL.replace("different / ", "different / 2 / ")),
    ("15.3", "equal ones counted", _UNEQUAL.replace("!=", "==")),
    ("15.4", "the normal's 1.96", _HALF.replace("4.302653", "1.96")),
    ("15.4", "the whole width", _HALF.replace("4.302653", "2 * 4.302653")),
    ("15.4", "of one run, not of the mean", _HALF.replace(" / len(x) ** 0.5", "")),
    ("15.4", "divided by three, not by two", _HALF.replace("x.std()", "x.std(correction=0)")),
]  # fmt: skip
