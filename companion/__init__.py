"""The small library behind *From Noise to Pictures*.

Read it from the ground floor up: ``storybook`` (the picture world), ``data`` and ``schedule``
first. ``README.md`` has a table of the rooms. Importing this package loads nothing but its version,
so that ``import companion`` is quick; import the room that you need, as in
``from companion import schedule``.
The whole systems, ``StableDiffusion``, ``DALLE2`` and ``Imagen``, are here too, and loaded when
asked for.
"""

__version__ = "0.1.0"

_SYSTEMS = {"DALLE2": "dalle2", "Imagen": "imagen", "StableDiffusion": "stable_diffusion"}


def __getattr__(name: str) -> type:
    if name not in _SYSTEMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(__import__(f"{__name__}.{_SYSTEMS[name]}", fromlist=[name]), name)
