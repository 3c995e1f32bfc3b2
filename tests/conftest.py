"""Shared by all tests: one thread a process, and generators instead of the global one."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in children


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two test processes on two cores; more threads would only wait for each other."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def generator():
    """A fresh generator with a fixed seed."""
    import torch

    return torch.Generator().manual_seed(20220413)  # the day that DALL·E 2's paper came out


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    """The folder of shipped weights, with a tiny CLIP in place of its own, while a module runs."""
    import tiny_clip

    from companion import checkpoints

    folder = tiny_clip.write(tmp_path_factory.mktemp("weights"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "WEIGHTS", folder)
        yield folder


@pytest.fixture
def record_property(record_property):
    """Two test processes hand each other plain data: a number of numpy's or torch's becomes one."""

    def record(name: str, value: object) -> None:
        record_property(name, value.item() if hasattr(value, "item") else value)

    return record
