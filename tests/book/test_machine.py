"""The machine drawing: its files are what the script draws, legible and well formed."""

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import ImageFont

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "book" / "figures"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def machine():
    spec = importlib.util.spec_from_file_location("machine", FIGURES / "machine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_what_the_script_draws(machine):
    names = {path.name for path in FIGURES.glob("machine-*.svg")}
    assert names == {f"machine-{chapter}.svg" for chapter in machine.CHAPTERS}
    for chapter in machine.CHAPTERS:
        stored = (FIGURES / f"machine-{chapter}.svg").read_text("utf8")
        assert stored == machine.svg(chapter), f"run python book/figures/machine.py ({chapter})"


def test_each_chapter_lights_a_part_of_its_own_and_all_parts_are_lit_somewhere(machine):
    chapters = {name: lit for name, (_, lit) in machine.CHAPTERS.items()}
    assert chapters.pop("whole") == machine.ALL
    assert all(lit and lit < machine.ALL for lit in chapters.values())
    assert len({frozenset(lit) for lit in chapters.values()}) == len(chapters)
    assert set().union(*chapters.values()) == machine.ALL
    for name in chapters:
        svg = machine.svg(name)
        assert re.search(r'class="\w+ lit"', svg) and re.search(r'class="\w+ dim"', svg)


def test_texts_fit_into_their_boxes(machine):
    """Measured with the type itself, which is not what the drawing's numbers were made from."""
    fonts = ROOT / "companion" / "fonts"
    sizes = {"name": ("Bold", 13.5), "note": ("Regular", 11.5), "on": ("Bold", 12)}
    checked = 0
    for text, kind, room in machine.draw("whole").labels:
        if kind in sizes and room < 1e8:
            name, size = sizes[kind]
            wide = ImageFont.truetype(str(fonts / f"Figtree-{name}.ttf"), size * 8).getlength(text)
            assert wide / 8 <= room, (text, wide / 8, room)
            checked += 1
    assert checked > 40


def test_everything_lies_on_the_sheet(machine):
    root = ElementTree.fromstring(machine.svg("whole"))
    for text in root.iter(f"{SVG}text"):
        assert 0 < float(text.get("x")) < machine.WIDTH
        assert 0 < float(text.get("y")) < machine.HEIGHT
    for rect in root.iter(f"{SVG}rect"):
        right = float(rect.get("x", 0)) + float(rect.get("width"))
        below = float(rect.get("y", 0)) + float(rect.get("height"))
        assert right <= machine.WIDTH and below <= machine.HEIGHT


def test_it_is_named_and_described_and_needs_nothing_else(machine):
    for chapter in machine.CHAPTERS:
        text = machine.svg(chapter)
        root = ElementTree.fromstring(text)
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert ids == ["title", "desc"] and root.get("aria-labelledby") == "title desc"
        assert root.find(f"{SVG}title").text and len(root.find(f"{SVG}desc").text) > 100
        assert "url(" not in text and text.count("http") == 1  # its own name space


def test_what_it_says_about_the_systems(machine):
    """Facts that are often drawn wrongly."""
    said = [text for text, _, _ in machine.draw("whole").labels]
    for fact in (
        "to t", "as extra tokens", "caption tokens, kept",  # DALL·E 2's decoder: twice, and words
        "no prior: the",  # Stable Diffusion
        "training, img2img",  # its encoder
        "text only, frozen", "the words again",  # Imagen
        "noise 16×16×3", "latents 8×8×4", "256×256×3",
    ):  # fmt: skip
        assert fact in said, fact
