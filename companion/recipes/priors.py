"""DALL·E 2's two priors: from what a caption says to a place in CLIP's space.

Ramesh et al. 2022, section 2.2. CLIP is frozen: both see its numbers and change none. They are of
equal size, so that the one can be compared with the other.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from companion import diffusion, guidance, judge, samplers
from companion.prior import Prior, PriorConfig
from companion.prior_ar import ARPrior, ARPriorConfig, components_for
from companion.prompts import marks, prompts
from companion.recipes.clip import tellable
from companion.recipes.encoded import GROUP, SIZE, Encoded, again, reader
from companion.schedule import Schedule
from companion.scores import interval, mean_interval
from companion.storybook import Scene, caption, render, sample
from companion.train import Recipe
from companion.unclip import Words

HEADS, HEAD, LAYERS = 4, 24, 4  # C = 96
DROPPED = 0.1  # share of captions that are left out (section 2.2)
RANGE = 5.0  # a rescaled place is cut there while it is drawn, as Karlo does
STEPS = 25
FRESH = 53  # the seed of scenes for the score, which no training draws from

Draw = Callable[[Words, torch.Generator], Tensor]


# --- the diffusion prior --------------------------------------------------------------------------


def diffusion_prior(data: Encoded) -> Prior:
    """A fresh prior that knows the mean and the spread of the pictures' places."""
    context, width = data.clip.tokenizer.context, data.clip.width
    prior = Prior(PriorConfig(HEADS, HEAD, LAYERS, width, context))
    for table in (prior.positional_embedding, prior.prd_embedding):
        nn.init.normal_(table, std=0.02)
    embedding, _ = data.measured()
    with torch.no_grad():
        prior.clip_mean.copy_(embedding.mean(0))
        prior.clip_std.copy_(embedding.std(0))
    return prior


def diffusion_batch(
    indices: Tensor, generator: torch.Generator, data: Encoded
) -> dict[str, Tensor]:
    """Places, captions (one in ten left out), noise and timesteps."""
    batch = data.batch(indices, generator, DROPPED)
    del batch["small"]
    batch["noise"] = torch.randn(batch["embedding"].shape, generator=generator)
    batch["t"] = torch.randint(1000, (len(indices),), generator=generator)
    return batch


def diffusion_loss(
    model: Prior, batch: dict[str, Tensor], data: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of the *clean*, rescaled place (section 2.2), on the cosine schedule."""
    x0 = model.rescale(batch["embedding"])
    x_t = Schedule.cosine().add_noise(x0, batch["noise"], batch["t"])
    answer = model(x_t, batch["t"], batch["text"], batch["states"], batch["mask"])
    return diffusion.simple_loss(answer.to(x0.dtype), x0), {}  # half, in mixed precision


@torch.no_grad()
def draw_by_diffusion(
    prior: Prior, words: Words, null: Words, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """Places for captions, (B, D), in 25 steps, as the system draws them."""
    schedule = Schedule.cosine()

    def denoise(x: Tensor, t: Tensor, *said: Tensor) -> Tensor:
        return prior(x, t, *said)  # it answers with the clean place itself

    guided = guidance.classifier_free(denoise, words, null, scale)
    x = torch.randn(words.embedding.shape, generator=generator).to(words.embedding)
    t = samplers.timesteps("ddpm", STEPS, schedule, "linspace")  # as UnCLIPScheduler has them
    x = samplers.ddpm(guided, x, t, schedule, generator=generator, clip=RANGE)
    return prior.restore(x)


# --- the autoregressive prior ---------------------------------------------------------------------


def ar_prior(data: Encoded) -> ARPrior:
    """A fresh prior that knows axes, ranges and dot products of pictures and captions."""
    context, width = data.clip.tokenizer.context, data.clip.width
    embedding, text = data.measured()
    k = components_for(embedding)  # 99 % of the variance: "less than 1 % error" (section 2.2)
    prior = ARPrior(ARPriorConfig(HEADS, HEAD, LAYERS, width, context, components=k))
    nn.init.normal_(prior.positional_embedding, std=0.02)
    prior.measure(embedding, text)
    return prior


def ar_batch(indices: Tensor, generator: torch.Generator, data: Encoded) -> dict[str, Tensor]:
    """Places and captions, of which one in ten is left out."""
    batch = data.batch(indices, generator, DROPPED)
    del batch["small"]
    return batch


def ar_loss(
    model: ARPrior, batch: dict[str, Tensor], data: Encoded
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of each token given all before it, in nats a token."""
    codes = model.quantise(batch["embedding"])
    dot = model.dot(batch["embedding"], batch["text"])
    empty = batch["mask"].sum(1) == 2  # start and end: nothing was said, so nothing to fit
    dot = torch.where(empty, model.config.dots, dot)
    logits = model(batch["text"], batch["states"], batch["mask"], dot, codes)
    right = (logits.argmax(-1) == codes).float().mean()
    return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten()), {"right": right}


def draw_by_tokens(
    prior: ARPrior, words: Words, null: Words, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """Places for captions, (B, D)."""
    return prior.draw(words, null, generator, scale=scale)


# --- the score ------------------------------------------------------------------------------------


class Probe:
    """Straight lines through CLIP's space that tell what a picture shows: logistic regression.

    It reads places as ``judge.Judge`` reads pictures, with the same answers, so that what a prior
    draws can be marked before there is a decoder.

    Args:
        embedding: Places of pictures, (n, D).
        scenes: What they show.
    """

    def __init__(self, embedding: Tensor, scenes: Sequence[Scene]) -> None:
        self.mean, self.std = embedding.mean(0), embedding.std(0)
        x = (embedding - self.mean) / self.std
        wanted = judge.labels(scenes)
        self.sizes = {name: size for name, size in judge.HEADS.items() if name != "scene"}
        self.weight = torch.zeros(sum(self.sizes.values()), x.shape[1], requires_grad=True)
        self.bias = torch.zeros(len(self.weight), requires_grad=True)
        fit = torch.optim.LBFGS(
            [self.weight, self.bias], max_iter=60, line_search_fn="strong_wolfe"
        )

        def cost() -> Tensor:
            fit.zero_grad()
            parts = (x @ self.weight.T + self.bias).split(list(self.sizes.values()), dim=1)
            total = 1e-3 * self.weight.square().sum()
            for name, logits in zip(self.sizes, parts, strict=True):
                if (wanted[name] >= 0).any():
                    total = total + F.cross_entropy(logits, wanted[name], ignore_index=-1)
            total.backward()
            return total

        with torch.enable_grad():
            fit.step(cost)

    @torch.no_grad()
    def read(self, embedding: Tensor) -> list:
        """What the pictures at these places (B, D) show, as facts."""
        x = (embedding - self.mean) / self.std @ self.weight.T + self.bias
        logits = dict(zip(self.sizes, x.split(list(self.sizes.values()), dim=1), strict=True))
        return judge.facts_from({"scene": torch.tensor([[0.0, 1.0]]).expand(len(x), 2), **logits})


def exam(draw: Draw, data: Encoded, n: int = 500, known: int = 8192) -> dict[str, object]:
    """How near to the true places those lie that a prior draws for captions, and what they show.

    Args:
        draw: Captions to places.
        data: CLIP, and the places that probes, means and spreads are taken from.
        n: Scenes for nearness; retrieval has n / 100 rounds among 100.
        known: Places that the linear probes are fitted to.

    Returns:
        Cosines of places less their mean, in units of their spread, between what was drawn for a
        complete caption and: the true picture's place; the same for another picture of the same
        caption (the ceiling) and for the caption's own embedding, used as if it were a picture's.
        Shares of captions that find their picture among 100. And the marks of the thousand prompts
        as linear probes read them, beside those of true pictures' places.
    """
    g, found = torch.Generator().manual_seed(FRESH), {}
    clip = data.clip
    groups = [data.group(k) for k in range(-(-min(known, len(data)) // GROUP))]
    places = torch.cat([group.embedding for group in groups])
    mean, std = places.mean(0), places.std(0)

    def drawn(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        parts = [clip.read(texts[i : i + 100]) for i in range(0, len(texts), 100)]
        return torch.cat([draw(w, g) for w in parts]), torch.cat([w.embedding for w in parts])

    def direction(embedding: Tensor) -> Tensor:
        return F.normalize((embedding - mean) / std, dim=-1)

    close: dict[str, list[Tensor]] = {}
    right = {"drawn": 0, "of another picture": 0, "the caption's own": 0}
    rounds = max(1, n // 100)
    for _ in range(rounds):
        scenes = tellable(100, g)
        true = direction(clip.see(render(scenes, SIZE)))
        place, own = drawn([caption(scene, generator=g) for scene in scenes])
        other = clip.see(render([again(scene, g) for scene in scenes], SIZE))
        for name, what in zip(right, (place, other, own), strict=True):
            near = direction(what) @ true.T
            close.setdefault(name, []).append(near.diagonal())
            right[name] += int((near.argmax(1) == torch.arange(100)).sum())
    for name in right:
        found[f"cosine with the true place, {name}"] = mean_interval(torch.cat(close[name]))
    for name, count in right.items():
        found[f"finds its picture among 100, {name}"] = interval(count, 100 * rounds)

    probe = Probe(places, [scene for group in groups for scene in group.about])
    asked = prompts()
    true = clip.see(render([p.scene for p in asked], SIZE))
    read = {"drawn": drawn([p.text for p in asked])[0], "of true pictures": true}
    for name, embedding in read.items():
        for what, share in marks(asked, probe.read(embedding)).items():
            if what not in ("swapped", "no scene", "no thing"):
                found[f"linear probe: {what}, {name}"] = share
    return found


def score(by: Callable[..., Tensor], model: nn.Module, data: Encoded) -> dict[str, object]:
    """The exam; for a reader's folder, how near the kept pictures' places are."""
    null = data.clip.read([""])

    def draw(words: Words, generator: torch.Generator) -> Tensor:
        return by(model, words, null.each(len(words.mask)), generator)

    if data.rows is None:
        return exam(draw, data)
    pictures, texts = data.apart(500)
    g, (places, _) = torch.Generator().manual_seed(FRESH), data.measured()
    mean, std = places.mean(0), places.std(0).clamp(min=1e-6)
    there = (draw(data.clip.read(texts), g) - mean) / std
    close = F.cosine_similarity(there, (data.clip.see(pictures) - mean) / std)
    return {"cosine with the true place, drawn": mean_interval(close)} if len(close) > 1 else {}


@torch.no_grad()
def look(by: Callable[..., Tensor], model: nn.Module, n: int = 8) -> Tensor:
    """Pairs: a picture, and which of 250 others lies nearest to what is drawn for its caption."""
    clip, g = reader(), torch.Generator().manual_seed(FRESH)
    scenes = sample(n, g)
    words, null = clip.read([caption(s, generator=g) for s in scenes]), clip.read([""])
    others = render(sample(250, g), SIZE)
    places = clip.see(others)
    mean, std = places.mean(0), places.std(0).clamp(min=1e-6)
    device = next(model.parameters()).device
    words, null = (Words(*(x.to(device) for x in w)) for w in (words, null.each(n)))
    there = (by(model, words, null, g).cpu() - mean) / std
    near = F.normalize(there, dim=-1) @ F.normalize((places - mean) / std, dim=-1).T
    return torch.stack([render(scenes, SIZE), others[near.argmax(1)]], 1).flatten(0, 1)


# --- the recipes ----------------------------------------------------------------------------------


def _recipe(name: str, about: str, by: Callable[..., Tensor], **numbers: object) -> Recipe:
    def draw_score(model: nn.Module, data: Encoded) -> dict[str, object]:
        return score(by, model, data)

    return Recipe(
        name=name,
        about=about + " CLIP is frozen. It never saw the held-out combinations.",
        data=Encoded,
        sample=lambda model: look(by, model),
        score=draw_score,
        needs=("clip", "text-encoder"),
        batch_size=128,
        chunk=64,
        minutes=30,
        warmup=200,
        decay="cosine",
        ema=0.998,
        weight_decay=0.01,
        dtype="float16",
        data_about="40,000 Storybook scenes, each with a new caption whenever it is seen",
        **numbers,
    )


RECIPES = (
    _recipe(
        "prior",
        "DALL·E 2's diffusion prior: a caption to a place in CLIP's space, from noise. A causal"
        " Transformer that predicts the clean place.",
        draw_by_diffusion,
        model=diffusion_prior,
        batch=diffusion_batch,
        loss=diffusion_loss,
        steps=2000,
        learning_rate=1e-3,
    ),
    _recipe(
        "prior-ar",
        "DALL·E 2's autoregressive prior: a caption to a place in CLIP's space, written as"
        " principal components in buckets, one after the other.",
        draw_by_tokens,
        model=ar_prior,
        batch=ar_batch,
        loss=ar_loss,
        steps=1000,
        learning_rate=1e-3,
    ),
)
