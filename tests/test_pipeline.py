"""What the systems share: folders, notices, devices and precisions."""

import logging
import shutil

import pytest
import tiny
import torch
from elsewhere import NAME, Elsewhere, Far

from companion import checkpoints, schedule
from companion import scheduler as scheduler_module
from companion.checkpoints import CheckpointError
from companion.dalle2 import DALLE2
from companion.stable_diffusion import StableDiffusion

PICTURE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
SYSTEMS = {"stable-diffusion": lambda: tiny.stable_diffusion(seeing=True), "dalle2": tiny.dalle2}


def drawn(pipe, **how) -> dict[str, torch.Tensor]:
    """A picture by each way that a system has."""
    if isinstance(pipe, StableDiffusion):
        mask = (PICTURE[:, :1] > 0.5).float()
        how = {"steps": 3, "seed": 1} | how
        return {
            "words": pipe("a red house", **how),
            "image": pipe("a red house", image=PICTURE, strength=0.7, **how),
            "mask": pipe("a red house", image=PICTURE, mask=mask, paste=True, **how),
            "image_prompt": pipe(image_prompt=PICTURE, **how),
        }
    steps = {"steps": (3, 3, 3), "seed": 1} | how
    return {
        "words": pipe("a red house", candidates=2, **steps | {"steps": (3, 3, 3, 3)}),
        "variation": pipe.variations(PICTURE, **steps),
        "own": pipe.variations(PICTURE, eta=0.5, **steps),
        "between": pipe.interpolate(PICTURE, PICTURE.flip(3), 3, own=True, **steps),
        "told": pipe.text_diff(PICTURE, "a house", "the sea", 3, **steps),
    }


@pytest.fixture(scope="module", params=SYSTEMS)
def folder(request, tmp_path_factory):
    return SYSTEMS[request.param]().save_pretrained(tmp_path_factory.mktemp(request.param))


def open_it(folder, **how):
    kind = DALLE2 if (folder / "prior").is_dir() else StableDiffusion
    return kind.from_pretrained(folder, **how)


@pytest.fixture(scope="module")
def usual(folder):
    """What the folder draws in float32, with seed 1 and with seed 2."""
    return [drawn(open_it(folder), seed=seed) for seed in (1, 2)]


# --- folders -------------------------------------------------------------------------------------


def test_a_saved_system_draws_the_same(folder, usual):
    for name, x in drawn(SYSTEMS[open_it(folder).shipped]()).items():
        assert torch.equal(usual[0][name], x), name
        assert x.std() > 0.05, "a picture that says nothing proves nothing"
    assert open_it(folder).check(folder) == []


def test_every_file_is_missed_when_it_is_spoilt(folder, tmp_path):
    """Missing, empty, truncated, altered: each file by itself; nothing opens half."""
    root, kind = shutil.copytree(folder, tmp_path / "x"), type(open_it(folder))
    files = sorted(p for p in root.rglob("*") if p.is_file())
    files = [p for p in files if p.name != "special_tokens_map.json"]  # says nothing of its own
    assert len(files) > 12
    for path in files:
        raw = path.read_bytes()
        ways = {"missing": None, "empty": b"", "truncated": raw[: len(raw) // 2]}
        ways["short of its end"] = raw[:-3]
        if path.suffix == ".safetensors":
            ways["altered"] = raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:]
        for what, now in ways.items():
            path.unlink() if now is None else path.write_bytes(now)
            with pytest.raises(CheckpointError) as error:
                kind.from_pretrained(root) if path.parent == root else kind.parts[
                    path.parent.name
                ].from_pretrained(root, path.parent.name)
            said = str(error.value)
            assert str(path) in said or str(path.parent) in said, (what, said)
        path.write_bytes(raw)
    assert open_it(root).check(root) == []


def test_the_books_own_is_called_storybook(monkeypatch, tmp_path):
    """Its networks lie one folder a recipe, CLIP once; each that is missing is named."""
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    made = tiny.storybook(tmp_path)
    again = DALLE2.from_pretrained("storybook")
    assert DALLE2.check("storybook") == [] and again.super_res_last is again.super_res_first
    for name in (*tiny.OWN, "text_encoder", "image_encoder"):
        ours, theirs = getattr(made, name).state_dict(), getattr(again, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert DALLE2.from_pretrained("storybook", prior=made.prior).prior is made.prior
    (tmp_path / "upsampler-256").rename(tmp_path / "put aside")
    assert DALLE2.from_pretrained("storybook").super_res_second is None, "it draws small then"
    for name in DALLE2.made_of:
        (tmp_path / name).rename(tmp_path / "away")
        with pytest.raises(CheckpointError, match=f"DALLE2 is not shipped .*: {name} is missing"):
            DALLE2.from_pretrained("storybook")
        assert len(DALLE2.check("storybook")) == 1
        (tmp_path / "away").rename(tmp_path / name)


def test_a_part_may_be_brought_along(tmp_path):
    """So Karlo's two folders, one for words and one for pictures, become one system."""
    whole = tiny.dalle2(second=False)
    eye = {n: getattr(whole, n) for n in ("image_encoder", "feature_extractor")}
    whole.image_encoder = whole.feature_extractor = None
    whole.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no image_encoder"):
        DALLE2.from_pretrained(tmp_path).variations(PICTURE)
    joined = DALLE2.from_pretrained(tmp_path, **eye)
    assert joined.variations(PICTURE, steps=(2, 2), seed=1).shape == (1, 3, 16, 16)
    assert joined.image_encoder is eye["image_encoder"]
    with pytest.raises(ValueError, match="no part image_encodr"):
        DALLE2.from_pretrained(tmp_path, image_encodr=eye["image_encoder"])
    with pytest.raises(ValueError, match="go together"):
        DALLE2.from_pretrained(tmp_path, image_encoder=eye["image_encoder"])


def test_a_required_part_may_be_brought_along_too(tmp_path):
    pipe = tiny.stable_diffusion()
    pipe.save_pretrained(tmp_path)
    other = tiny.stable_diffusion().vae
    with torch.no_grad():
        other.decoder.conv_out.bias += 0.5
    again = StableDiffusion.from_pretrained(tmp_path, vae=other)
    assert again.vae is other
    assert not torch.equal(again("house", steps=2, seed=1), pipe("house", steps=2, seed=1))


def test_cards_go_with_the_networks(tmp_path):
    pipe = tiny.stable_diffusion()
    pipe.save_pretrained(tmp_path, cards={"unet": {"recipe": "unet", "steps": 7}})
    assert checkpoints.read_card(tmp_path / "unet")["steps"] == 7
    assert not (tmp_path / "vae" / "card.json").exists()
    with pytest.raises(ValueError, match="cards are given for scheduler, which is no network"):
        pipe.save_pretrained(tmp_path / "x", cards={"scheduler": {}})
    assert not (tmp_path / "x").exists()


# --- what is said --------------------------------------------------------------------------------


def test_a_folder_that_asks_for_pndm_says_once_that_ddim_draws(caplog):
    scheduler_module._say_no_pndm.cache_clear()
    pipe = tiny.stable_diffusion()
    stored = tiny.DDIM | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    config = scheduler_module.SchedulerConfig(clip_sample=False, set_alpha_to_one=False,
                                              steps_offset=1)  # fmt: skip
    pipe.scheduler = scheduler_module.Scheduler(pipe.scheduler.schedule, config, stored)
    named = pipe("house", steps=2, seed=1, sampler="ddim")
    assert not caplog.records, "whoever names a sampler knows"
    with caplog.at_level(logging.WARNING):
        first, second = (pipe("house", steps=2, seed=1) for _ in range(2))
    assert [r.levelname for r in caplog.records] == ["WARNING"], "visible, and once"
    assert "PNDM" in caplog.text and "DDIM draws instead" in caplog.text
    assert "ddim, euler, heun, dpmpp_2m" in caplog.text, "what else there is"
    assert torch.equal(first, second) and torch.equal(first, named)
    scheduler_module._say_no_pndm.cache_clear()


# --- devices and precisions ----------------------------------------------------------------------


def test_all_noise_is_drawn_on_the_cpu_from_the_generator_given(folder, monkeypatch):
    pipe, real, seen = open_it(folder), torch.randn, []

    def randn(*size, generator=None, device=None, **how):
        seen.append((generator, torch.device(device or "cpu").type))
        return real(*size, generator=generator, device=device, **how)

    monkeypatch.setattr(torch, "randn", randn)
    before = torch.get_rng_state()
    g = torch.Generator().manual_seed(1)
    drawn(pipe, generator=g, seed=None)
    assert seen and all(one == (g, "cpu") for one in seen)
    assert torch.equal(before, torch.get_rng_state()), "never from the global generator"


def test_on_another_device_the_same_pictures(folder, usual):
    """Nothing is created in the wrong place, nothing is float64 there, and a seed is a picture."""
    pipe = open_it(folder)
    with Elsewhere():
        assert pipe.to(NAME) is pipe and pipe.device.type == NAME
        for name, x in drawn(pipe).items():
            assert isinstance(x, Far)
            assert (x.cpu() - usual[0][name]).abs().mean() < 1e-4, name


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "ddim", "ddpm"])
def test_every_sampler_goes_there(sampler):
    with Elsewhere():
        pipe = tiny.stable_diffusion().to(NAME)
        assert isinstance(pipe("house", steps=2, seed=1, sampler=sampler), Far)


def test_the_device_that_is_not_there_is_strict():
    with Elsewhere():
        x = torch.ones(3).to(NAME)
        assert (2 * x + torch.ones(()) + torch.zeros(3, device=NAME)).cpu().tolist() == [3.0] * 3
        with pytest.raises(RuntimeError, match="is on the CPU"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="no float64"):
            torch.ones(3, dtype=torch.float64).to(NAME)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same(folder, usual, dtype, record_property):
    pipe = open_it(folder).to(dtype=dtype)
    assert pipe.dtype == torch.float32, "samplers walk in float32 all the same"
    loaded = open_it(folder, dtype=dtype)
    for ours, theirs in zip(pipe._networks(), loaded._networks(), strict=True):
        assert {p.dtype for p in ours.parameters()} == {dtype}
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    for name, x in drawn(pipe).items():
        apart = (x - usual[0][name]).abs().mean().item()
        chance = (usual[1][name] - usual[0][name]).abs().mean().item()  # another seed's picture
        record_property(name, f"{apart:.4f} of {chance:.4f}")
        assert x.dtype == torch.float32 and 0 < apart < 0.2 * chance, (name, apart, chance)


def test_types_that_no_network_has_are_refused(folder):
    with pytest.raises(TypeError, match="dtype is torch.int8; expected a floating-point type"):
        open_it(folder).to(dtype=torch.int8)


def test_parts_may_have_types_of_their_own():
    """Half the memory for the large networks, and a careful autoencoder or text projection."""
    pipe = tiny.stable_diffusion()
    pipe.unet.to(torch.bfloat16)
    assert torch.isfinite(pipe("house", steps=2, seed=1)).all()
    pipe = tiny.dalle2()
    pipe.text_proj.to(torch.bfloat16)
    pipe.super_res_last.to(torch.bfloat16)
    assert torch.isfinite(pipe("house", steps=(2, 2, 2, 2), seed=1)).all()


def test_noise_is_the_same_whatever_the_networks_are(folder):
    """One seed, one start: the first x that a walk shows does not depend on the type."""
    starts = []
    for dtype in (torch.float32, torch.bfloat16):
        seen = []
        pipe = open_it(folder, dtype=dtype)
        steps = 2 if isinstance(pipe, StableDiffusion) else (2, 2, 2, 2)
        pipe("house", steps=steps, seed=1, callback=lambda i, t, x, x0, seen=seen: seen.append(x))
        starts.append(seen[0])
    assert torch.equal(*starts) and starts[0].dtype == torch.float32
    assert torch.equal(starts[0], schedule.draw(starts[0], torch.Generator().manual_seed(1)))
