"""Digits, photographs and the reader's own folder: what is read, and all that can be wrong."""

import csv
import io
import json
import math
import string
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from companion.data import (
    ImageFolder,
    digits,
    photograph,
    photographs,
    read_picture,
    to_signed,
    to_unit,
)

# --- ranges --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_there_and_back(values):
    x = torch.tensor(values)
    signed = to_signed(x)
    assert signed.min() >= -1 and signed.max() <= 1
    torch.testing.assert_close(to_unit(signed), x, rtol=0, atol=1e-7)


def test_ranges_are_guarded():
    assert to_signed(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1.0, 0.0, 1.0]
    assert to_unit(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 0.5, 1, 1]
    for bad in (torch.tensor([-0.1]), torch.tensor([255.0]), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="^x "):
            to_signed(bad)
    with pytest.raises(ValueError, match="NaN"):
        to_unit(torch.tensor([math.nan]))
    for wrong in (torch.tensor([1]), "x"):
        with pytest.raises(TypeError, match="^x "):
            to_signed(wrong)


# --- digits and photographs ----------------------------------------------------------------------


def test_digits_are_the_published_ones():
    pictures, labels = digits()
    assert pictures.shape == (1797, 1, 8, 8) and pictures.dtype == torch.float32
    assert labels.shape == (1797,) and labels.dtype == torch.int64
    assert pictures.min() == 0 and pictures.max() == 1
    assert torch.equal((pictures * 16).round(), pictures * 16), "seventeen grey levels"
    # counts of each digit from the data set's own description
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    zero = pictures[0, 0]  # a zero: a ring with a hole
    assert labels[0] == 0 and zero[3:5, 3:5].max() < 0.1 and zero[3:5, 2].min() > 0.4


@pytest.mark.parametrize("entry", photographs(), ids=lambda p: p.name)
def test_photographs(entry):
    small, large = photograph(entry.name, 32), photograph(entry.name, 128)
    assert small.shape == (3, 32, 32) and large.shape == (3, 128, 128)
    assert 0 <= large.min() and large.max() <= 1 and large.std() > 0.1
    # antialiased: the small one is the large one averaged over blocks, up to the resampling kernel
    blocks = large.view(3, 32, 4, 32, 4).mean((2, 4))
    assert (small - blocks).abs().mean() < 0.02
    assert entry.credit and entry.licence and entry.source and entry.about


def test_photographs_are_in_colour_and_different():
    pictures = {entry.name: photograph(entry.name, 16) for entry in photographs()}
    assert len({p.numpy().tobytes() for p in pictures.values()}) == 6
    assert pictures["flower"][0].mean() > pictures["flower"][2].mean(), "red before blue"
    with pytest.raises(ValueError, match="Did you mean 'astronaut'"):
        photograph("astronout")
    with pytest.raises(ValueError, match="size is 0"):
        photograph("cat", 0)
    with pytest.raises(TypeError, match="size is 2.5"):
        photograph("cat", 2.5)


# --- one picture ---------------------------------------------------------------------------------


def saved(tmp_path, picture, name="a.png", **options):
    picture.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize(
    ("mode", "colour", "name", "want"),
    [
        ("L", 51, "a.png", (0.2, 0.2, 0.2)),
        ("1", 1, "a.png", (1, 1, 1)),
        ("RGB", (255, 51, 0), "a.png", (1, 0.2, 0)),
        ("RGB", (255, 51, 0), "a.bmp", (1, 0.2, 0)),
        ("RGB", (255, 51, 0), "a.webp", (1, 0.2, 0)),
        ("RGBA", (255, 0, 0, 51), "a.png", (1, 0.8, 0.8)),
        ("RGBA", (0, 0, 0, 0), "a.png", (1, 1, 1)),
        ("LA", (0, 51), "a.png", (0.8, 0.8, 0.8)),
        ("CMYK", (0, 255, 255, 0), "a.tif", (1, 0, 0)),
        ("CMYK", (0, 0, 0, 255), "a.jpg", (0, 0, 0)),
        ("YCbCr", (128, 128, 128), "a.jpg", (0.502, 0.502, 0.502)),
        ("I;16", 13107, "a.png", (0.2, 0.2, 0.2)),
        ("I;16", 300, "a.tif", (300 / 65535,) * 3),
    ],
)
def test_modes(tmp_path, mode, colour, name, want):
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, Image.new(mode, (5, 7), colour), name, **options)
    x = read_picture(path, 3)
    assert x.shape == (3, 3, 3) and x.dtype == torch.float32 and x.max() <= 1
    tolerance = 1e-6 if not name.endswith("jpg") else 0.01
    torch.testing.assert_close(x.mean((1, 2)), torch.tensor(want).float(), atol=tolerance, rtol=0)
    assert x.std((1, 2)).max() < 1e-6, "a flat colour stays flat"


def test_palettes(tmp_path):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 255, 51, 0])
    want = torch.tensor([1, 0.2, 0.0])
    torch.testing.assert_close(read_picture(saved(tmp_path, picture), 4)[:, 0, 0], want)
    torch.testing.assert_close(read_picture(saved(tmp_path, picture, "a.gif"), 4)[:, 0, 0], want)
    clear = read_picture(saved(tmp_path, picture, "b.png", transparency=1), 4)
    assert (clear == 1).all(), "transparency of a palette is laid on white too"


def test_sixteen_bits_keep_their_depth(tmp_path):
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 7 + 1000
    path = saved(tmp_path, Image.fromarray(ramp))
    want = torch.from_numpy(ramp.astype(np.float64) / 65535).float()
    torch.testing.assert_close(read_picture(path, 8)[1], want, rtol=0, atol=1e-7)


def test_thirty_two_bits_are_refused(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.full((4, 4), 0.5, np.float32)), "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif cannot be read: it stores 32 bits a pixel"):
        read_picture(path, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    undo = {  # how a camera stores the upright picture, for each tag (EXIF 2.32, table 6)
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    x = read_picture(saved(tmp_path, stored, exif=exif), 4)
    torch.testing.assert_close(x * 255, torch.from_numpy(upright).permute(2, 0, 1).float())


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(0, 2**31))
def test_crop_and_size(tmp_path, height, width, size, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(pixels))
    x = read_picture(path, size)
    assert x.shape == (3, size, size) and 0 <= x.min() and x.max() <= 1 and x.is_contiguous()
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    whole = torch.from_numpy(pixels[top : top + side, left : left + side]).permute(2, 0, 1) / 255
    torch.testing.assert_close(read_picture(path, side), whole, rtol=0, atol=1e-7)
    if side % size == 0:  # a whole number of pixels to one: the brightness stays, up to clipping
        assert abs(x.mean() - whole.mean()) < 0.06


# --- the reader's own folder ---------------------------------------------------------------------


def draw(path, colour=(255, 0, 0), size=(6, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def lines(path, *rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))


def test_jsonl_with_further_columns(tmp_path):
    draw(tmp_path / "a.png", (255, 0, 0))
    draw(tmp_path / "b.JPG", (0, 0, 255))
    lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "b.JPG", "text": "blé — 蓝", "tags": [1, 2], "n": 3},
        "\n",
        {"file_name": "a.png", "text": "red"},
        {"file_name": "a.png", "text": "scarlet"},
    )
    folder = ImageFolder(tmp_path, 4)
    assert len(folder) == 3 and folder.texts == ["blé — 蓝", "red", "scarlet"]
    first = folder[0]
    assert set(first) == {"picture", "text", "file_name", "tags", "n"}
    assert first["tags"] == [1, 2] and first["n"] == 3 and first["file_name"] == "b.JPG"
    assert first["picture"].shape == (3, 4, 4) and first["picture"][2].mean() > 0.98
    assert folder[1]["picture"][0].mean() == 1 == folder[-1]["picture"][0].mean()
    with pytest.raises(IndexError):
        folder[3]
    folder.check()
    batches = torch.utils.data.DataLoader(ImageFolder(tmp_path, 4), batch_size=2, sampler=[1, 2])
    assert next(iter(batches))["picture"].shape == (2, 3, 4, 4)


def test_csv(tmp_path):
    draw(tmp_path / "a.png")
    text = 'file_name,text,year\r\na.png,"red, \r\nor ""scarlet""",1999\r\n'
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    item = ImageFolder(tmp_path, 4)[0]
    assert item["text"] == 'red, \r\nor "scarlet"' and item["year"] == "1999"


def test_plain_folder_with_subfolders(tmp_path):
    for name in ("b/x.png", "a.png", "b/c/y.webp", ".hidden/z.png", "b/._x.png"):
        draw(tmp_path / name) if "._" not in name else (tmp_path / name).write_text("junk")
    (tmp_path / "notes.txt").write_text("not a picture")
    folder = ImageFolder(str(tmp_path), 4)
    assert [row["file_name"] for row in folder.rows] == ["a.png", "b/c/y.webp", "b/x.png"]
    assert folder.texts == ["", "", ""]
    assert set(folder[1]) == {"picture", "text", "file_name"}


def test_metadata_in_each_subfolder(tmp_path):
    for part in ("train", "test"):
        draw(tmp_path / part / "a.png")
        lines(tmp_path / part / "metadata.jsonl", {"file_name": "a.png", "text": part})
    folder = ImageFolder(tmp_path, 4)
    assert [(r["file_name"], r["text"]) for r in folder.rows] == [
        ("test/a.png", "test"),
        ("train/a.png", "train"),
    ]


def test_one_metadata_file_for_nested_pictures(tmp_path):
    draw(tmp_path / "deep" / "a.png")
    lines(tmp_path / "metadata.jsonl", {"file_name": "deep/../deep/a.png", "text": "x"})
    assert ImageFolder(tmp_path, 4)[0]["file_name"] == "deep/a.png"


names = st.text(string.ascii_lowercase, min_size=1, max_size=8)
cells = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(names, st.tuples(cells, cells, st.integers()), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_captions_come_back(tmp_path_factory, captions, as_csv):
    folder = tmp_path_factory.mktemp("any")
    rows = [
        {"file_name": f"{name}.png", "text": text, "also": also, "n": n}
        for name, (text, also, n) in captions.items()
    ]
    for row in rows:
        draw(folder / row["file_name"])
    if as_csv:
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        (folder / "metadata.csv").write_bytes(out.getvalue().encode())
        rows = [{**row, "n": str(row["n"])} for row in rows]
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "metadata.jsonl").write_bytes(text.encode())
    assert ImageFolder(folder, 2).rows == rows


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{oops}\n', r"metadata.jsonl, line 2 is not JSON"),
        ("[1]\n", "line 1 holds a list; expected a JSON object"),
        ('\n\n{"text": "x"}\n', "line 3: the column 'file_name' is missing"),
        (
            '{"file_name": "a.png", "caption": "x"}\n',
            "the column 'text' is missing .it has .'caption'",
        ),
        ('{"file_name": "a.png", "text": null}\n', "the column 'text' is None; expected a string"),
        ('{"file_name": 3, "text": "x"}\n', "the column 'file_name' is 3"),
        ('{"file_name": "b.png", "text": "x"}\n', "names 'b.png', but there is no file"),
        ('{"file_name": "../a.png", "text": "x"}\n', "which is outside"),
        ('{"file_name": "/etc/hosts", "text": "x"}\n', "which is outside"),
        ('{"file_name": ".", "text": "x"}\n', "names '.', but there is no file"),
        ('{"file_name": "", "text": "x"}\n', "names '', but there is no file"),
        ('{"file_name": "a.png", "text": "x", "picture": 1}\n', "would hide the picture"),
        ("", "metadata.jsonl names no picture"),
    ],
)
def test_wrong_metadata_is_named(tmp_path, metadata, message):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(metadata)
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path, 4)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (b"file_name,text\na.png,one, two\n", "line 2 does not have the 2 cells of the header"),
        (b"file_name,text\na.png\n", "line 2 does not have the 2 cells"),
        (b"file_name\na.png\n", "the column 'text' is missing"),
        (b"a.png,red\n", "metadata.csv names no picture"),
        (b'file_name,text\na.png,"red" boat\n', "line 2 is not CSV"),
        (b"file_name,text\na.png,\xff\xfe\n", "not UTF-8"),
    ],
)
def test_wrong_csv_is_named(tmp_path, metadata, message):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(metadata)
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path, 4)


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; expected a folder"):
        ImageFolder(tmp_path / "nowhere", 4)
    draw(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"a\.png is a file"):
        ImageFolder(tmp_path / "a.png", 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no pictures; expected \.bmp"):
        ImageFolder(tmp_path / "empty", 4)
    with pytest.raises(ValueError, match="size is 0"):
        ImageFolder(tmp_path, 0)
    draw(tmp_path / "b.png")
    lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "x"})
    with pytest.raises(ValueError, match=r"1 of 2 pictures have no line .* such as .*b\.png"):
        ImageFolder(tmp_path, 4)
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match="both metadata.jsonl and metadata.csv"):
        ImageFolder(tmp_path, 4)
    for other in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / other).unlink()
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"metadata\.parquet is not read; expected"):
        ImageFolder(tmp_path, 4)


def test_unreadable_pictures_are_named(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("hello")
    (tmp_path / "c.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.png is not a picture .*2 pictures cannot be read"):
        ImageFolder(tmp_path, 4)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.tif", "a.bmp"])
def test_truncated_pictures_are_found_by_check(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(pixels), name)
    ImageFolder(tmp_path, 4).check()
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(ValueError, match=name):
        ImageFolder(tmp_path, 4).check()
    with pytest.raises(ValueError, match=name):
        read_picture(path, 4)


def test_check_decodes_each_picture_once(tmp_path, monkeypatch):
    import companion.data

    draw(tmp_path / "a.png")
    rows = [{"file_name": "a.png", "text": str(i)} for i in range(5)]
    lines(tmp_path / "metadata.jsonl", *rows)
    seen = []
    real = companion.data.read_picture
    monkeypatch.setattr(companion.data, "read_picture", lambda *a: seen.append(a) or real(*a))
    folder = ImageFolder(tmp_path, 4)
    assert seen == [], "the constructor decodes nothing"
    folder.check()
    assert len(seen) == 1


def test_bit_flips_are_named_or_harmless(tmp_path):
    """Damage in the middle of a PNG is caught by its checksum; nothing but ValueError comes out."""
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(pixels))
    whole = bytearray(path.read_bytes())
    for at in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        path.write_bytes(damaged)
        try:
            x = read_picture(path, 8)
        except ValueError as problem:
            assert str(path) in str(problem)
        else:
            assert x.shape == (3, 8, 8) and x.isfinite().all()


def test_a_picture_too_large_to_be_honest_is_refused(tmp_path):
    """A tiny PNG that claims 60000 x 60000 pixels (a decompression bomb)."""

    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(ValueError, match=r"a\.png is not a picture that can be read"):
        ImageFolder(tmp_path, 4)
