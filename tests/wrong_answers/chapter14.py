"""What readers of chapter 14 plausibly write: (exercise, what is wrong with it, code)."""

WRONG = [
    (
        "14.1",
        "forgets the biases",
        "def block_parameters(c_in, c_out, T):\n"
        "    around = c_in * c_out if c_in != c_out else 0\n"
        "    return 2 * c_in + 2 * c_out + 9 * c_in * c_out + T * c_out + 9 * c_out**2 + around",
    ),
    (
        "14.1",
        "always a way around",
        "def block_parameters(c_in, c_out, T):\n"
        "    return (2 * c_in + 2 * c_out + 9 * c_in * c_out + T * c_out + 9 * c_out**2"
        " + c_in * c_out + 4 * c_out)",
    ),
    (
        "14.1",
        "never a way around",
        "def block_parameters(c_in, c_out, T):\n"
        "    return 2 * c_in + 2 * c_out + 9 * c_in * c_out + T * c_out + 9 * c_out**2 + 3 * c_out",
    ),
    (
        "14.1",
        "forgets the norms",
        "def block_parameters(c_in, c_out, T):\n"
        "    around = c_in * c_out + c_out if c_in != c_out else 0\n"
        "    return 9 * c_in * c_out + T * c_out + 9 * c_out**2 + 3 * c_out + around",
    ),
    ("14.2", "places instead of numbers", "def fewer(f, c):\n    return f**2"),
    ("14.2", "upside down", "def fewer(f, c):\n    return f**2 * c / 3"),
    ("14.2", "one side only", "def fewer(f, c):\n    return 3 * f / c"),
    ("14.2", "Stable Diffusion's, always", "def fewer(f, c):\n    return 48"),
    ("14.3", "the spread itself", "def scale_factor(latents):\n    return latents.std()"),
    ("14.3", "the variance", "def scale_factor(latents):\n    return 1 / latents.var()"),
    (
        "14.3",
        "their size, not their spread",
        "def scale_factor(latents):\n    return 1 / latents.square().mean().sqrt()",
    ),
    (
        "14.3",
        "a number for each channel",
        "def scale_factor(latents):\n    return 1 / latents.std(dim=(0, 2, 3))",
    ),
    ("14.3", "the published one", "def scale_factor(latents):\n    return 0.18215"),
    (
        "14.4",
        "compares files",
        "def culprit(one, other):\n"
        "    from companion.checkpoints import sha256\n"
        "    for name in ('vae', 'text_encoder', 'unet'):\n"
        "        a, b = (next((p / name).glob('*.safetensors')) for p in (one, other))\n"
        "        if sha256(a) != sha256(b):\n"
        "            return name",
    ),
    (
        "14.4",
        "compares names",
        "def culprit(one, other):\n"
        "    from companion.checkpoints import read_tensors\n"
        "    for name in ('text_encoder', 'unet', 'vae'):\n"
        "        a, b = (next((p / name).glob('*.safetensors')) for p in (one, other))\n"
        "        if set(read_tensors(a)) != set(read_tensors(b)):\n"
        "            return name",
    ),
    (
        "14.4",
        "trusts that a folder that loads is right",
        "def culprit(one, other):\n"
        "    from companion import StableDiffusion\n"
        "    for name in ('text_encoder', 'unet', 'vae'):\n"
        "        StableDiffusion.parts[name].from_pretrained(other, name)",
    ),
    (
        "14.4",
        "tells equal from unequal the wrong way round",
        "def culprit(one, other):\n"
        "    from companion import StableDiffusion\n"
        "    for name in ('text_encoder', 'unet', 'vae'):\n"
        "        kind = StableDiffusion.parts[name]\n"
        "        a, b = (kind.from_pretrained(p, name).state_dict() for p in (one, other))\n"
        "        if all(torch.equal(a[key], b[key]) for key in a):\n"
        "            return name",
    ),
]
