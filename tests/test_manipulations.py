"""Ways between pictures, and back to their noise, held to closed forms."""

import math

import numpy as np
import pytest
import tiny
import torch
from scipy.spatial import geometric_slerp

from companion.dalle2 import DALLE2
from companion.manipulations import slerp


def gen(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(n: int, d: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, d, generator=gen(seed), dtype=torch.float64)


# --- along the arc -------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 3, 24])
def test_directions_turn_as_scipy_turns_them(d):
    a, b = vectors(2, d).split(1)
    shares = torch.linspace(0, 1, 7, dtype=torch.float64)
    found = slerp(a, b, shares)
    u, v = ((x / x.norm()).numpy()[0] for x in (a, b))
    wanted = torch.from_numpy(geometric_slerp(u, v, shares.numpy()))
    torch.testing.assert_close(found / found.norm(dim=1, keepdim=True), wanted)
    lengths = a.norm() + shares * (b.norm() - a.norm())
    torch.testing.assert_close(found.norm(dim=1), lengths)
    torch.testing.assert_close(found[[0, -1]], torch.cat([a, b]))


def test_a_quarter_circle_by_hand():
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    third = slerp(a, b, 1 / 3)  # 30 degrees, length 3 - 2/3
    wanted = 7 / 3 * torch.tensor([[math.cos(math.pi / 6), math.sin(math.pi / 6)]])
    torch.testing.assert_close(third, wanted)
    assert third.dtype == torch.float32
    # The straight line would pass nearer to the middle: its noise is too weak.
    torch.testing.assert_close(slerp(a / 3, b, 0.5).norm(), torch.tensor(1.0))


def test_many_rows_and_one_share():
    a, b = vectors(4, 5), vectors(4, 5, 2)
    each = torch.cat([slerp(x[None], y[None], 0.3) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(slerp(a, b, 0.3), each)


def test_nearly_the_same_and_nearly_opposite_directions():
    """Digits survive where an arccos would lose them."""
    a = vectors(1, 6)
    assert torch.equal(slerp(a, a, 0.4), a) or (slerp(a, a, 0.4) - a).abs().max() < 1e-15
    side = vectors(1, 6, 2)
    side = side - (side @ a.T) / (a @ a.T) * a  # at right angles
    for tiny_angle in (1e-3, 1e-9):
        b = a * math.cos(tiny_angle) + side * (a.norm() / side.norm()) * math.sin(tiny_angle)
        moved = (slerp(a, b, 0.25) - a).norm() / a.norm()
        assert abs(moved.item() / (tiny_angle / 4) - 1) < 1e-4
    with pytest.raises(ValueError, match="opposite directions"):
        slerp(a, -2 * a, 0.5)
    with pytest.raises(ValueError, match="length 0"):
        slerp(a, 0 * a, 0.5)


# --- back to the noise ---------------------------------------------------------------------------


@pytest.fixture
def pipe():
    return tiny.dalle2(second=False)


SPREAD = 0.3


def world(pipe, monkeypatch) -> None:
    """A decoder that knows its pictures: normal around a mean that the place in CLIP's space says.

    The best answer at any noise level is then known, and so is every step of DDIM.
    """

    def decoding(embedding, words, null, scale):
        middle = mean(embedding)

        def denoise(x, t):
            abar = pipe.decoder_scheduler.schedule.alphas_cumprod[t][:, None, None, None]
            share = abar.sqrt() * SPREAD**2 / (abar * SPREAD**2 + 1 - abar)
            return middle + share * (x - abar.sqrt() * middle)

        return denoise

    monkeypatch.setattr(pipe, "decoding", decoding)
    for part in pipe._networks():
        part.double()


def mean(embedding: torch.Tensor) -> torch.Tensor:
    return 0.3 * torch.tanh(embedding[:, :3, None, None]).expand(-1, -1, 8, 8)


def step_factor(schedule, timesteps) -> tuple[float, float]:
    """How DDIM shrinks a picture's distance from the mean on its whole way; and the first abar."""
    levels = [*schedule.alphas_cumprod[timesteps].tolist(), 1.0]
    whole = 1.0
    for a, b in zip(levels, levels[1:], strict=False):
        k = math.sqrt(a) * SPREAD**2 / (a * SPREAD**2 + 1 - a)
        c = (1 - math.sqrt(a) * k) / math.sqrt(1 - a)  # of the noise
        whole *= math.sqrt(b) * k + math.sqrt(1 - b) * c
    return whole, levels[0]


def near(pipe, seed: int, n: int = 1) -> torch.Tensor:
    """Pictures that this world could have drawn, in [0, 1]."""
    x = 0.5 + 0.1 * torch.randn(n, 3, 8, 8, generator=gen(seed), dtype=torch.float64)
    return x.clamp(0.2, 0.8)


def test_a_pictures_own_noise_in_closed_form(pipe, monkeypatch):
    world(pipe, monkeypatch)
    image = near(pipe, 1, 2)
    z, x_T = pipe.invert(image, steps=20, iterations=80)
    assert torch.equal(z, pipe.encode_image(image)) and z.shape == (2, 8)
    shrunk, abar = step_factor(pipe.decoder_scheduler.schedule, torch.arange(950, -1, -50))
    wanted = abar**0.5 * mean(z) + (2 * image - 1 - mean(z)) / shrunk
    torch.testing.assert_close(x_T, wanted)
    # Where steps are small the whole walk is the flow's: distances in units of the spread stay.
    flow = (2 * image - 1 - mean(z)) / SPREAD * (abar * SPREAD**2 + 1 - abar) ** 0.5
    fine = pipe.invert(image, steps=250)[1]
    apart = (fine - abar**0.5 * mean(z) - flow).abs().max() / flow.abs().max()
    assert apart < 0.03


def test_both_halves_together_are_the_picture(pipe, monkeypatch):
    world(pipe, monkeypatch)
    small = []
    monkeypatch.setattr(pipe, "draw_large", lambda x, *_: small.append(x) or x)
    image = near(pipe, 1)
    for iterations, off in ((80, 1e-9), (2, 0.05)):
        z, x_T = pipe.invert(image, steps=20, iterations=iterations)
        back = pipe.variations(image, eta=0, steps=(20, 2), latents=(x_T, None), seed=1)
        assert (back - image).abs().max() < off
    by_itself = pipe.variations(image, eta=0, steps=(20, 2), seed=1)
    assert torch.equal(by_itself, back), "without latents it finds them, asking twice"
    two = near(pipe, 1, 2)
    each = pipe.variations(two, eta=0, steps=(20, 2), seed=1, num_images_per_prompt=2)
    assert (each - two.repeat_interleave(2, dim=0)).abs().max() < 0.05
    other = pipe.variations(image, eta=0, steps=(20, 2), latents=(x_T.flip(3), None), seed=1)
    assert (other - image).abs().max() > 0.1, "the noise holds what the place does not"


def test_eta_keeps_the_place_and_lets_the_rest_go(pipe, monkeypatch):
    world(pipe, monkeypatch)
    monkeypatch.setattr(pipe, "draw_large", lambda x, *_: x)
    image = near(pipe, 1)
    kept = {}
    for eta in (0.0, 0.3, 1.0):
        many = pipe.variations(
            image, eta=eta, steps=(50, 2), seed=1, num_images_per_prompt=40
        )  # fmt: skip
        kept[eta] = torch.corrcoef(
            torch.cat([image.flatten(1), many.flatten(1)])
        )[0, 1:].mean().item()  # fmt: skip
        spread = many.std(dim=0).mean().item()
        assert (spread < 1e-9) == (eta == 0)
    assert kept[0.0] > 0.999 and kept[0.0] > kept[0.3] + 0.1 and kept[0.3] > kept[1.0] + 0.1
    assert abs(kept[1.0]) < 0.35, "nearly nothing of the picture's own noise is left"
    middle = (1 + mean(pipe.encode_image(image))) / 2
    torch.testing.assert_close(many.mean(0, keepdim=True), middle, atol=0.12, rtol=0)


def test_pictures_between_two_start_from_one_noise_or_from_their_own(pipe, monkeypatch):
    world(pipe, monkeypatch)
    seen = {}

    def draw_small(places, words, null, walk, *_):
        seen.update(places=places, walk=walk)
        return small(places, words, null, walk, *_)

    small = pipe.draw_small
    monkeypatch.setattr(pipe, "draw_small", draw_small)
    large = []
    monkeypatch.setattr(pipe, "draw_large", lambda x, walk, *_: large.append(walk) or x)
    a, b = near(pipe, 1), near(pipe, 2)
    pictures = pipe.interpolate(a, b, 4, steps=(20, 3), seed=5)
    assert pictures.shape[0] == len(seen["places"]) == 4
    ends = pipe.encode_image(a), pipe.encode_image(b)
    torch.testing.assert_close(seen["places"], slerp(*ends, torch.linspace(0, 1, 4).double()))
    g = gen(5)
    for walk, n in ((seen["walk"], 8), (large[0], 16)):
        noise = torch.randn(1, 3, n, n, generator=g, dtype=torch.float64)
        assert torch.equal(walk.latents, noise.expand(4, -1, -1, -1)) and walk.sampler == "ddim"
    assert (pictures[0] - a).abs().max() > 0.1

    own = pipe.interpolate(a, b, 3, own=True, steps=(20, 3), seed=5)
    for end, picture, i in ((a, own[:1], 0), (b, own[-1:], -1)):
        assert (picture - end).abs().max() < 0.05, "the ends are the pictures themselves"
        x_T = pipe.invert(end, steps=20)[1]
        torch.testing.assert_close(seen["walk"].latents[i], x_T[0])
    halves = [pipe.invert(x, steps=20)[1].flatten(1) for x in (a, b)]
    torch.testing.assert_close(seen["walk"].latents[1].flatten(), slerp(*halves, 0.5)[0])


def test_a_change_told_in_words(pipe, monkeypatch):
    world(pipe, monkeypatch)
    seen = {}
    small = pipe.draw_small

    def draw_small(places, words, null, walk, *_):
        seen.update(places=places, walk=walk, words=words, null=null)
        return small(places, words, null, walk, *_)

    monkeypatch.setattr(pipe, "draw_small", draw_small)
    monkeypatch.setattr(pipe, "draw_large", lambda x, *_: x)
    image = near(pipe, 1)
    pictures = pipe.text_diff(image, "a red house", "the sea", 3, theta=0.3, steps=(20, 2), seed=1)
    z = pipe.encode_image(image).numpy()[0]
    said = pipe.encode_prompts(["the sea", "a red house"]).embedding.numpy()
    said = said / np.linalg.norm(said, axis=1, keepdims=True)
    change = said[0] - said[1]
    u, v = z / np.linalg.norm(z), change / np.linalg.norm(change)
    turned = geometric_slerp(u, v, [0, 0.15, 0.3]) * np.linalg.norm(z)
    torch.testing.assert_close(seen["places"], torch.from_numpy(turned))
    x_T = pipe.invert(image, steps=20)[1]
    torch.testing.assert_close(seen["walk"].latents, x_T.expand(3, -1, -1, -1))
    assert (pictures[0] - image[0]).abs().max() < 0.05, "at theta 0, the picture itself"
    apart = [(p - image[0]).abs().mean().item() for p in pictures]
    assert apart[0] < apart[1] < apart[2]
    nothing = pipe.encode_prompts([""] * 3)
    assert all(map(torch.equal, (*seen["words"], *seen["null"]), (*nothing, *nothing)))
    # With any noise instead of its own, the first picture has the place but not the rest.
    other = pipe.text_diff(image, "a red house", "the sea", 3, own=False, steps=(20, 2), seed=1)
    assert (other[0] - image[0]).abs().max() > 0.1


def test_the_walk_back_keeps_away_from_where_nothing_is_left(pipe):
    """Karlo's last row has a signal of 5e-5; a walk from there cannot be walked back."""
    plan = pipe._plan(pipe._pixels, None, None, None, None, None, own=True)
    assert plan[0].timesteps.tolist() == list(range(960, -1, -40)) and plan[0].sampler == "ddim"
    usual = pipe._plan(pipe._pixels, None, None, None, None, None)
    assert usual[0].timesteps[0] == 999 and usual[0].sampler == "ddpm"
    assert plan[1].sampler == usual[1].sampler == "ddpm", "the upsampler's walk stays as it was"
    assert torch.equal(plan[1].timesteps, usual[1].timesteps)


IMAGE = torch.full((1, 3, 8, 8), 0.5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: p.variations(IMAGE, eta=1.5), "eta is 1.5"),
        (lambda p: p.variations(IMAGE, eta=0.5, sampler="euler"), "eta is DDIM's"),
        (lambda p: p.variations(IMAGE, eta=0.5, height=32), "own noise is square"),
        (lambda p: p.variations(IMAGE[0]), "image has shape"),
        (lambda p: p.variations(IMAGE, num_images_per_prompt=0), "num_images_per_prompt is 0"),
        (lambda p: p.variations(IMAGE, steps=(5, 5, 5)), "2 values, for decoder, upsampler"),
        (lambda p: p.variations(IMAGE, eta=0, latents=(torch.zeros(1, 3, 4, 4), None)),
         "latents has shape"),
        (lambda p: p.invert(IMAGE, iterations=0), "iterations is 0"),
        (lambda p: p.invert(IMAGE, steps=0), "steps is 0"),
        (lambda p: p.interpolate(IMAGE.expand(2, -1, -1, -1), IMAGE), "a has shape"),
        (lambda p: p.interpolate(IMAGE, IMAGE + 1), "b runs from"),
        (lambda p: p.interpolate(IMAGE, IMAGE, 1), "n is 1"),
        (lambda p: p.interpolate(IMAGE, IMAGE, latents=(torch.zeros(2, 3, 8, 8), None)),
         "latents has shape"),
        (lambda p: p.text_diff(IMAGE, "a", "b", theta=2.0), "theta is 2.0"),
        (lambda p: p.text_diff(IMAGE, "a house", "a house"), "the same to CLIP"),
        (lambda p: p.text_diff(IMAGE, ["a", "b"], "c"), "before has 2 texts"),
        (lambda p: p.text_diff(IMAGE, "house " * 20, "c"), "truncate=True"),
        (lambda p: p.text_diff(IMAGE, "a", "b", guidance_scale=math.nan), "guidance_scale is nan"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_before_any_work(pipe, monkeypatch, call, said):
    def no_work(*_args, **_options):
        raise AssertionError("the decoder was asked")

    monkeypatch.setattr(pipe.decoder, "forward", no_work)
    with pytest.raises(ValueError, match=said):
        call(pipe)


def test_pictures_need_a_picture_encoder(pipe):
    pipe = DALLE2(**{n: getattr(pipe, n) for n in DALLE2.parts
                     if n not in ("image_encoder", "feature_extractor")})  # fmt: skip
    for call in (
        lambda: pipe.variations(IMAGE),
        lambda: pipe.invert(IMAGE),
        lambda: pipe.interpolate(IMAGE, IMAGE),
        lambda: pipe.text_diff(IMAGE, "a", "b"),
    ):
        with pytest.raises(ValueError, match="no image_encoder, which pictures need"):
            call()
