"""companion.show: what is printed, what is drawn, what is refused."""

import io
import itertools

import numpy as np
import pytest
import torch

from companion import show


@pytest.fixture(autouse=True)
def own_style():
    """Each test leaves matplotlib as it found it."""
    import matplotlib

    matplotlib.use("agg")
    with matplotlib.rc_context():
        yield


# ---- number -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "options", "line"),
    [
        (12.3456, {}, "height ≈ 12.35 (expected 12 … 13: yes)\n"),
        (12, {"unit": "m"}, "height ≈ 12 m (expected 12 … 13: yes)\n"),
        (13.0, {"digits": 2}, "height ≈ 13 (expected 12 … 13: yes)\n"),
        (torch.tensor([[12.5]]), {}, "height ≈ 12.5 (expected 12 … 13: yes)\n"),
    ],
)
def test_number_prints_one_line(capsys, value, options, line):
    assert show.number("height", value, within=(12, 13), **options) is None
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("value", [11.999, 13.001, float("nan"), float("inf"), -12.5])
def test_number_outside_prints_no_and_fails(capsys, value):
    with pytest.raises(AssertionError, match="height is"):
        show.number("height", value, within=(12, 13))
    assert capsys.readouterr().out.endswith("(expected 12 … 13: no)\n")


@pytest.mark.parametrize(
    "within", [(13, 12), (float("nan"), 1), (0, float("inf")), (1,), 3, ("a", "b"), (1, 2, 3)]
)
def test_number_refuses_a_bad_range(capsys, within):
    with pytest.raises(ValueError, match="within is"):
        show.number("height", 1.0, within=within)
    assert capsys.readouterr().out == ""


def test_number_refuses_several_values():
    with pytest.raises(ValueError, match="has 3 values"):
        show.number("height", torch.zeros(3), within=(0, 1))


# ---- pictures ---------------------------------------------------------------------------------


def pixels(figure) -> np.ndarray:
    """The figure as it is drawn, (H, W, 3) from 0 to 255."""
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def test_pictures_keep_their_colours_and_order():
    show.style()
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])
    drawn = pixels(show.pictures(colours[:, :, None, None].expand(-1, 3, 4, 4), columns=3))
    height, width = drawn.shape[:2]
    for i, colour in enumerate(colours):
        row, column = divmod(i, 3)
        spot = drawn[int((row + 0.5) * height / 2), int((column + 0.5) * width / 3)]
        assert np.abs(spot - 255 * colour.numpy()).max() <= 1, i


def test_pictures_are_enlarged_without_smoothing():
    show.style()
    checks = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).expand(1, 1, 2, 2)
    drawn = pixels(show.picture(checks))[40:-40, 40:-40, 0]
    share = np.isin(drawn, [0, 255]).mean()
    assert share > 0.99  # two greys only, but for the seam
    assert abs((drawn == 0).mean() - 0.5) < 0.01


def test_grey_uses_the_whole_range_not_the_picture_s_own():
    show.style()
    drawn = pixels(show.picture(torch.full((1, 8, 8), 0.5)))
    middle = drawn[drawn.shape[0] // 2, drawn.shape[1] // 2]
    assert set(middle.tolist()) <= {127, 128}


def test_texts_are_drawn_and_wrapped():
    show.style()
    batch = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    figure = show.pictures(
        batch, titles=["one", "two"], captions=["a red house by the sea at dusk"] * 4, columns=2
    )
    assert [axes.get_title() for axes in figure.axes] == ["one", "two", "", ""]
    texts = [text.get_text() for text in figure.texts]
    assert len(texts) == 4 and all("\n" in text for text in texts)
    assert texts[0].replace("\n", " ") == "a red house by the sea at dusk"


def test_no_text_leaves_the_figure_or_meets_a_picture():
    show.style()
    figure = show.pictures(
        torch.zeros(6, 1, 8, 8),
        titles=[f"t = {i}" for i in range(6)],
        captions=["a small blue boat on the sea, with a long story"] * 6,
        columns=3,
    )
    figure.canvas.draw()
    frame = figure.bbox
    boxes = [axes.get_window_extent() for axes in figure.axes]
    texts = [text.get_window_extent() for text in figure.texts]
    texts += [axes.title.get_window_extent() for axes in figure.axes]
    for text in texts:
        assert frame.x0 <= text.x0 and text.x1 <= frame.x1 and text.y1 <= frame.y1 + 1
        assert frame.y0 - 1 <= text.y0
        assert not any(text.overlaps(box) for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(texts, 2))


def test_pyplot_does_not_keep_the_figure():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    show.pictures(torch.zeros(2, 1, 4, 4))
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: show.pictures([1.0]), TypeError, "expected a torch.Tensor"),
        (lambda: show.pictures(torch.zeros(3, 4, 4)), ValueError, "expected .B, C, H, W."),
        (lambda: show.pictures(torch.zeros(1, 2, 4, 4)), ValueError, "2 channels"),
        (lambda: show.pictures(torch.zeros(0, 3, 4, 4)), ValueError, "shape"),
        (lambda: show.pictures(-torch.ones(1, 3, 4, 4)), ValueError, "from 0 to 1"),
        (lambda: show.pictures(torch.full((1, 3, 4, 4), 255.0)), ValueError, "from 0 to 1"),
        (lambda: show.pictures(torch.full((1, 3, 4, 4), torch.nan)), ValueError, "NaN"),
        (lambda: show.pictures(torch.zeros(1, 3, 4, 4).byte()), TypeError, "dtype"),
        (lambda: show.pictures(torch.zeros(2, 3, 4, 4), ["a"] * 3), ValueError, "3 texts"),
        (lambda: show.pictures(torch.zeros(2, 3, 4, 4), captions=["a"]), ValueError, "1 texts"),
        (lambda: show.pictures(torch.zeros(2, 3, 4, 4), "ab"), TypeError, "one string"),
        (lambda: show.pictures(torch.zeros(2, 3, 4, 4), columns=0), ValueError, "columns"),
        (lambda: show.pictures(torch.zeros(2, 3, 4, 4), size=0), ValueError, "size"),
        (lambda: show.picture(torch.zeros(2, 3, 4, 4)), ValueError, "shape"),
    ],
)
def test_pictures_refuse(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# ---- style ------------------------------------------------------------------------------------


def test_style_uses_the_bundled_type_and_can_be_called_twice():
    import matplotlib
    from matplotlib import font_manager

    show.style()
    first = dict(matplotlib.rcParams)
    show.style()
    assert dict(matplotlib.rcParams) == first
    path = font_manager.findfont("Figtree", fallback_to_default=False)
    assert "companion" in path and path.endswith(".ttf")


def test_greek_and_mathematics_are_drawn_without_a_warning():
    import matplotlib.pyplot as plt

    show.style()
    figure, axes = plt.subplots()
    axes.plot([0, 1], label=r"$\sqrt{\bar\alpha_t}$")
    axes.set(xlabel="t of 1000 → noise", ylabel="σ, log SNR − 1", title="ε and ᾱ")
    axes.legend()
    figure.savefig(io.BytesIO(), format="png")  # a missing sign would warn, and fail
    plt.close(figure)


def test_lines_differ_for_colour_blind_readers():
    from colorspacious import cspace_convert, deltaE

    rgb = [
        np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for c in show.COLOURS.values()
    ]
    assert len(set(show.DASHES)) == len(rgb)
    for sight in (None, "deuteranomaly", "protanomaly"):
        space = {"name": "sRGB1+CVD", "cvd_type": sight, "severity": 100}
        seen = [np.clip(cspace_convert(c, space, "sRGB1"), 0, 1) for c in rgb] if sight else rgb
        for a, b in itertools.combinations(seen, 2):
            assert deltaE(a, b, input_space="sRGB1") > 15


# ---- table ------------------------------------------------------------------------------------


def test_table_as_text_and_as_markdown():
    shown = show.table([["linear", 1e-4, 1000], ["a|b", 0.123456, 20]], ["schedule", "β", "T"])
    assert repr(shown) == (
        "schedule       β      T\n"
        "--------  ------  -----\n"
        "linear    0.0001  1,000\n"
        "a|b       0.1235     20"
    )
    assert shown._repr_markdown_() == (
        "| schedule | β | T |\n| --- | ---: | ---: |\n"
        "| linear | 0.0001 | 1,000 |\n| a\\|b | 0.1235 | 20 |"
    )


@pytest.mark.parametrize(
    ("rows", "headers", "message"),
    [([], ["a"], "at least one row"), ([[1]], [], "headers"), ([[1, 2]], ["a"], "row 0")],
)
def test_table_refuses(rows, headers, message):
    with pytest.raises(ValueError, match=message):
        show.table(rows, headers)
