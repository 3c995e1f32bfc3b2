"""The small library behind *From Noise to Pictures*.

Read it from the ground floor up: ``storybook`` (the picture world), ``data`` and ``schedule`` first. ``README.md`` has a
table of the rooms. Importing this package loads nothing but its version, so that
``import companion`` is quick; import the room that you need, as in ``from companion import schedule``.
"""

__version__ = "0.1.0"
