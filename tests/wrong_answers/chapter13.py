"""What readers of chapter 13 plausibly write: (exercise, what is wrong with it, code)."""

_VISITED = (
    "def visited(timesteps, strength):\n"
    "    left = int(len(timesteps) * strength)\n"
    "    return timesteps[len(timesteps) - left:]"
)
_BLEND = (
    "def blend(x, z, noise, mask, abar):\n"
    "    f = mask.shape[2] // x.shape[2]\n"
    "    small = mask[:, :, ::f, ::f]\n"
    "    kept = abar**0.5 * z + (1 - abar)**0.5 * noise\n"
    "    return torch.where(small >= 0.5, x, kept)"
)
_ZERO = (
    "def to_zero(abar):\n"
    "    signal = abar.sqrt()\n"
    "    first, last = signal[0], signal[-1]\n"
    "    return ((signal - last) * first / (first - last)) ** 2"
)
_CALM = (
    "def calmed(guided, given, phi):\n"
    "    ratio = given.flatten(1).std(1) / guided.flatten(1).std(1)\n"
    "    calm = guided * ratio.view(-1, 1, 1, 1)\n"
    "    return phi * calm + (1 - phi) * guided"
)

WRONG = [
    ("13.1", "the noisiest steps, not the last ones",
     _VISITED.replace("[len(timesteps) - left:]", "[:left]")),
    ("13.1", "the share that is left out", _VISITED.replace("* strength", "* (1 - strength)")),
    ("13.1", "rounded up", _VISITED.replace("int(len(timesteps) * strength)",
                                            "math.ceil(len(timesteps) * strength)")),
    ("13.2", "kept and repainted exchanged", _BLEND.replace(">= 0.5", "< 0.5")),
    ("13.2", "what is kept has no noise", _BLEND.replace("abar**0.5 * z + (1 - abar)**0.5 * noise",
                                                         "z")),
    ("13.2", "the mask is not made smaller", _BLEND.replace("[:, :, ::f, ::f]", "")),
    ("13.2", "amplitudes without roots", _BLEND.replace("**0.5", "")),
    ("13.3", "shifted, not stretched", _ZERO.replace(" * first / (first - last)", "")),
    ("13.3", "shifted before the root is taken", _ZERO.replace(".sqrt()", "").replace(" ** 2", "")),
    ("13.3", "the square is forgotten", _ZERO.replace(" ** 2", "")),
    ("13.3", "only the last row is set to zero",
     "def to_zero(abar):\n    abar = abar.clone()\n    abar[-1] = 0\n    return abar"),
    ("13.4", "one ratio for all pictures",
     _CALM.replace(".flatten(1).std(1)", ".std()").replace("ratio.view(-1, 1, 1, 1)", "ratio")),
    ("13.4", "the ratio upside down",
     _CALM.replace("given.flatten(1).std(1) / guided.flatten(1).std(1)",
                   "guided.flatten(1).std(1) / given.flatten(1).std(1)")),
    ("13.4", "phi the wrong way round", _CALM.replace("phi * calm + (1 - phi) * guided",
                                                      "(1 - phi) * calm + phi * guided")),
    ("13.4", "the plain answer is mixed in", _CALM.replace("phi * calm", "phi * given")),
]  # fmt: skip
