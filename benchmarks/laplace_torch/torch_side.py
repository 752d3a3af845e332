"""The other side, run as a script by a Python that has torch and laplace-torch, and neither JAX nor this library.

`PYTHON torch_side.py PROBLEM.npz RESULT.npz` reads weights, windows and prior precision, and writes what laplace-torch
makes of them, with the seconds it took. What it is told about sequences:

    kron    The model returns logits (windows, classes, positions), as torch's cross-entropy wants them, and the data
            set counts windows. With logits (windows * positions, classes) the factors of the head would be divided by
            windows alone, those of the other maps by windows times positions.
    full    The model returns logits (windows * positions, classes): every position is a data point.
"""

import json
import sys
import time
from importlib import metadata
from typing import Any

import numpy as np
import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsGGN
from torch import nn

_PACKAGES = ("torch", "laplace-torch", "curvlinops-for-pytorch", "numpy")


class Block(nn.Module):
    """A layer of models/char_gpt/model.py."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, stream: Any) -> Any:
        inputs = self.attention_norm(stream)
        batch, length, width = inputs.shape
        split = (batch, length, self.heads, width // self.heads)
        queries, keys, values = (w(inputs).view(split).transpose(1, 2) for w in (self.query, self.key, self.value))
        logits = queries @ keys.transpose(2, 3) / (width // self.heads) ** 0.5
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)
        stream = stream + self.output((weights @ values).transpose(1, 2).reshape(inputs.shape))
        expanded = nn.functional.gelu(self.up(self.mlp_norm(stream)), approximate="tanh")
        return stream + self.down(expanded)


class CharGPT(nn.Module):
    """The model of models/char_gpt/model.py; only its linear maps take gradients."""

    def __init__(self, weights: dict[str, Any], heads: int):
        super().__init__()
        classes, width = weights["head"].shape
        layers = sum(name.endswith(".query") for name in weights)
        self.flat = True
        self.register_buffer("token_embedding", torch.as_tensor(weights["token_embedding"]))
        self.register_buffer("position_embedding", torch.as_tensor(weights["position_embedding"]))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes, bias=False)
        maps = {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        norms = {name: module for name, module in self.named_modules() if isinstance(module, nn.LayerNorm)}
        with torch.no_grad():
            for name, module in maps.items():
                module.weight.copy_(torch.as_tensor(weights[name.removeprefix("blocks.")]))
            for name, module in norms.items():
                for own, parameter in (("scale", module.weight), ("bias", module.bias)):
                    parameter.copy_(torch.as_tensor(weights[f"{name.removeprefix('blocks.')}.{own}"]))
                    parameter.requires_grad_(False)

    def forward(self, characters: Any) -> Any:
        stream = self.token_embedding[characters] + self.position_embedding[: characters.shape[1]]
        for block in self.blocks:
            stream = block(stream)
        stream = self.final_norm(stream)
        if self.flat:
            return self.head(stream.reshape(-1, stream.shape[-1]))
        return self.head(stream).transpose(1, 2)


class Batches:
    """What laplace-torch takes for a loader: batches of inputs and targets, and a data set to take the length of."""

    def __init__(self, windows: Any, size: int, flat: bool):
        parts = torch.split(torch.as_tensor(windows, dtype=torch.long), size)
        self.parts = [(part[:, :-1], part[:, 1:].reshape(-1) if flat else part[:, 1:]) for part in parts]
        self.dataset = range(sum(len(y) for _, y in self.parts))

    def __iter__(self) -> Any:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def fitted(model: CharGPT, windows: Any, structure: str, tau: float, size: int) -> tuple[Any, float, float]:
    """laplace-torch on the windows, log det P - k log tau, and the seconds of curvature and factorisation."""
    model.flat = structure == "last-layer"
    chosen = {"last-layer": ("last_layer", "full"), "kronecker": ("all", "kron")}[structure]
    extra = {"last_layer_name": "head"} if structure == "last-layer" else {}
    found = Laplace(model, "classification", *chosen, prior_precision=tau, backend=CurvlinopsGGN, **extra)
    batches = Batches(windows, size, model.flat)
    started = time.perf_counter()
    found.fit(batches)
    ratio = float(found.log_det_ratio)
    seconds = time.perf_counter() - started
    model.flat = True
    return found, ratio, seconds


def of_structure(model: CharGPT, problem: dict[str, Any], structure: str) -> dict[str, Any]:
    """Evidence parts, seconds of two fits, and probit probabilities of the validation windows."""
    tau, size = float(problem["prior_precision"]), int(problem["batch"])
    first = fitted(model, problem["training"][:1], structure, tau, size)[2]
    found, ratio, seconds = fitted(model, problem["training"], structure, tau, size)
    started = time.perf_counter()
    contexts = torch.as_tensor(problem["validation"][:, :-1], dtype=torch.long)
    predicted = [found(window[None], pred_type="glm", link_approx="probit") for window in contexts]
    return {
        "evidence": np.array([float(found.log_likelihood), ratio, float(found.scatter)]),
        "probabilities": torch.stack(predicted).detach().numpy(),
        "seconds": seconds,
        "seconds_of_one_window": first,
        "predictive_seconds": time.perf_counter() - started,
    }


class _Sums(nn.Module):
    """Two positions and two classes: logits are the running sums over positions of one linear map with weights 0."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(1, 2, bias=False)
        nn.init.zeros_(self.map.weight)

    def forward(self, x: Any) -> Any:
        return self.map(x).cumsum(1).transpose(1, 2)


def hand_case() -> Any:
    """The factor over outputs that laplace-torch gives for _Sums; the Gauss-Newton matrix has 3 H, H of p = 1/2."""
    model = _Sums()
    _, kron = CurvlinopsGGN(model, "classification").kron(torch.ones(1, 2, 1), torch.zeros(1, 2, dtype=torch.long), N=1)
    return kron.kfacs[0][0].numpy()


def main(problem_path: str, result_path: str) -> None:
    """Read the problem, solve it and write the result."""
    with np.load(problem_path) as stored:
        problem = dict(stored)
    torch.manual_seed(0)
    weights = {name.removeprefix("weight/"): x for name, x in problem.items() if name.startswith("weight/")}
    model = CharGPT(weights, int(problem["heads"])).eval()
    with torch.no_grad():
        contexts = torch.as_tensor(problem["validation"][:, :-1], dtype=torch.long)
        logits = model(contexts).reshape(*contexts.shape, -1)
    result = {"logits": logits.numpy(), "hand_case": hand_case()}
    for structure in problem["structures"].tolist():
        result |= {f"{structure}/{name}": x for name, x in of_structure(model, problem, structure).items()}
    versions = {name: metadata.version(name) for name in _PACKAGES}
    np.savez(result_path, versions=json.dumps({**versions, "threads": torch.get_num_threads()}), **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
