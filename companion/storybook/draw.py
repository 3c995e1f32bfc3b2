"""Draw scenes with signed-distance functions.

A signed-distance function (SDF) tells, for each point, how far it is from the edge of a shape:
negative inside, positive outside. Painting is then one line: a pixel whose centre lies deeper than
half a pixel inside is covered, one farther than half a pixel outside is not, between the two the
cover falls linearly, which smooths edges (:meth:`Canvas.paint`).

The picture spans x from 0 (left) to 1 and y from 0 (top) to 1. Every layer is drawn for a whole
batch at once. Chance (clouds, pines, waves) comes from a hash of ``scene.seed``, so a scene is the
same picture at every size, in every batch, on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .scene import Scene, Thing

HORIZON = 0.56
TAU = 2 * math.pi


def rgb(code: str) -> Tensor:
    """ "#rrggbb" as three floats from 0 to 1."""
    return torch.tensor([int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)])


# Chosen so that any two are 15 or more apart (CIEDE2000), also for deuteranopes and protanopes.
PAINT = {
    "red": rgb("#b81a20"),
    "orange": rgb("#ea8a24"),
    "yellow": rgb("#ffe33d"),
    "green": rgb("#2a7d62"),
    "blue": rgb("#2e78e4"),
    "purple": rgb("#561d80"),
    "pink": rgb("#f5a8cd"),
    "white": rgb("#fffcf0"),
}
INK, CREAM, WOOD, DARK = rgb("#2a2233"), rgb("#fbf1dc"), rgb("#8a5a36"), rgb("#4a3d4c")

# The light that a sky throws on the land: a factor for red, green and blue.
LIGHT = {
    "noon": torch.tensor([1.00, 1.00, 1.00]),
    "dusk": torch.tensor([0.92, 0.70, 0.68]),
    "night": torch.tensor([0.44, 0.52, 0.78]),
    "rain": torch.tensor([0.72, 0.76, 0.80]),
    "aurora": torch.tensor([0.42, 0.66, 0.64]),
}
SKY = {  # colours at the top, in the middle, at the horizon
    "noon": ("#4c9fe0", "#8ccbf2", "#e4f5fb"),
    "dusk": ("#43307a", "#dd5f7d", "#ffbd6b"),
    "night": ("#0a1238", "#172863", "#3a5296"),
    "rain": ("#5d6874", "#86929d", "#bcc5cb"),
    "aurora": ("#05202c", "#0b4048", "#1f7a6c"),
}


# ---------------------------------------------------------------- shapes (distances, in any unit)


def circle(x: Tensor, y: Tensor, r: float | Tensor) -> Tensor:
    return (x.square() + y.square()).sqrt() - r


def box(x: Tensor, y: Tensor, half_width: float, half_height: float, round_by: float = 0.0):
    dx, dy = x.abs() - half_width + round_by, y.abs() - half_height + round_by
    outside = (dx.clamp(min=0).square() + dy.clamp(min=0).square()).sqrt()
    return outside + torch.maximum(dx, dy).clamp(max=0) - round_by


def line(x: Tensor, y: Tensor, a: tuple, b: tuple, thickness: float | Tensor) -> Tensor:
    """A stroke from a to b with round ends."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    t = (((x - a[0]) * dx + (y - a[1]) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return circle(x - a[0] - t * dx, y - a[1] - t * dy, thickness)


def convex(x: Tensor, y: Tensor, *corners: tuple[float, float]) -> Tensor:
    """A convex polygon, corners counter-clockwise where y points up."""
    d = None
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = math.hypot(bx - ax, by - ay)
        side = ((x - ax) * (by - ay) - (y - ay) * (bx - ax)) / length
        d = side if d is None else torch.maximum(d, side)
    return d


def union(*distances: Tensor) -> Tensor:
    d = distances[0]
    for other in distances[1:]:
        d = torch.minimum(d, other)
    return d


# ---------------------------------------------------------------- canvas and chance


class Canvas:
    """A batch of pictures (n, 3, h, w) under the brush, with the place of each pixel's centre.

    ``specks`` says whether ``speck`` paints: stars, drops, blossoms, waves, glints.
    """

    def __init__(
        self, colours: Tensor, x: Tensor, y: Tensor, pixel: float, specks: bool = True
    ) -> None:
        self.colours, self.x, self.y, self.pixel, self.specks = colours, x, y, pixel, specks

    def paint(
        self,
        distance: Tensor,
        colour: Tensor,
        alpha: float | Tensor = 1.0,
        soft: float = 0.0,
    ) -> None:
        """Cover what lies inside ``distance`` (n, h, w); ``soft`` widens the edge by so much."""
        cover = (0.5 - distance / max(self.pixel, soft)).clamp_(0, 1) * alpha
        if colour.ndim < 3:
            colour = colour.reshape(-1, 3, 1, 1)
        self.colours += cover.unsqueeze(-3) * (colour - self.colours)

    def speck(self, distance: Tensor, colour: Tensor, alpha: float | Tensor) -> None:
        """Paint what is a few pixels large, and where it is decided by chance alone."""
        if self.specks:
            self.paint(distance, colour, alpha)

    def shape(self, distance: Tensor, colour: Tensor, ink: Tensor, width: float = 0.011) -> None:
        """Paint with an outline, as in a picture book."""
        self.paint(distance - width, ink)
        self.paint(distance, colour)


class Chance:
    """Numbers from 0 to 1 that depend on the scene's seed and on their purpose, nothing else."""

    def __init__(self, seeds: Sequence[int]):
        self.seeds = torch.tensor(list(seeds), dtype=torch.int64)

    def __call__(self, purpose: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """One number a scene: (n, 1, 1)."""
        return low + (high - low) * self.at(torch.zeros(1, 1, 1), purpose)

    def at(self, cell: Tensor, purpose: int) -> Tensor:
        """One number a scene and cell; ``cell`` holds whole numbers, (1 or n, h, w)."""
        mask = 0x7FFFFFFF
        h = (cell.long() * 374761393 + purpose * 668265263) & mask
        h = (h ^ (self.seeds.view(-1, 1, 1) * 1274126177 & mask)) & mask
        for shift, factor in ((15, 739293847), (13, 1103515245), (16, 277803737)):
            h = ((h ^ (h >> shift)) * factor) & mask
        return ((h ^ (h >> 14)) & 0xFFFF).float() / 65536


def _mix(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    return a + (b - a) * t


# ---------------------------------------------------------------- skies


def _gradient(c: Canvas, sky: str) -> None:
    top, middle, low = (rgb(code).view(3, 1, 1) for code in SKY[sky])
    y = (c.y / HORIZON).clamp(0, 1)
    upper, lower = (y * 2).clamp(0, 1), (y * 2 - 1).clamp(0, 1)
    c.colours[:] = _mix(_mix(top, middle, upper), low, lower)


def _stars(c: Canvas, chance: Chance, alpha: float) -> None:
    step = 0.075
    i, j = (c.x / step).floor(), (c.y / step).floor()
    cell = i + 64 * j
    dx = c.x - (i + 0.2 + 0.6 * chance.at(cell, 1)) * step
    dy = c.y - (j + 0.2 + 0.6 * chance.at(cell, 2)) * step
    bright = chance.at(cell, 3)
    c.speck(circle(dx, dy, 0.007), rgb("#fff8dc"), alpha * (bright > 0.45) * bright)


def _cloud(c: Canvas, x: Tensor, y: Tensor, size: Tensor, colour: Tensor, alpha: float) -> None:
    dx, dy = (c.x - x) / size, (c.y - y) / size
    d = union(
        circle(dx + 0.5, dy, 0.28),
        circle(dx + 0.08, dy + 0.2, 0.4),
        circle(dx - 0.42, dy + 0.02, 0.3),
        box(dx, dy - 0.16, 0.74, 0.13, 0.12),
    )
    c.paint(torch.maximum(d, dy - 0.26) * size, colour, alpha)


def noon(c: Canvas, chance: Chance) -> None:
    x, y = (
        _mix(torch.tensor(0.16), torch.tensor(0.84), (chance(10) > 0.5).float()),
        chance(11, 0.13, 0.18),
    )
    c.paint(circle(c.x - x, c.y - y, 0.09), rgb("#fff6c4"), 0.75, soft=0.22)
    c.paint(circle(c.x - x, c.y - y, 0.075), rgb("#ffe26b"))
    for k, (left, right) in enumerate(((0.18, 0.34), (0.45, 0.62), (0.72, 0.9))):
        where, height = chance(12 + k, left, right), chance(15 + k, 0.1, 0.27)
        _cloud(c, where, height, chance(18 + k, 0.09, 0.13), rgb("#ffffff"), 0.92)


def dusk(c: Canvas, chance: Chance) -> None:
    x = chance(10, 0.3, 0.7)
    c.paint(circle(c.x - x, c.y - 0.47, 0.16), rgb("#ffe9a8"), 0.6, soft=0.34)
    c.paint(circle(c.x - x, c.y - 0.47, 0.12), rgb("#fff0b5"))
    for k in range(3):
        where, height = chance(11 + k, 0.1, 0.9), 0.1 + 0.1 * k + chance(14 + k, 0, 0.05)
        length = chance(17 + k, 0.12, 0.2)
        d = box((c.x - where) / length, (c.y - height) / 0.05, 1.0, 0.3, 0.3) * 0.05
        c.paint(d, rgb("#f58f86"), 0.7)


def night(c: Canvas, chance: Chance) -> None:
    _stars(c, chance, 1.0)
    x, y = (
        _mix(torch.tensor(0.2), torch.tensor(0.8), (chance(10) > 0.5).float()),
        chance(11, 0.14, 0.2),
    )
    c.paint(circle(c.x - x, c.y - y, 0.1), rgb("#cfd8ff"), 0.35, soft=0.2)
    crescent = torch.maximum(
        circle(c.x - x, c.y - y, 0.085), -circle(c.x - x - 0.042, c.y - y + 0.022, 0.072)
    )
    c.paint(crescent, rgb("#fff4cc"))


def rain(c: Canvas, chance: Chance) -> None:
    for k in range(5):
        where, height = 0.02 + 0.24 * k + chance(10 + k, -0.05, 0.05), chance(15 + k, 0.06, 0.17)
        shade = _mix(rgb("#46505b"), rgb("#6a7580"), k % 2)
        _cloud(c, where, height, chance(20 + k, 0.15, 0.22), shade, 0.95)


def aurora(c: Canvas, chance: Chance) -> None:
    _stars(c, chance, 0.8)
    for k, code in enumerate(("#7dffbf", "#4fe3c1", "#b18cff")):
        phase, swing = chance(10 + k, 0, TAU), chance(13 + k, 0.03, 0.06)
        foot = (
            0.36
            - 0.09 * k
            + swing * torch.sin(c.x * 7 + phase)
            + 0.02 * torch.sin(c.x * 19 + phase)
        )
        up = (foot - c.y) / 0.2  # 0 at the ribbon's foot, 1 where it has faded away
        glow = (1 - up).clamp(0, 1).square() * (up * 12).clamp(0, 1)
        rays = 0.75 + 0.25 * torch.sin(c.x * 46 + phase * 3)
        c.paint(torch.full_like(glow, -1.0), rgb(code), 0.85 * glow * rays)


def _rainfall(c: Canvas, chance: Chance) -> None:
    x = c.x + 0.22 * c.y  # streaks lean
    i = (x / 0.055).floor()
    slot = c.y / 0.16 + chance.at(i, 31)
    j = slot.floor()
    dx = x - (i + 0.5) * 0.055
    dy = (slot - j - 0.5) * 0.16
    keep = chance.at(i + 64 * j, 32) > 0.35
    c.speck(box(dx, dy, 0.0035, 0.035), rgb("#e8eef4"), 0.55 * keep)


# ---------------------------------------------------------------- places


def _hills(c: Canvas, chance: Chance, k: int, height: float, swing: float, waves: float) -> Tensor:
    """The line of a row of hills: (n, 1, w)."""
    return (
        height
        + swing * torch.sin(c.x * waves + chance(40 + k, 0, TAU))
        + 0.4 * swing * torch.sin(c.x * waves * 2.3 + chance(45 + k, 0, TAU))
    )


def meadow(c: Canvas, chance: Chance, light: Tensor) -> None:
    c.paint(_hills(c, chance, 0, 0.50, 0.035, 6.0) - c.y, rgb("#8fbf86") * light)
    c.paint(_hills(c, chance, 1, 0.585, 0.03, 5.0) - c.y, rgb("#7ab856") * light)
    near = _hills(c, chance, 2, 0.72, 0.02, 4.0) - c.y
    c.paint(near, rgb("#93cb58") * light)
    step = 0.085
    i, j = (c.x / step).floor(), (c.y / step).floor()
    cell = i + 64 * j
    dx = c.x - (i + 0.2 + 0.6 * chance.at(cell, 50)) * step
    dy = c.y - (j + 0.2 + 0.6 * chance.at(cell, 51)) * step
    kind = chance.at(cell, 52)
    for k, code in enumerate(("#fff7e0", "#ffe9a0", "#f7d3e3")):
        chosen = (kind > 0.3 * k) & (kind < 0.3 * k + 0.2)
        dots = torch.maximum(circle(dx, dy, 0.011), near + 0.02)
        c.speck(dots, rgb(code) * light, 1.0 * chosen)


def sea(c: Canvas, chance: Chance, light: Tensor) -> None:
    depth = ((c.y - HORIZON) / 0.3).clamp(0, 1)
    water = _mix(rgb("#2f7fb8").view(3, 1, 1), rgb("#63c3c9").view(3, 1, 1), depth)
    c.paint(HORIZON - c.y, water * light.view(3, 1, 1))
    i = (c.x / 0.15 + chance.at((c.y / 0.042).floor(), 50)).floor()
    j = (c.y / 0.042).floor()
    cell = i + 64 * j
    dx = c.x / 0.15 + chance.at(j, 50) - i - 0.3 - 0.4 * chance.at(cell, 51)
    dy = c.y / 0.042 - j - 0.5
    wave = torch.maximum(box(dx * 0.15, dy * 0.042, 0.032, 0.0045, 0.004), HORIZON + 0.02 - c.y)
    c.speck(wave, rgb("#e3f6f5") * (0.35 + 0.65 * light), 0.7 * (chance.at(cell, 52) > 0.3))
    shore = _hills(c, chance, 1, 0.845, 0.014, 6.0) - c.y
    c.paint(shore - 0.016, rgb("#f4fbf7") * (0.25 + 0.75 * light))
    c.paint(shore, rgb("#f1d9a0") * _warmed(light))


def desert(c: Canvas, chance: Chance, light: Tensor) -> None:
    light = _warmed(light)
    for k, (height, swing, waves, code) in enumerate(
        ((0.50, 0.045, 5.2, "#eab876"), (0.62, 0.05, 4.4, "#f0c27c"), (0.77, 0.035, 3.6, "#f6d08d"))
    ):
        phase = chance(40 + k, 0, TAU)
        crest = height - swing * (2 * (torch.sin(c.x * waves / 2 + phase)).abs() - 1)
        rising = torch.sin(c.x * waves + 2 * phase)  # which side of the crest
        sand = rgb(code).view(3, 1, 1) * light.view(3, 1, 1)
        shade = _mix(sand * 0.74, sand, (0.5 + 0.5 * rising).unsqueeze(-3))
        fade = ((c.y - crest) / 0.16).clamp(0, 1).unsqueeze(-3)
        c.paint(crest - c.y, _mix(shade, sand, fade))


def _warmed(light: Tensor) -> Tensor:
    """Light for sand: half of its tint taken out, so that sand stays sand under a blue moon."""
    return _mix(light, light.mean(), 0.5)


def _pine(dx: Tensor, up: Tensor, height: Tensor, width: float) -> Tensor:
    """Three stacked triangles on the ground; ``up`` is the height above it."""
    t = up / height
    layer = ((t * 3) % 1.0).clamp(0, 1)
    half = width * (1.08 - t) * (1.0 - 0.45 * layer)
    return torch.maximum(torch.maximum(dx.abs() - half, up - height), -up)


def _pines(c: Canvas, chance: Chance, k: int, foot: float, low: float, high: float, step: float):
    i = (c.x / step + chance(60 + k)).floor()
    dx = c.x + (chance(60 + k) - i - 0.5 - 0.3 * (chance.at(i, 64 + k) - 0.5)) * step
    height = low + (high - low) * chance.at(i, 68 + k)
    return dx, foot - c.y, height, i


def woods(c: Canvas, chance: Chance, light: Tensor) -> None:
    c.paint(0.50 - c.y, rgb("#5f8f5c") * light)
    rows = ((0.58, 0.24, 0.36, 0.10, "#5b8f74"), (0.63, 0.22, 0.33, 0.125, "#3f7558"))
    for k, (foot, low, high, step, code) in enumerate(rows):
        dx, up, height, _ = _pines(c, chance, k, foot, low, high, step)
        c.paint(_pine(dx, up, height, step * 0.52), rgb(code) * light)
        c.paint(box(dx, up, 0.009, 0.03), rgb("#4b3a30") * light)
    c.paint(_hills(c, chance, 1, 0.625, 0.012, 7.0) - c.y, rgb("#6d9a4d") * light)
    c.paint(_hills(c, chance, 2, 0.76, 0.016, 5.0) - c.y, rgb("#7fab57") * light)


def snow(c: Canvas, chance: Chance, light: Tensor) -> None:
    c.paint(_hills(c, chance, 0, 0.50, 0.04, 5.5) - c.y, rgb("#c3d6ea") * light)
    dx, up, height, i = _pines(c, chance, 0, 0.60, 0.11, 0.17, 0.12)
    stands = 1.0 * (chance.at(i, 72) > 0.35)
    c.paint(_pine(dx, up, height, 0.045), rgb("#4d7f7a") * light, stands)
    c.paint(
        torch.maximum(_pine(dx, up, height, 0.045), 0.66 * height - up),
        rgb("#f3f8fd") * light,
        stands,
    )
    c.paint(_hills(c, chance, 1, 0.585, 0.025, 5.0) - c.y, rgb("#dbe7f3") * light)
    c.paint(_hills(c, chance, 2, 0.73, 0.03, 4.2) - c.y, rgb("#eef4fa") * light)


def mountains(c: Canvas, chance: Chance, light: Tensor) -> None:
    peaks = (
        (0.5, 0.30, 1.05, "#8d93b0"),
        (0.12, 0.24, 1.25, "#7a80a3"),
        (0.86, 0.27, 1.2, "#6d7497"),
    )
    for k, (middle, top, slope, code) in enumerate(peaks):
        x = c.x - chance(50 + k, middle - 0.07, middle + 0.07)
        peak = chance(54 + k, top - 0.05, top + 0.04)
        d = (peak + x.abs() * slope - c.y) / math.hypot(1, slope)
        shade = torch.where(x > 0, 0.84, 1.0).unsqueeze(-3)
        c.paint(d, rgb(code).view(3, 1, 1) * light.view(3, 1, 1) * shade)
        zigzag = 0.022 * ((x * 16 + chance(58 + k)) % 1.0 * 2 - 1).abs()
        cap = torch.maximum(d, c.y - peak - 0.085 - zigzag)
        c.paint(
            cap,
            rgb("#f6f8fc").view(3, 1, 1) * (0.2 + 0.8 * light.view(3, 1, 1)) * (0.4 + 0.6 * shade),
        )
    c.paint(_hills(c, chance, 1, 0.585, 0.02, 5.0) - c.y, rgb("#7f9a6e") * light)
    c.paint(_hills(c, chance, 2, 0.74, 0.025, 4.0) - c.y, rgb("#96ae76") * light)


def _stream(c: Canvas, chance: Chance, light: Tensor, to: Tensor) -> None:
    """A ribbon that winds from the horizon to ``to`` (n, 1, 1) at the lower edge."""
    down = ((c.y - 0.61) / 0.39).clamp(0, 1)
    turn = 0.08 * (0.3 + down) * torch.sin(down * 5.5 + chance(80, 0, TAU))
    middle = _mix(chance(81, 0.44, 0.56), to, down) + turn * (1 - 0.45 * down)
    half = 0.006 + 0.115 * down**1.1
    d = torch.maximum((c.x - middle).abs() - half, 0.61 - c.y)
    c.paint(d - 0.012, c.colours * 0.62)  # the banks: the ground's own colour, darker
    water = _mix(rgb("#4aa3df"), rgb("#2e6fb0"), 0.25) * (0.3 + 0.7 * light)
    c.paint(d, water)
    for lane, offset in enumerate((-0.42, 0.05, 0.46)):  # glints that follow the flow
        flow = down**0.6 * 6 + chance.at(torch.tensor(lane).view(1, 1, 1), 82)
        j = flow.floor()
        at = (c.x - middle) / half - offset - 0.2 * (chance.at(j + 16 * lane, 83) - 0.5)
        glint = torch.maximum((at.abs() - 0.055) * half, ((flow - j - 0.5).abs() - 0.26) * 0.05)
        c.speck(glint, rgb("#d9f1fb") * (0.35 + 0.65 * light), 0.8 * (down > 0.04))


# ---------------------------------------------------------------- things
# Each draws in its own coordinates: p from -0.5 (left) to 0.5, q from 0 (the ground) up to 1.


class Brush:
    """Paints one kind of thing for several scenes: distances in units of the thing's height."""

    def __init__(self, canvas: Canvas, size: Tensor, colour: Tensor, light: Tensor):
        self.canvas, self.size, self.light = canvas, size, light
        self.colour = colour * light  # (n, 3)
        self.shade = self.colour * 0.80
        self.ink = _mix(INK, colour, 0.12) * light

    def fill(self, d: Tensor, colour: Tensor, alpha: float = 1.0) -> None:
        self.canvas.paint(d * self.size, colour, alpha)

    def lit(self, d: Tensor, colour: Tensor) -> None:
        self.fill(d, colour * self.light)

    def outlined(self, d: Tensor, colour: Tensor) -> None:
        self.canvas.shape(d * self.size, colour, self.ink)


def house(b: Brush, p: Tensor, q: Tensor) -> None:
    b.outlined(box(p - 0.19, q - 0.78, 0.055, 0.13), DARK * b.light)
    b.outlined(box(p, q - 0.27, 0.37, 0.27), b.colour)
    b.fill(torch.maximum(box(p, q - 0.27, 0.37, 0.27), 0.13 - p), b.shade)
    roof = convex(p, q, (-0.47, 0.53), (0.47, 0.53), (0.0, 0.95))
    b.outlined(roof, DARK * b.light)
    b.fill(box(p + 0.13, q - 0.15, 0.085, 0.16, 0.03), DARK * b.light)
    b.fill(box(p - 0.16, q - 0.28, 0.10, 0.10), DARK * b.light)
    b.fill(box(p - 0.16, q - 0.28, 0.075, 0.075), rgb("#ffe9a0"))


def tree(b: Brush, p: Tensor, q: Tensor) -> None:
    b.outlined(convex(p, q, (-0.09, 0.0), (0.09, 0.0), (0.055, 0.5), (-0.055, 0.5)), WOOD * b.light)
    crown = union(
        circle(p + 0.22, q - 0.55, 0.2), circle(p - 0.22, q - 0.55, 0.2), circle(p, q - 0.72, 0.26)
    )
    b.outlined(crown, b.colour)
    low = torch.maximum(crown, -circle(p + 0.07, q - 0.74, 0.36))
    b.fill(low, b.shade)


def boat(b: Brush, p: Tensor, q: Tensor) -> None:
    b.outlined(box(p + 0.02, q - 0.6, 0.02, 0.36), WOOD * b.light)
    b.outlined(convex(p, q, (0.03, 0.33), (0.4, 0.33), (0.03, 0.95)), b.colour)
    b.outlined(convex(p, q, (-0.36, 0.33), (-0.07, 0.33), (-0.07, 0.82)), CREAM * b.light)
    hull = convex(p, q, (-0.3, 0.0), (0.3, 0.0), (0.47, 0.27), (-0.47, 0.27))
    b.outlined(hull, b.colour)
    b.fill(torch.maximum(hull, 0.19 - q), b.shade)


def mushroom(b: Brush, p: Tensor, q: Tensor) -> None:
    b.outlined(box(p, q - 0.24, 0.13 + 0.05 * (0.4 - q), 0.25, 0.08), CREAM * b.light)
    cap = torch.maximum(circle(p, (q - 0.42) * 0.92, 0.46), 0.42 - q)
    b.outlined(cap, b.colour)
    b.fill(torch.maximum(cap, q - 0.50), b.shade)
    for x, y, r in ((-0.22, 0.6, 0.06), (0.05, 0.73, 0.075), (0.25, 0.57, 0.055)):
        b.lit(circle(p - x, q - y, r), CREAM)


def balloon(b: Brush, p: Tensor, q: Tensor) -> None:
    for side in (-1, 1):
        b.fill(line(p, q, (side * 0.2, 0.36), (side * 0.08, 0.12), 0.012), b.ink)
    b.outlined(box(p, q - 0.08, 0.1, 0.08, 0.02), WOOD * b.light)
    skin = union(
        circle(p, q - 0.64, 0.35),
        convex(p, q, (-0.12, 0.2), (0.12, 0.2), (0.3, 0.47), (-0.3, 0.47)),
    )
    b.outlined(skin, b.colour)
    gore = ((p / (0.36 - 0.4 * (q - 0.64).square())).abs() - 0.5).abs() - 0.14
    b.fill(torch.maximum(skin, gore * 0.3), b.shade)


def flower(b: Brush, p: Tensor, q: Tensor) -> None:
    stem = rgb("#3d6b2f")
    b.outlined(box(p, q - 0.25, 0.024, 0.25), stem * b.light)
    for side in (-1, 1):
        b.outlined(
            circle(
                (p * side - 0.15) * 0.7 + (q - 0.2) * 0.5, (q - 0.2) * 1.5 - p * side * 0.4, 0.085
            ),
            stem * b.light,
        )
    petals = union(
        *(
            circle(p - 0.22 * math.sin(TAU * k / 6), q - 0.68 - 0.22 * math.cos(TAU * k / 6), 0.14)
            for k in range(6)
        )
    )
    b.outlined(petals, b.colour)
    b.outlined(circle(p, q - 0.68, 0.125), rgb("#7a4a24") * b.light)


def tent(b: Brush, p: Tensor, q: Tensor) -> None:
    b.outlined(box(p, q - 0.83, 0.014, 0.16), WOOD * b.light)
    b.outlined(convex(p, q, (0.015, 0.86), (0.17, 0.91), (0.015, 0.97)), CREAM * b.light)
    b.outlined(convex(p, q, (-0.48, 0.0), (0.48, 0.0), (0.0, 0.78)), b.colour)
    b.fill(convex(p, q, (0.16, 0.0), (0.48, 0.0), (0.0, 0.78)), b.shade)
    b.fill(convex(p, q, (-0.15, 0.0), (0.15, 0.0), (0.0, 0.5)), DARK * b.light)


def cat(b: Brush, p: Tensor, q: Tensor) -> None:
    ring = circle(p - 0.27, q - 0.24, 0.16).abs() - 0.045
    b.outlined(torch.maximum(ring, -torch.maximum(0.27 - q, p - 0.33)), b.colour)
    body = union(circle(p, q - 0.23, 0.235), box(p, q - 0.09, 0.25, 0.09, 0.08))
    ears = union(
        convex(p, q, (-0.235, 0.66), (-0.04, 0.80), (-0.21, 0.96)),
        convex(p, q, (0.04, 0.80), (0.235, 0.66), (0.21, 0.96)),
    )
    head = circle(p, (q - 0.62) * 1.12, 0.25)
    b.outlined(body, b.colour)
    b.outlined(union(head, ears), b.colour)
    b.fill(torch.maximum(body, circle(p + 0.1, q - 0.62, 0.34)), b.shade)
    for side in (-1, 1):
        b.lit(circle(p - side * 0.1, q - 0.64, 0.056), CREAM)
        b.fill(circle(p - side * 0.1, q - 0.64, 0.03), INK)
    b.fill(circle(p, q - 0.55, 0.026), INK)


def car(b: Brush, p: Tensor, q: Tensor) -> None:
    cabin = convex(p, q, (-0.33, 0.36), (0.29, 0.36), (0.17, 0.66), (-0.22, 0.66))
    b.outlined(cabin - 0.015, b.colour)
    glass = rgb("#d6ecf5")
    b.lit(convex(p, q, (-0.26, 0.38), (-0.05, 0.38), (-0.05, 0.60), (-0.19, 0.60)), glass)
    b.lit(convex(p, q, (0.01, 0.38), (0.21, 0.38), (0.13, 0.60), (0.01, 0.60)), glass)
    hull = box(p, q - 0.26, 0.49, 0.14, 0.08)
    b.outlined(hull, b.colour)
    b.fill(torch.maximum(hull, q - 0.2), b.shade)
    b.lit(circle(p - 0.44, q - 0.29, 0.035), rgb("#ffeaa0"))
    for x in (-0.27, 0.27):
        b.fill(circle(p - x, q - 0.12, 0.125), INK)
        b.lit(circle(p - x, q - 0.12, 0.055), CREAM)


SKY_PAINTERS: dict[str, Callable] = {f.__name__: f for f in (noon, dusk, night, rain, aurora)}
PLACE_PAINTERS: dict[str, Callable] = {
    f.__name__: f for f in (meadow, sea, desert, snow, woods, mountains)
}
THING_PAINTERS: dict[str, Callable] = {
    f.__name__: f for f in (house, tree, boat, mushroom, balloon, flower, tent, cat, car)
}


# ---------------------------------------------------------------- the whole picture


def _ground(scene: Scene, thing: Thing) -> float:
    """How far down a thing stands: most on the near ground, boats afloat, balloons in the air."""
    if thing.kind == "balloon":
        return 0.62
    if thing.kind == "boat" and scene.place == "sea":
        return 0.83
    return 0.93


def _things(pictures: Tensor, scenes: Sequence[Scene], size: int, slot: int) -> None:
    pixel = 1.0 / size
    for kind, painter in THING_PAINTERS.items():
        rows = [
            i for i, s in enumerate(scenes) if len(s.things) > slot and s.things[slot].kind == kind
        ]
        if not rows:
            continue
        chosen = [scenes[i] for i in rows]
        things = [s.things[slot] for s in chosen]
        column = lambda values: torch.tensor(values).view(-1, 1, 1)  # noqa: E731
        middle, height = column([t.x for t in things]), column([t.size for t in things])
        ground = column([_ground(s, t) for s, t in zip(chosen, things, strict=True)])
        # Draw only in a window around each thing: the same number of pixels, at its own place.
        span = min(size, int(1.24 * height.max().item() * size) + 3)
        corner_x = ((middle - height * 0.62) * size).floor().long().clamp(0, size - span)
        corner_y = ((ground - height * 1.08) * size).floor().long().clamp(0, size - span)
        steps = torch.arange(span)
        ix, iy = corner_x + steps.view(1, 1, -1), corner_y + steps.view(1, -1, 1)
        where = (torch.tensor(rows).view(-1, 1, 1, 1), torch.arange(3).view(1, -1, 1, 1))
        where = (*where, iy.unsqueeze(1), ix.unsqueeze(1))
        canvas = Canvas(pictures[where], (ix + 0.5) * pixel, (iy + 0.5) * pixel, pixel)
        p, q = (canvas.x - middle) / height, (ground - canvas.y) / height
        if kind != "balloon":
            canvas.paint(circle(p, q * 4, 0.46) * height, INK, 0.28, soft=0.05)
        light = torch.stack([0.82 + 0.18 * LIGHT[s.sky] for s in chosen])
        colour = torch.stack([PAINT[t.colour] for t in things])
        painter(Brush(canvas, height, colour, light), p, q)
        pictures[where] = canvas.colours


def _draw(scenes: Sequence[Scene], size: int, specks: bool) -> Tensor:
    n, pixel = len(scenes), 1.0 / size
    pictures = torch.empty(n, 3, size, size)
    at = (torch.arange(size) + 0.5) * pixel
    x, y = at.view(1, 1, -1), at.view(1, -1, 1)
    for sky, paint_sky in SKY_PAINTERS.items():
        for place, paint_place in PLACE_PAINTERS.items():
            rows = [i for i, s in enumerate(scenes) if (s.sky, s.place) == (sky, place)]
            if not rows:
                continue
            chance, light = Chance([scenes[i].seed for i in rows]), LIGHT[sky]
            canvas = Canvas(torch.empty(len(rows), 3, size, size), x, y, pixel, specks)
            _gradient(canvas, sky)
            paint_sky(canvas, chance)
            paint_place(canvas, chance, light)
            wet = [k for k, i in enumerate(rows) if scenes[i].stream]
            if wet:
                ends = torch.tensor([_stream_end(scenes[rows[k]]) for k in wet]).view(-1, 1, 1)
                part = Canvas(canvas.colours[wet], x, y, pixel, specks)
                _stream(part, Chance([scenes[rows[k]].seed for k in wet]), light, ends)
                canvas.colours[wet] = part.colours
            if sky == "rain":
                _rainfall(canvas, chance)
            pictures[rows] = canvas.colours
    for slot in range(2):
        _things(pictures, scenes, size, slot)
    return pictures.clamp_(0, 1)


def _stream_end(scene: Scene) -> float:
    """Where the stream leaves the picture: beside what stands in the foreground."""
    where = [t.position for t in scene.things]
    if where == ["left"]:
        return 0.68
    if where == ["right"]:
        return 0.32
    if where == ["middle"]:
        return 0.16 if scene.seed % 2 else 0.84
    return 0.5 if where else 0.4 + 0.2 * (scene.seed % 97) / 96


FINEST = 64  # smaller pictures are exact averages of the one drawn at 64 pixels


def render(scenes: Scene | Sequence[Scene], size: int = 64, *, specks: bool = True) -> Tensor:
    """Draw scenes.

    Args:
        scenes: one scene or several.
        size: width and height in pixels. Sizes under 64 must divide 64: they are drawn at 64 and
            averaged, so that a 16-pixel picture is exactly the small version of the 64-pixel one.
        specks: False leaves out stars, raindrops, blossoms, waves and the glints of a stream: the
            details of a few pixels whose places no caption tells. All else is the same.

    Returns:
        (B, 3, size, size) float32, from 0 to 1.
    """
    scenes = [scenes] if isinstance(scenes, Scene) else list(scenes)
    for scene in scenes:
        if not isinstance(scene, Scene):
            raise TypeError(f"render draws Scene objects, got {type(scene).__name__}")
    if not isinstance(size, int) or isinstance(size, bool) or not 4 <= size <= 2048:
        raise ValueError(f"size is a whole number of pixels from 4 to 2048, got {size!r}")
    if size < FINEST and FINEST % size:
        raise ValueError(f"a size under {FINEST} must divide it (4, 8, 16, 32), got {size}")
    if not scenes:
        return torch.empty(0, 3, size, size)
    drawn_at = max(size, FINEST)
    chunk = max(1, (64 * FINEST**2) // drawn_at**2)  # bounded memory at any size
    with torch.no_grad():
        parts = [
            _draw(scenes[i : i + chunk], drawn_at, specks) for i in range(0, len(scenes), chunk)
        ]
        pictures = torch.cat(parts)
        if size < drawn_at:
            pictures = torch.nn.functional.avg_pool2d(pictures, drawn_at // size)
    return pictures
