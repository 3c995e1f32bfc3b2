"""The recipes of DALL·E 2: what a step sees and compares, that CLIP stays as it is, scores."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import scipy.ndimage
import tiny_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion import checkpoints, data, prompts
from companion.adm import ADMUNet
from companion.clip import CLIP, MEAN, STD, CLIPText
from companion.preparation import scaled
from companion.prior import Prior, TextProjection
from companion.prior_ar import ARPrior
from companion.recipes import RECIPES, encoded, noised, priors, upsamplers
from companion.recipes import decoder as decoders
from companion.recipes.decoder import Decoder
from companion.recipes.encoded import Encoded, FrozenCLIP
from companion.storybook import KINDS, PLACES, SKIES, Facts, is_held_out, parse, render, sample
from companion.tokenizer import Tokenizer
from companion.train import Recipe, build, draw, train

MINE = [r.name for family in (priors, decoders, upsamplers, noised) for r in family.RECIPES]
ON_CLIP = ("prior", "prior-ar", "decoder")


@pytest.fixture(scope="module", autouse=True)
def weights(tmp_path_factory) -> Path:
    """A tiny CLIP in place of the shipped one, and a small pool of pictures."""
    folder = tiny_clip.write(tmp_path_factory.mktemp("weights"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "WEIGHTS", folder)
        patch.setattr(encoded, "MEASURED", 128)
        yield folder


@pytest.fixture(scope="module")
def pool() -> Encoded:
    return Encoded(scenes=128)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def abar(t: Tensor) -> Tensor:
    """The cosine schedule, written out: Improved DDPM eq. 17, betas at most 0.999."""
    f = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2)
    betas = (1 - (f[1:] / f[:-1]) ** 2).clamp(max=0.999)
    return torch.cumprod(1 - betas, 0)[t]


def noisy(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    level = abar(t).view(-1, *[1] * (x0.ndim - 1))
    return level.sqrt() * x0 + (1 - level).sqrt() * noise


def batches(recipe: Recipe, source: object, steps: int) -> list[dict[str, Tensor]]:
    return [draw(recipe, source, step) for step in range(steps)]


# --- pictures and captions as CLIP reads them ----------------------------------------------------


def test_a_batch_holds_what_clip_makes_of_scene_and_caption(pool, weights, monkeypatch):
    """Against the towers' own forward, one picture and one caption at a time."""
    texts = []
    read = FrozenCLIP.read
    monkeypatch.setattr(FrozenCLIP, "read", lambda s, t: (texts.extend(t), read(s, t))[1])
    indices = torch.tensor([3, 70, 127])
    batch = pool.batch(indices, gen(), 0.0)
    clip = CLIP.from_pretrained(weights / "clip")
    words = CLIPText.from_pretrained(weights / "text-encoder")  # another text tower, taught on
    tokenizer = Tokenizer.from_pretrained(weights / "clip")
    scenes = [pool.group(i // 64).about[i % 64] for i in indices.tolist()]
    for k, (scene, text) in enumerate(zip(scenes, texts, strict=True)):
        picture = render(scene, 64)
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        with torch.no_grad():
            place = clip.encode_image((picture - mean) / std)[0]
            ids = tokenizer([text]).ids
            said = words(ids)
            states, embedding = said.states[0], clip.text_projection(said.pooled)[0]
        torch.testing.assert_close(batch["embedding"][k], place, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch["text"][k], embedding, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch["states"][k], states, rtol=1e-4, atol=1e-5)
        small = picture.view(3, 16, 4, 16, 4).mean((2, 4))
        assert ((batch["small"][k] + 1) / 2 - small).abs().max() <= 0.5 / 255 + 1e-6
        assert len(batch["mask"][k]) == 40
        assert batch["mask"][k].sum() == 2 + len(tokenizer.pieces(text))
        assert parse(text).holds_for(scene.facts()) and text


def test_first_in_order_then_each_once_an_epoch(pool):
    marked = torch.cat([pool.group(k).embedding for k in range(2)])

    def places(epoch: int) -> list[int]:
        seen = pool.batch(torch.arange(128) + 128 * epoch, gen(), 1.0)["embedding"]
        return [int((marked == row).all(1).nonzero()[0]) for row in seen]

    assert places(0) == list(range(128))
    assert sorted(places(1)) == sorted(places(2)) == list(range(128))
    assert places(1) != places(0) and places(1) != places(2)


def test_no_pool_holds_a_combination_that_is_held_out(pool):
    scenes = [scene for k in range(2) for scene in pool.group(k).about]
    assert not any(map(is_held_out, scenes)) and len({s.seed for s in scenes}) == 128
    assert any(map(is_held_out, sample(128, gen(), held_out=None))), "the check sees them"


@pytest.mark.parametrize(("name", "share"), [("prior", 0.1), ("prior-ar", 0.1), ("decoder", 0.5)])
def test_captions_are_left_out_as_often_as_the_paper_says(pool, name, share):
    """Left out means: the empty caption, encoded. 4 standard deviations."""
    recipe = RECIPES[name]
    found = [recipe.batch(torch.arange(128) + 128 * k, gen(k), pool) for k in range(8)]
    empty = torch.cat([b["mask"].sum(1) == 2 for b in found])
    n = len(empty)
    assert abs(empty.double().mean() - share) < 4 * (share * (1 - share) / n) ** 0.5
    null = pool.clip.read([""])
    for key, wanted in zip(("text", "states"), (null.embedding, null.states), strict=True):
        told = torch.cat([b[key] for b in found])[empty]
        torch.testing.assert_close(told, wanted.expand_as(told), rtol=1e-4, atol=1e-5)


def test_the_place_is_left_out_of_one_decoding_in_ten(pool):
    """Whatever becomes of the caption: 5 % of all have neither."""
    found = [RECIPES["decoder"].batch(torch.arange(128) + 128 * k, gen(k), pool) for k in range(16)]
    away = torch.cat([b["no picture"] for b in found])
    neither = away & (torch.cat([b["mask"].sum(1) for b in found]) == 2)
    assert abs(away.double().mean() - 0.1) < 4 * (0.09 / len(away)) ** 0.5
    assert abs(neither.double().mean() - 0.05) < 4 * (0.0475 / len(away)) ** 0.5


@pytest.mark.parametrize("name", ON_CLIP)
def test_clip_is_frozen(name, pool, weights, tmp_path, monkeypatch):
    """Not one of its numbers moves in training, and its files stay as they are."""
    before = {k: x.clone() for k, x in pool.clip.clip.state_dict().items()}
    files = {p: p.read_bytes() for p in sorted((weights / "clip").iterdir())}
    recipe = replace(RECIPES[name], data=lambda folder: pool, sample=None, score=None)
    train(recipe, tmp_path / "run", steps=3, batch_size=16, quiet=True, device="cpu")
    after = pool.clip.clip.state_dict()
    assert all(torch.equal(x, after[k]) for k, x in before.items())
    assert files == {p: p.read_bytes() for p in sorted((weights / "clip").iterdir())}
    assert not any(p.requires_grad for p in pool.clip.clip.parameters())
    assert all(p.grad is None for p in pool.clip.clip.parameters())
    trained = build(recipe, pool)
    own = {p.data_ptr() for p in pool.clip.clip.parameters()}
    assert not own & {p.data_ptr() for p in trained.parameters()}
    assert checkpoints.check(tmp_path / "run" / "final") == []


# --- the diffusion prior -------------------------------------------------------------------------


class PriorOracle(nn.Module):
    """Knows the clean place, checks what it is shown, and answers with it plus ``off``."""

    def __init__(self, prior: Prior, batch: dict[str, Tensor], off: float) -> None:
        super().__init__()
        self.prior, self.batch, self.off = prior, batch, off

    def rescale(self, x: Tensor) -> Tensor:
        return self.prior.rescale(x)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        b = self.batch
        mean, std = self.prior.clip_mean, self.prior.clip_std
        clean = (b["embedding"] - mean) / std
        torch.testing.assert_close(x.double(), noisy(clean, b["noise"], t), rtol=1e-4, atol=1e-5)
        for told, wanted in zip((text, states, mask), ("text", "states", "mask"), strict=True):
            assert told is b[wanted]
        return clean + self.off


def test_the_prior_predicts_the_clean_place(pool):
    recipe = RECIPES["prior"]
    prior, batch = build(recipe, pool), draw(recipe, pool, 0)
    known, _ = pool.measured()
    torch.testing.assert_close(prior.clip_mean[0], known.mean(0))
    torch.testing.assert_close(prior.clip_std[0], known.std(0))
    assert not prior.clip_mean.requires_grad and not prior.clip_std.requires_grad
    assert batch["t"].min() >= 0 and batch["t"].max() <= 999 and len(batch["t"].unique()) > 60
    for off in (0.0, 0.5):
        loss, _ = recipe.loss(PriorOracle(prior, batch, off), batch, pool)
        assert loss.item() == pytest.approx(off**2, abs=1e-6)


def test_guidance_of_the_prior_is_the_formula(pool):
    """Two steps by hand: x0 = null + s (given - null), cut to 5, then the posterior's mean."""
    prior = build(RECIPES["prior"], pool).eval()
    words, null = pool.clip.read(["a red house", "at night"]), pool.clip.read(["", ""])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(priors, "STEPS", 2)
        drawn = priors.draw_by_diffusion(prior, words, null, gen(4), 3.0)
        x = torch.randn(2, tiny_clip.WIDTH, generator=gen(4))
        g = gen(4)
        torch.randn(2, tiny_clip.WIDTH, generator=g)
        for t, before in ((999, 0), (0, None)):
            t_ = torch.tensor([t])
            given, nothing = (prior(x, t_, *w) for w in (words, null))
            clean = (nothing + 3 * (given - nothing)).clamp(-5, 5).double()
            if before is None:
                break
            a, b = abar(torch.tensor(t)), abar(torch.tensor(before))
            beta = 1 - a / b
            mean = b.sqrt() * beta / (1 - a) * clean + (1 - beta).sqrt() * (1 - b) / (1 - a) * x
            noise = torch.randn(2, tiny_clip.WIDTH, generator=g)
            x = (mean + ((1 - b) / (1 - a) * beta).sqrt() * noise).float()
        wanted = clean * prior.clip_std + prior.clip_mean
    torch.testing.assert_close(drawn.double(), wanted.double(), rtol=1e-4, atol=1e-4)


# --- the autoregressive prior --------------------------------------------------------------------


class Table(nn.Module):
    """Puts ``share`` of the probability on the right token, and remembers the dot products."""

    def __init__(self, prior: ARPrior, share: float) -> None:
        super().__init__()
        self.prior, self.share, self.config = prior, share, prior.config
        self.quantise, self.dot, self.seen = prior.quantise, prior.dot, None

    def forward(self, text: Tensor, states: Tensor, mask: Tensor, dot: Tensor, codes: Tensor):
        self.seen = dot
        m = self.config.buckets
        rest = (1 - self.share) / (m - 1)
        p = torch.full((*codes.shape, m), rest, dtype=torch.float64)
        return p.scatter(2, codes[..., None], self.share).log()


def test_the_loss_of_the_tokens_is_minus_the_log_of_what_was_given_to_the_right_ones(pool):
    recipe = RECIPES["prior-ar"]
    prior, batch = build(recipe, pool), draw(recipe, pool, 0)
    for share in (1 / 64, 0.3):
        table = Table(prior, share)
        loss, metrics = recipe.loss(table, batch, pool)
        assert loss.item() == pytest.approx(-math.log(share), rel=1e-6)
    assert metrics["right"] == 1
    empty = batch["mask"].sum(1) == 2
    assert empty.any() and (table.seen[empty] == 32).all() and (table.seen[~empty] < 32).all()
    wanted = torch.bucketize((batch["embedding"] * batch["text"]).sum(1), prior.dot_edges)
    assert torch.equal(table.seen[~empty], wanted[~empty])


def test_the_axes_hold_99_percent_of_the_variance(pool):
    prior, (known, _) = build(RECIPES["prior-ar"], pool), pool.measured()
    x = (known - known.mean(0)).double()
    left = x - x @ prior.axes.double().T @ prior.axes.double()
    assert left.square().sum() / x.square().sum() < 0.01
    fewer = prior.axes[:-1].double()
    left = x - x @ fewer.T @ fewer
    assert left.square().sum() / x.square().sum() > 0.01


# --- the decoder ---------------------------------------------------------------------------------


class DecoderOracle(nn.Module):
    """Answers with the noise plus ``off``, and the smallest variance; notes the places shown."""

    def __init__(self, decoder: Decoder, batch: dict[str, Tensor], off: Tensor) -> None:
        super().__init__()
        self.text_proj, self.batch, self.off = decoder.text_proj, batch, off
        self.fraction = torch.full_like(batch["x0"], -1.0).requires_grad_()

    def forward(self, x: Tensor, t: Tensor, place: Tensor, *words: Tensor):
        b = self.batch
        wanted = noisy(b["x0"], b["noise"], t)
        torch.testing.assert_close(x.double(), wanted, rtol=1e-4, atol=1e-5)
        self.places = place
        return b["noise"] + self.off, self.fraction


def test_the_decoder_learns_noise_by_squares_and_variance_by_the_bound(pool):
    recipe = RECIPES["decoder"]
    model, batch = build(recipe, pool), draw(recipe, pool, 0)
    with torch.no_grad():
        model.text_proj.learned_classifier_free_guidance_embeddings.fill_(7.0)
    batch["t"] = batch["t"].clamp(min=2, max=900)
    t = batch["t"]
    off = torch.tensor(0.3, requires_grad=True)
    oracle = DecoderOracle(model, batch, off)
    loss, metrics = recipe.loss(oracle, batch, pool)
    # With the posterior's own variance the bound is the mean's error: in noise, eq. 12 of DDPM.
    now, before = abar(t), abar(t - 1)
    beta = 1 - now / before
    variance = (1 - before) / (1 - now) * beta
    kl = beta**2 / (2 * variance * (1 - beta) * (1 - now)) * 0.3**2 / math.log(2)
    counts = (1 / now).clamp(max=8)  # a wrong guess costs in noise what it costs in velocity
    squares = 0.3**2 * counts.mean().item()
    assert loss.item() == pytest.approx(squares + 0.001 * 1000 * kl.mean().item(), rel=1e-3)
    assert metrics["simple"].item() == pytest.approx(0.3**2, rel=1e-5)
    slope, fraction = torch.autograd.grad(loss, (off, oracle.fraction))
    pull = 2 * 0.3 * counts.mean().item()
    assert slope.item() == pytest.approx(pull, rel=1e-4), "the bound does not move the noise"
    assert fraction.abs().max() > 0
    away = batch["no picture"]
    assert away.any() and (oracle.places[away] == 7).all()
    assert torch.equal(oracle.places[~away], batch["embedding"][~away])


def test_the_decoder_is_small_and_karlos(pool):
    model = build(RECIPES["decoder"], pool)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert model.unet.published == "UNet2DConditionModel"
    looks = {n: m for n, m in model.unet.named_modules() if n.endswith("attentions.0")}
    assert len(looks) == 2 + 1 + 2 and not any(n.startswith("down_blocks.0") for n in looks)


@pytest.mark.parametrize("context", [12, 60, 252])
def test_a_caption_that_stock_would_take_for_a_picture_is_refused(pool, context):
    tokenizer = pool.clip.tokenizer
    longer = Tokenizer(tokenizer.vocabulary, tokenizer.merges, context)
    other = Encoded(scenes=64)
    other.clip = FrozenCLIP(pool.clip.clip, longer, pool.clip.preparation)
    with pytest.raises(ValueError, match=f"captions have {context} tokens"):
        decoders.build(other)


def test_decoder_and_projection_come_back_from_their_folder(pool, weights, generator):
    model = build(RECIPES["decoder"], pool)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    model.eval().save_pretrained(weights / "decoder", card={"recipe": "decoder"})
    again = Decoder.from_pretrained()
    batch = draw(RECIPES["decoder"], pool, 0)
    told = [batch[k][:4] for k in ("noise", "t", "embedding", "text", "states", "mask")]
    with torch.no_grad():
        for a, b in zip(again(*told), model(*told), strict=True):
            assert torch.equal(a, b) and a.shape == (4, 3, 16, 16)
    assert type(ADMUNet.from_pretrained(weights / "decoder")) is ADMUNet
    assert type(TextProjection.from_pretrained(weights / "decoder", "text_proj")) is TextProjection
    cards = [weights / "decoder" / "card.json", weights / "decoder" / "text_proj" / "card.json"]
    assert len({json.loads(card.read_text())["sha256"] for card in cards}) == 2


# --- the upsamplers ------------------------------------------------------------------------------

WHOLE = upsamplers.Pictures(None, 64)


def test_blur_is_scipys():
    small = torch.rand(2, 3, 16, 16, generator=gen(), dtype=torch.float64)
    wanted = scipy.ndimage.gaussian_filter(
        small.numpy(), (0, 0, 0.6, 0.6), radius=1, mode="nearest"
    )
    numpy.testing.assert_allclose(upsamplers.blurred(small).numpy(), wanted, atol=1e-12)


def test_half_of_the_small_pictures_are_blurred_and_all_are_enlarged_as_in_the_pipeline():
    """Whole pictures: each condition is one of two, the enlarged small picture or its blur."""
    count, n = 0, 60
    batch = upsamplers.batch(torch.arange(n), gen(), WHOLE, crop=64)
    small = F.avg_pool2d(batch["x0"], 4)
    soft = torch.from_numpy(
        scipy.ndimage.gaussian_filter(small.numpy(), (0, 0, 0.6, 0.6), radius=1, mode="nearest")
    )
    for k in range(n):
        found = [
            (scaled(x[k : k + 1], (64, 64))[0] - batch["condition"][k]).abs().max() < 1e-5
            for x in (small, soft)
        ]
        assert sum(found) == 1
        count += bool(found[1])
    assert abs(count - n / 2) < 4 * (n / 4) ** 0.5


def test_crops_are_windows_of_picture_and_condition_at_the_same_place():
    whole = upsamplers.batch(torch.arange(6), gen(), WHOLE, crop=64)
    crops = upsamplers.batch(torch.arange(6), gen(), WHOLE, crop=32)
    corners = set()
    for k in range(6):
        places = [
            (i, j)
            for i in range(0, 33)
            for j in range(0, 33)
            if torch.equal(whole["x0"][k, :, i : i + 32, j : j + 32], crops["x0"][k])
        ]
        assert len(places) == 1 and places[0][0] % 4 == 0 and places[0][1] % 4 == 0
        (i, j), corners = places[0], corners | set(places)
        there = whole["condition"][k, :, i : i + 32, j : j + 32]
        torch.testing.assert_close(crops["condition"][k], there)
    assert len(corners) > 3


def test_four_crops_come_from_each_large_picture():
    drawn = []
    pictures = upsamplers.Pictures(None, 256)
    take = pictures.take
    pictures.take = lambda i, g: (drawn.append(i.tolist()), take(i, g))[1]
    batch = RECIPES["upsampler-256"].batch(torch.arange(8, 14), gen(), pictures)
    assert drawn == [[2, 3]]
    assert batch["x0"].shape == batch["condition"].shape == (6, 3, 64, 64)
    assert not torch.equal(batch["x0"][0], batch["x0"][1])


def test_upsamplers_are_never_shown_a_held_out_combination(monkeypatch):
    seen = []
    monkeypatch.setattr(upsamplers, "render", lambda s, n: (seen.extend(s), render(s, 16))[1])
    for step in range(20):
        WHOLE.take(torch.arange(16) + 16 * step, gen(step))
    assert len(seen) == 320 and not any(map(is_held_out, seen))


@pytest.mark.parametrize("target", ["epsilon", "sample"])
@pytest.mark.parametrize("name", ["upsampler-64", "upsampler-256"])
def test_an_upsampler_learns_its_target(name, target, monkeypatch):
    monkeypatch.setattr(upsamplers, "TARGET", target)
    recipe = replace(RECIPES[name], batch_size=8)
    batch = draw(recipe, recipe.data(None), 0)
    crop = batch["x0"].shape[-1]
    assert crop == {"upsampler-64": 32, "upsampler-256": 64}[name]

    def oracle(off: float):
        def answer(x: Tensor, t: Tensor) -> Tensor:
            wanted = noisy(batch["x0"], batch["noise"], t)
            torch.testing.assert_close(x[:, :3].double(), wanted, rtol=1e-4, atol=1e-5)
            assert torch.equal(x[:, 3:], batch["condition"]) and x.shape[1] == 6
            return batch["noise" if target == "epsilon" else "x0"] + off

        return answer

    for off in (0.0, 0.5):
        loss, _ = recipe.loss(oracle(off), batch, None)
        assert loss.item() == pytest.approx(off**2, abs=1e-6)
    unet = build(recipe, None)
    assert unet.published == "UNet2DModel" and not any(
        "attentions" in n for n, _ in unet.named_parameters()
    )
    assert unet.config.in_channels == 6 and unet.config.out_channels == 3


def test_a_perfect_upsampler_gives_the_truth_back():
    """An oracle that knows the picture behind the noise: the walk ends there."""
    truth, _ = WHOLE.fresh(2, 64)

    class Knows(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return data.to_signed(truth)  # what it is asked for: the clean picture

    drawn = upsamplers.upsample(Knows(), F.avg_pool2d(truth, 4), gen())
    assert (drawn - truth).abs().max() < 1e-3


def test_the_difference_of_distances_knows_which_is_nearer():
    g = gen()
    real = torch.randn(400, 8, generator=g)
    near, far = real + 0.1 * torch.randn(400, 8, generator=g), 1.5 * real + 1
    gap = upsamplers.difference(real, far, near, rounds=40)
    assert 0 < gap["low"] < gap["value"] < gap["high"] and gap["n"] == 400
    # two Gaussians on the same axes, 1.5 times as wide and one apart: 8 (1 + 0.5²), Fréchet 1957
    assert gap["value"] == pytest.approx(8 * 1.25, rel=0.25)
    nothing = upsamplers.difference(real, near, near, rounds=5)
    assert nothing["value"] == nothing["low"] == nothing["high"] == 0
    turned = upsamplers.difference(real, near, far, rounds=40)
    assert turned["high"] < 0


@pytest.mark.slow
def test_the_upsamplers_score_compares_with_bicubic():
    model = build(RECIPES["upsampler-64"], None).eval()
    with torch.no_grad():
        found = upsamplers.score(model, WHOLE, n=40)
    names = ("true pictures", "bicubic", "upsampled")
    read = [found[f"the judge reads everything right, {name}"]["value"] for name in names]
    assert read[0] > 0.9 and read[0] >= read[1] >= read[2] == 0, "an untrained one draws noise"
    assert found["Fréchet distance, bicubic less upsampled"]["high"] < 0
    assert 15 < found["PSNR in dB, bicubic"] < 40


# --- the classifier of noisy pictures ------------------------------------------------------------


def test_the_classifier_reads_noisy_pictures_of_the_cosine_schedule(monkeypatch):
    seen = []
    monkeypatch.setattr(noised, "render", lambda s, n: (seen.extend(s), render(s, n))[1])
    batch = draw(RECIPES["noised-classifier"], None, 0)
    assert not any(map(is_held_out, seen)) and batch["x"].shape == (64, 3, 16, 16)
    clean = data.to_signed(render(seen, 16))
    level = abar(batch["t"]).view(-1, 1, 1, 1)
    noise = (batch["x"] - level.sqrt() * clean) / (1 - level).sqrt()
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    for k, scene in enumerate(seen):
        assert SKIES[batch["sky"][k]] == scene.sky and PLACES[batch["place"][k]] == scene.place
        shown = {KINDS[i] for i in batch["kind"][k].nonzero()[:, 0]}
        assert shown == {thing.kind for thing in scene.things}


def test_what_a_caption_does_not_say_is_not_asked():
    facts = [parse("a red boat at dusk"), parse("in the woods"), Facts()]
    wanted = noised.labels(facts)
    assert wanted["sky"].tolist() == [1, -1, -1] and wanted["place"].tolist() == [-1, 4, -1]
    assert wanted["kind"][0].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert (wanted["kind"][1:] == -1).all()
    logits = {"sky": torch.zeros(3, 5), "place": torch.zeros(3, 6), "kind": torch.zeros(3, 9)}
    batch = {"x": None, "t": None, **wanted}
    loss, parts = noised.loss(lambda x, t: logits, batch, None)
    assert parts["sky"].item() == pytest.approx(math.log(5) / 3)
    assert parts["place"].item() == pytest.approx(math.log(6) / 3)
    assert parts["kind"].item() == pytest.approx(9 * math.log(2) / 3)
    assert loss.item() == pytest.approx(sum(p.item() for p in parts.values()))


def test_log_prob_is_the_logarithm_of_the_probabilities(weights, generator):
    model = noised.NoisedClassifier(noised.NoisedClassifierConfig(8)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    x = torch.randn(2, 3, 16, 16, generator=generator, requires_grad=True)
    t = torch.tensor([10, 900])
    logits = model(x, t)
    wanted = (logits["sky"].softmax(1)[:, 2] * torch.sigmoid(logits["kind"][:, 7])).log()
    found = model.log_prob(x, t, sky="night", kind="cat")
    torch.testing.assert_close(found, wanted)
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert (slope.flatten(1).norm(dim=1) > 0).all()
    far = (model(x, torch.tensor([900, 900]))["sky"] - logits["sky"]).abs().amax(1)
    assert far[0] > 1e-4 and far[1] < 1e-5, "the timestep counts"
    checkpoints.save(weights / "noised-classifier", model, config=model.config)
    again = noised.NoisedClassifier.from_pretrained()
    torch.testing.assert_close(again(x, t)["place"], logits["place"])
    for said, message in (({}, "was told nothing"), ({"sky": "dawn"}, "expected one of")):
        with pytest.raises(ValueError, match=message):
            model.log_prob(x, t, **said)


# --- what priors are marked by -------------------------------------------------------------------


def facts_as_places(scenes: list) -> Tensor:
    """Places that spell out every fact: one number an answer."""
    from companion.judge import HEADS, labels

    wanted, parts = labels(scenes), []
    for name, size in HEADS.items():
        if name != "scene":
            parts.append(F.one_hot(wanted[name].clamp(min=0), size) * (wanted[name] >= 0)[:, None])
    return torch.cat(parts, dim=1).float()


def test_the_probe_reads_what_lies_on_straight_lines():
    scenes = sample(1500, gen())
    known, fresh = scenes[:1200], scenes[1200:]
    probe = priors.Probe(facts_as_places(known), known)
    read = probe.read(facts_as_places(fresh))
    assert sum(r == s.facts() for r, s in zip(read, fresh, strict=True)) > 0.97 * len(fresh)
    blind = priors.Probe(torch.randn(1200, 20, generator=gen()), known)
    read = blind.read(torch.randn(300, 20, generator=gen(1)))
    right = sum(r.sky == s.sky for r, s in zip(read, fresh, strict=True))
    assert abs(right - 60) < 4 * (300 * 0.2 * 0.8) ** 0.5


def test_another_scene_of_the_same_facts():
    g = gen()
    for scene in sample(200, g, held_out=None):
        other = encoded.again(scene, g)
        assert other.facts() == scene.facts() and other.seed != scene.seed
    scenes = sample(2000, g)
    others = [encoded.again(s, g) for s in scenes]
    for pick in (lambda s: s.things[0].x, lambda s: s.things[-1].size):
        a, b = (sorted(pick(s) for s in many if s.things) for many in (scenes, others))
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 0.02, "drawn as scenes are"


def test_a_prior_that_repeats_the_caption_scores_as_the_caption(pool, monkeypatch):
    monkeypatch.setattr(priors, "prompts", lambda: prompts.prompts()[:20])
    found = priors.exam(lambda words, g: words.embedding, pool, n=100, known=128)
    for what in ("cosine with the true place", "finds its picture among 100"):
        assert found[f"{what}, drawn"] == found[f"{what}, the caption's own"]
        assert found[f"{what}, of another picture"] != found[f"{what}, drawn"]
    assert found["cosine with the true place, of another picture"]["value"] > 0.2
    assert any(k.startswith("linear probe: sky") for k in found)


# --- the reader's own folder ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Thirty pictures with captions of growing length, some too long for the context."""
    from PIL import Image

    root = tmp_path_factory.mktemp("own")
    lines = []
    for k, (scene, picture) in enumerate(zip(SCENES, render(SCENES, 64), strict=True)):
        pixels = (255 * picture).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / f"{k:02}.png")
        text = f"{k} " * k + f"a {scene.sky} thing"
        lines.append(json.dumps({"file_name": f"{k:02}.png", "text": text}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


SCENES = sample(30, gen(8))


def test_every_tenth_picture_of_a_folder_is_kept_for_the_score(folder):
    own = Encoded(folder)
    assert len(own) == 27 and own.kept == [9, 19, 29]
    batch = own.batch(torch.arange(27), gen(), 0.0)
    wanted = torch.cat([own.clip.see(render(s, 64)) for k, s in enumerate(SCENES) if k % 10 != 9])
    torch.testing.assert_close(batch["embedding"], wanted, rtol=0.02, atol=0.02)  # 8 bits
    assert batch["mask"].sum(1).max() == 40, "long captions are cut"
    pictures, texts = own.apart(2)
    assert len(pictures) == 2 and texts[0].endswith(f"a {SCENES[9].sky} thing")


@pytest.mark.slow
@pytest.mark.parametrize("name", MINE)
def test_a_reader_trains_on_a_folder(name, folder, tmp_path):
    """Two steps, sample pictures, a score, a folder that opens, and the same again."""
    recipe = RECIPES[name]
    if name.startswith("upsampler"):
        recipe = replace(recipe, sample=None)
    out = tmp_path / "run"
    train(recipe, out, data=folder, steps=2, batch_size=8, quiet=True, device="cpu")
    assert checkpoints.check(out / "final") == []
    again = tmp_path / "again"
    train(recipe, again, data=folder, steps=2, batch_size=8, quiet=True, device="cpu")
    a, b = (checkpoints.load_state(x / "final") for x in (out, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    pictures = sorted(p.name for p in (out / "samples").glob("*"))
    assert bool(pictures) == (recipe.sample is not None)
