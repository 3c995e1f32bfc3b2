"""companion.widgets: the live control, its twin without a kernel, and what is refused."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from companion.widgets import Scrub


def steps(n: int = 5, channels: int = 3, size: int = 4, first: float = 0.0) -> torch.Tensor:
    """Frames of one grey each, from ``first`` to 1."""
    return torch.linspace(first, 1, n)[:, None, None, None].expand(n, channels, size, size)


def scrub(**options) -> Scrub:
    return Scrub(**{"frames": steps(), "label": "noise level", "alt": "a grey field"} | options)


class Page(HTMLParser):
    """The elements of a piece of HTML as (name, attributes), and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def picture(address: str) -> Image.Image:
    data = re.fullmatch(r"data:image/(?:png|jpeg);base64,(.+)", address)[1]
    return Image.open(io.BytesIO(base64.b64decode(data)))


# ---- without a kernel -------------------------------------------------------------------------


def test_the_filmstrip_holds_every_frame_in_its_place():
    values = torch.rand(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    sheet = np.asarray(picture(Page(scrub(frames=values).html()).all("img")[0]["src"]))
    assert sheet.shape == (6, 4 * 5, 3)
    for k in range(4):
        frame = sheet[:, 5 * k : 5 * (k + 1)].transpose(2, 0, 1) / 255
        assert np.abs(frame - values[k].numpy()).max() <= 0.5 / 255 + 1e-6


def test_choices_are_rows_of_the_filmstrip():
    frames = torch.stack([steps(), 1 - steps()])
    page = Page(scrub(frames=frames, choices=["up", "down"], pick="way").html())
    sheet = np.asarray(picture(page.all("img")[0]["src"]).convert("L"))
    assert sheet[0, ::4].tolist() == [0, 64, 128, 191, 255]
    assert sheet[4, ::4].tolist() == [255, 191, 128, 64, 0]
    assert len(page.all("select")) == 1 and len(page.all("option")) == 2
    assert len(json.loads(page.all("div")[0]["data-says"])) == 2


def test_it_can_be_used_without_seeing_it():
    page = Page(
        scrub(
            frames={"left": steps(), "right": steps(size=8)},
            alt=["a field", "a larger field"],
            values=[f"t = {t}" for t in range(5)],
            start=2,
        ).html()
    )
    (slider,) = page.all("input")
    assert slider["type"] == "range" and (slider["min"], slider["max"]) == ("0", "4")
    assert slider["value"] == "2" and slider["aria-valuetext"] == "t = 2"
    assert [i["alt"] for i in page.all("img")] == [
        "a field: 5 frames, from t = 0 to t = 4",
        "a larger field: 5 frames, from t = 0 to t = 4",
    ]
    assert page.all("div")[0]["role"] == "group" and page.all("label")
    assert "left" in page.words and "right" in page.words


def test_the_twin_asks_for_nothing_from_elsewhere_and_has_no_inline_handlers():
    html = scrub().html()
    page = Page(html)
    assert not re.search(r"(?:https?:)?//", html.replace("data:", ""))
    assert not [name for _, attributes in page.elements for name in attributes if name[:2] == "on"]
    assert not [1 for _, attributes in page.elements if "id" in attributes]  # many on one page


def test_text_cannot_leave_its_place():
    page = Page(
        scrub(
            frames={'<b>"x"': steps()},
            label='a "b" <script>',
            alt="<i>'&",
            values=['</script>"<p>'] * 5,
        ).html()
    )
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not page.all("i") and not page.all("b")
    assert json.loads(page.all("div")[0]["data-says"]) == [['</script>"<p>'] * 5]


def test_equal_input_gives_equal_bytes():
    noise = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    assert scrub(frames=noise).html() == scrub(frames=noise.clone()).html()


def test_noise_is_stored_as_jpeg_and_drawings_losslessly():
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    address = Page(scrub(frames=noise).html()).all("img")[0]["src"]
    assert address.startswith("data:image/jpeg")
    shown = np.asarray(picture(address)).reshape(64, 4, 64, 3).transpose(1, 3, 0, 2) / 255
    # Still the same noise, in colour: with colours at half resolution the second would be 0.33.
    was = noise.numpy()
    assert np.corrcoef(shown.mean(1).flat, was.mean(1).flat)[0, 1] > 0.9
    assert np.corrcoef((shown[:, 0] - shown[:, 2]).flat, (was[:, 0] - was[:, 2]).flat)[0, 1] > 0.9
    flat = Page(scrub(frames=steps(size=64)).html()).all("img")[0]["src"]
    assert flat.startswith("data:image/png")


# ---- with a kernel ----------------------------------------------------------------------------


def test_the_live_control_moves_the_picture_the_text_and_the_alt():
    live = scrub(values=[f"t = {t}" for t in range(5)])
    before = live.views[0].value
    live.slider.value = 3
    after = live.views[0].value
    assert before != after and 'alt="a grey field: t = 3"' in after and live.says.value == "t = 3"
    assert np.asarray(picture(Page(after).all("img")[0]["src"])).flat[0] == round(0.75 * 255)


def test_the_live_menu_picks_a_row():
    live = scrub(frames=torch.stack([steps(), 1 - steps()]), choices=["up", "down"])
    live.menu.value = 1
    assert np.asarray(picture(Page(live.views[0].value).all("img")[0]["src"])).flat[0] == 255


def test_both_forms_are_in_the_output_and_its_text_is_stable():
    bundle = scrub()._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and "text/html" in bundle
    assert bundle["text/plain"] == "Scrub('noise level', 5 frames)"


def test_a_function_is_drawn_once_for_each_position():
    asked = []

    def draw(k: int) -> list[torch.Tensor]:
        asked.append(k)
        return [steps()[k], steps(channels=1, size=2)[k]]

    both = scrub(frames=draw, n=5, values=lambda k: f"k is {k}")
    assert asked == [0, 1, 2, 3, 4] and len(both.views) == 2 and both.values[0][4] == "k is 4"


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"frames": 3}, TypeError, "expected a tensor"),
        ({"frames": "abc"}, TypeError, "expected a tensor"),
        ({"frames": []}, ValueError, "at least one strip"),
        ({"frames": torch.zeros(5, 4, 4)}, ValueError, "shape"),
        ({"frames": steps().byte()}, TypeError, "dtype"),
        ({"frames": steps() * 2}, ValueError, "from 0 to 1"),
        ({"frames": steps() - 0.1}, ValueError, "from 0 to 1"),
        ({"frames": steps() * torch.nan}, ValueError, "NaN"),
        ({"frames": steps(channels=2)}, ValueError, "2 channels"),
        ({"frames": steps(1)}, ValueError, "at least 2"),
        ({"frames": [steps(5), steps(6)]}, ValueError, "equal numbers"),
        ({"n": 4}, ValueError, "n is 4"),
        ({"frames": lambda k: steps()[k]}, ValueError, "n is None"),
        ({"frames": lambda k: steps()[:k], "n": 3}, ValueError, "different numbers|frame 0"),
        ({"label": " "}, ValueError, "label"),
        ({"alt": ""}, ValueError, "alt"),
        ({"alt": ["a", "b"]}, ValueError, "2 texts for 1 strips"),
        ({"titles": []}, ValueError, "titles has 0"),
        ({"values": ["a"]}, ValueError, "1 texts for 5 frames"),
        ({"values": [""] * 5}, ValueError, "a value"),
        ({"start": 5}, ValueError, "start"),
        ({"start": 0.5}, TypeError, "start"),
        ({"size": 0}, ValueError, "size"),
        ({"choices": ["a", "b"]}, ValueError, "shape"),
        ({"frames": steps()[None], "choices": ["a", "b"]}, ValueError, "1 rows; expected 2"),
    ],
)
def test_refuses(options, kind, message):
    with pytest.raises(kind, match=message):
        scrub(**options)
