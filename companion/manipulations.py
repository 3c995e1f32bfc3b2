"""What DALL·E 2 does with pictures: variations, ways between two, and changes told in words.

Ramesh et al. 2022 (arXiv 2204.06125), section 3. A picture has two halves: its place in CLIP's
space, z_i, which says what CLIP sees in it, and x_T, the noise from which the decoder, told z_i,
draws this very picture, which holds all the rest. Each manipulation keeps or changes one of them.

Letters: B pictures, D the width of CLIP's space.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from companion import errors, samplers
from companion.data import to_signed
from companion.pipeline import generators, prompts
from companion.preparation import scaled
from companion.scheduler import Generators
from companion.unclip import Latents, UnCLIP, Walk


class Manipulations(UnCLIP):
    """Pictures in, pictures out."""

    @torch.no_grad()
    def variations(
        self,
        image: Tensor,
        *,
        steps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        sampler: str | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators | None = None,
        seed: int | None = None,
        latents: Latents = None,
        callback: samplers.Callback = None,
    ) -> Tensor:
        """Draw other pictures of what a picture shows (section 3.1).

        Without ``eta`` they start from any noise, as Karlo's do. With it they start from the
        picture's own (``invert``), and DDIM mixes in ``eta`` of fresh noise at each step: 0 decodes
        the picture that came, more leaves less of what its place in CLIP's space does not say.

        Args:
            image: (B, 3, H, H) square pictures in [0, 1], of any size.
            steps: Timesteps of decoder and upsampler(s).
            guidance_scale: Default: 8 without ``eta``, 1 with it: what guidance exaggerates on the
                way back is not what it exaggerates on the way there.
            eta: From 0 to 1.
            num_images_per_prompt: Variations of each picture.
            latents: The noise that decoder and upsampler(s) start from; with ``eta`` the decoder's
                is what ``invert`` found.

        The others are those of a call with words.

        Returns:
            (B · num_images_per_prompt, 3, H, W) in [0, 1].
        """
        own = eta is not None
        if own:
            errors.number("eta", eta, low=0, high=1)
            errors.expect(
                sampler in (None, "ddim"), f"eta is DDIM's; the sampler here is {sampler!r}."
            )
        errors.number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        scale = self._scale(guidance_scale, own)
        plan = self._plan(self._pixels, steps, sampler, latents, height, width, own)
        decoder, *upsamplers = plan
        count = len(image) * num_images_per_prompt
        source = generators(generator, seed, count)
        embedding = self.encode_image(image).repeat_interleave(num_images_per_prompt, dim=0)
        nothing = self.encode_prompts([""] * count)
        if own and decoder.latents is None:
            noise = self._invert(image, decoder, scale, callback)[1]
            noise = noise.repeat_interleave(num_images_per_prompt, dim=0)
            decoder = decoder._replace(latents=noise)
        small = self.draw_small(
            embedding, nothing, nothing, decoder, scale, source, callback, eta or 0.0
        )
        return self._enlarge(small, upsamplers, source, callback)

    @torch.no_grad()
    def invert(
        self,
        image: Tensor,
        *,
        steps: int = 25,
        guidance_scale: float = 1.0,
        iterations: int = 2,
        callback: samplers.Callback = None,
    ) -> tuple[Tensor, Tensor]:
        """The two halves of a picture (section 3): what CLIP sees in it, and the rest.

        Args:
            image: (B, 3, H, H) square pictures in [0, 1], of any size.
            steps: Timesteps of the walk back.
            guidance_scale: Of the decoder.
            iterations: How often to ask at each step (``samplers.ddim_invert``). The book's network
                for digits finds the noise that brings them back at 31 dB with one question, and at
                41 with two.
            callback: Called as ``callback(i, t, x, x0_hat)`` after each step.

        Returns:
            z_i (B, D), the place in CLIP's space, not normalised; and x_T (B, 3, h, w), the noise
            from which the decoder draws the picture, as small as the decoder draws. Together, with
            the same steps and guidance: ``.variations(image, eta=0, latents=(x_T, None))``.
        """
        scale = self._scale(guidance_scale, own=True)
        walk = self._plan(("decoder",), (steps,), None, None, None, None, own=True)[0]
        return self._invert(image, walk, scale, callback, iterations)

    @torch.no_grad()
    def interpolate(
        self,
        a: Tensor,
        b: Tensor,
        n: int = 5,
        *,
        own: bool = False,
        steps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        latents: Latents = None,
        callback: samplers.Callback = None,
    ) -> Tensor:
        """Draw the pictures on the way from one picture to another (section 3.2).

        The place in CLIP's space turns from a's to b's (``slerp``). Nothing else changes: all
        pictures start from one noise, and DDIM adds none.

        Args:
            a: (1, 3, H, H) square picture in [0, 1], of any size.
            b: Likewise.
            n: How many pictures, at least 2; the first has the place of a, the last that of b.
            own: The noise turns too, from a's own to b's own (``invert``): the ends are then a and
                b themselves, as well as the decoder can.
            guidance_scale: Default: 8, and 1 with ``own``.
            latents: One noise for the decoder, (1, 3, h, w), and for each upsampler.

        The others are those of ``variations``.

        Returns:
            (n, 3, H, W) in [0, 1].
        """
        for name, image in (("a", a), ("b", b)):
            errors.tensor(name, image, "1 3 H H", "float", low=0, high=1)
        errors.number("n", n, low=2, integer=True)
        scale = self._scale(guidance_scale, own)
        plan = self._plan(self._pixels, steps, "ddim", latents, height, width, own)
        source = generators(generator, seed, 1)
        shares = torch.linspace(0, 1, n, dtype=torch.float64)
        places = slerp(self.encode_image(a), self.encode_image(b), shares)
        if own and plan[0].latents is None:
            ends = [self._invert(x, plan[0], scale, callback)[1] for x in (a, b)]
            between = slerp(ends[0].flatten(1), ends[1].flatten(1), shares)
            plan[0] = plan[0]._replace(latents=between.unflatten(1, ends[0].shape[1:]))
        return self._alike(places, plan, scale, source, callback)

    @torch.no_grad()
    def text_diff(
        self,
        image: Tensor,
        before: str,
        after: str,
        n: int = 5,
        *,
        theta: float = 0.5,
        own: bool = True,
        steps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        latents: Latents = None,
        callback: samplers.Callback = None,
        truncate: bool = False,
    ) -> Tensor:
        """Change a picture by what two captions differ in (section 3.3).

        z_d = norm(z_t - z_t0) is the direction from the first caption to the second in CLIP's
        space. The picture's place turns towards it, further with each picture; the noise stays.

        Args:
            image: (1, 3, H, H) square picture in [0, 1], of any size.
            before: What it shows.
            after: What it shall show.
            n: How many pictures, at least 2; the first is at theta 0, the picture itself.
            theta: How far the last one turns, as a share of the way; 0.25 to 0.5 in the paper.
            own: Start from the picture's own noise (``invert``), rather than from any.
            truncate: Cut captions that are too long, rather than refuse them.

        The others are those of ``interpolate``.

        Returns:
            (n, 3, H, W) in [0, 1].
        """
        errors.tensor("image", image, "1 3 H H", "float", low=0, high=1)
        errors.number("n", n, low=2, integer=True)
        errors.number("theta", theta, low=0, high=1)
        said = [*prompts("before", before, 1), *prompts("after", after, 1)]
        scale = self._scale(guidance_scale, own)
        plan = self._plan(self._pixels, steps, "ddim", latents, height, width, own)
        source = generators(generator, seed, 1)
        place = self.encode_image(image)
        # CLIP compares directions, so the captions' lengths say nothing: norm, then subtract. The
        # picture's own length stays, since the decoder is used to lengths like it.
        z = F.normalize(self.encode_prompts(said, truncate=truncate).embedding, dim=1)
        change = z[1:] - z[:1]
        errors.expect(
            change.norm().item() > 1e-6, "before and after are the same to CLIP: nothing to change."
        )
        there = change * (place.norm() / change.norm())
        places = slerp(place, there, torch.linspace(0, theta, n, dtype=torch.float64))
        if own and plan[0].latents is None:
            plan[0] = plan[0]._replace(latents=self._invert(image, plan[0], scale, callback)[1])
        return self._alike(places, plan, scale, source, callback)

    # --- how it is done ---------------------------------------------------------------------------

    def _alike(
        self,
        places: Tensor,
        plan: list[Walk],
        scale: float,
        source: Generators,
        callback: samplers.Callback,
    ) -> Tensor:
        """Pictures of n places (n, D) that start from the same noise in each walk."""
        n, channels = len(places), self.decoder.config.in_channels
        for i, walk in enumerate(plan):
            rows = n if walk.latents is not None and len(walk.latents) == n else 1
            noise = self.noise((rows, channels, *walk.size), source, walk.latents)
            plan[i] = walk._replace(latents=noise.expand(n, -1, -1, -1))
        nothing = self.encode_prompts([""] * n)
        small = self.draw_small(places, nothing, nothing, plan[0], scale, source, callback)
        return self._enlarge(small, plan[1:], source, callback)

    def _invert(
        self,
        image: Tensor,
        walk: Walk,
        scale: float,
        callback: samplers.Callback,
        iterations: int = 2,
    ) -> tuple[Tensor, Tensor]:
        """Both halves of pictures: places (B, D), and noise as the plan has it."""
        errors.expect(
            walk.size[0] == walk.size[1],
            f"height and width make the decoder draw at {walk.size[0]} by {walk.size[1]}; a square"
            " picture's own noise is square.",
        )
        embedding, nothing = self.encode_image(image), self.encode_prompts([""] * len(image))
        small = to_signed(scaled(image, walk.size).clamp(0, 1))
        return embedding, self.invert_small(
            small, embedding, nothing, nothing, walk.timesteps, scale, iterations, callback
        )

    def _scale(self, scale: float | None, own: bool) -> float:
        """The guidance scale; checked first, with what every manipulation needs."""
        errors.expect(
            self.image_encoder is not None,
            "this folder has no image_encoder, which pictures need; Karlo's image variations are"
            " a folder of their own.",
        )
        scale = (1.0 if own else 8.0) if scale is None else scale
        errors.number("guidance_scale", scale)
        return scale


def slerp(a: Tensor, b: Tensor, shares: Tensor | float) -> Tensor:
    """Turn from one vector to another: along the arc, at an even pace.

    The direction turns (Shoemake 1985); the length, about which an arc says nothing, changes in a
    straight line.

    Args:
        a: (1, D) or (B, D).
        b: Likewise.
        shares: How far, one number or (B,): 0 is a, 1 is b.

    Returns:
        (B, D)

    Raises:
        ValueError: A vector is zero, or they point in opposite directions: no arc is the shortest.
    """
    errors.tensor("a", a, "A D", "float")
    errors.tensor("b", b, "B D", "float")
    kind, device = a.dtype, a.device
    a, b = a.cpu().double(), b.cpu().double()
    u, v = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    errors.expect(bool((u > 0).all() and (v > 0).all()), "a vector of length 0 has no direction.")
    a, b = a / u, b / v
    # From sum and difference: an arccos would lose half of its digits near 0 and pi.
    angle = 2 * torch.atan2((a - b).norm(dim=1, keepdim=True), (a + b).norm(dim=1, keepdim=True))
    errors.expect(
        bool((angle < torch.pi - 1e-6).all()),
        "the two point in opposite directions, so no way between them is the shortest.",
    )
    s = torch.as_tensor(shares, dtype=torch.float64).view(-1, 1)
    # torch.sinc(x) is sin(pi x) / (pi x): the quotient of two sines, also where both are 0.
    whole = torch.sinc(angle / torch.pi)
    here = (1 - s) * torch.sinc((1 - s) * angle / torch.pi) / whole
    there = s * torch.sinc(s * angle / torch.pi) / whole
    return ((here * a + there * b) * ((1 - s) * u + s * v)).to(kind).to(device)
