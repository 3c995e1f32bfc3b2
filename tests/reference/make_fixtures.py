"""Store what the published implementations answer today, for the day they answer no more.

    python tests/reference/make_fixtures.py

writes ``fixtures/NAME.safetensors``: parameters, inputs and outputs of one tiny model a family, and
the gradients of the inputs, computed in float64; the header says which versions answered.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from reference.cases import CASES, Case  # noqa: E402
from reference.oracle import randomise, stock  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"


def answer(model: torch.nn.Module, run, case: Case) -> dict[str, torch.Tensor]:
    """Outputs, and the gradient of a fixed random mix of them for each input that can have one."""
    leaves = {
        k: v.clone().requires_grad_(True) if v.is_floating_point() else v
        for k, v in case.inputs.items()
    }
    outputs = run(model, **leaves)
    g = torch.Generator().manual_seed(7)
    sum((y * torch.randn(y.shape, generator=g, dtype=y.dtype)).sum() for y in outputs).backward()
    found = {f"output.{i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"gradient.{k}": v.grad for k, v in leaves.items() if v.grad is not None}


def load(name: str) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """The configuration of a stored model; its parameters, inputs, outputs and gradients."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        for key in file.keys():
            kind, _, rest = key.partition(".")
            parts.setdefault(kind, {})[rest] = file.get_tensor(key)
        return json.loads(file.metadata()["config"]), parts


def ours(name: str) -> tuple[torch.nn.Module, dict[str, dict[str, torch.Tensor]]]:
    """Our model with the stored parameters, and the stored inputs and answers."""
    case = CASES[name]
    config, parts = load(name)
    assert config == json.loads(json.dumps(case.config)), "make_fixtures.py has to run again"
    model = case.ours(case.config).double()
    model.load_state_dict(parts["parameter"], strict=True)
    return model, parts


def main() -> None:
    FIXTURES.mkdir(exist_ok=True)
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    for seed, (name, case) in enumerate(CASES.items()):
        theirs = randomise(case.theirs(stock(), case.config), seed)
        theirs.float().double()  # parameters that float32 holds exactly take half the space
        tensors = {f"parameter.{k}": v.float() for k, v in theirs.state_dict().items()}
        tensors |= {f"input.{k}": v for k, v in case.inputs.items()}
        tensors |= answer(theirs, case.run_theirs, case)
        header = {"config": json.dumps(case.config), "answered by": json.dumps(versions)}
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        save_file(tensors, FIXTURES / f"{name}.safetensors", metadata=header)


if __name__ == "__main__":
    main()
