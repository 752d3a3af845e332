"""Training on 8 virtual devices and in 2 processes, against one device. Run as a script, this is what they do."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import cli
from models.char_gpt import checkpoint, commands, device_mesh
from models.char_gpt.config import SITES, Config
from models.char_gpt.loss import negatives_at
from models.char_gpt.train import StepData, draw_windows, initial_state, train_step
from models.corpus import load

ROOT = Path(__file__).resolve().parents[2]
# The learning rate is 0 at the first step and full at the second, so that is the one that moves the parameters.
STEPS = 2
SIZES = {"steps": STEPS, "layers": 1, "width": 8, "heads": 4, "context": 8, "batch": 8}
BARRIER = {"barrier_site": "layers", "barrier_weight": 1.0, "implementation": "blocked"}
CASES = {
    "margin": ((4, 2), Config(objective="margin", **BARRIER, **SIZES)),
    "ce": ((8, 1), Config(objective="ce", **SIZES)),
    "map": ((2, 4), Config(objective="map", **BARRIER, **SIZES)),
}
EXCHANGES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
BLOCK = tuple(f".blocks[0].{name}" for name in ("query", "key", "value", "output"))


def steps(config, corpus, mesh=None):
    """The compiled step, the start, and after the first two steps the state and the terms of both."""
    start = state = device_mesh.placed(initial_state(config, len(corpus.vocabulary)), mesh)
    compiled, terms = train_step.lower(data_of(config, corpus, mesh, 0), state, config, mesh).compile(), []
    for step in range(STEPS):
        state, found = compiled(data_of(config, corpus, mesh, step), state, config, mesh)
        terms.append([float(x) for x in found])
    return compiled.compiled, start, state, terms


def data_of(config, corpus, mesh, step):
    return device_mesh.placed(StepData.of(jnp.asarray(corpus.train), config, step), mesh)


def named_leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def shard(leaf):
    """On how many devices an array is, and the shape that one of them holds."""
    return [len({shard.device for shard in leaf.addressable_shards}), *leaf.addressable_shards[0].data.shape]


def every_case(text, out, devices):
    """Arrays of every case; how they are spread, and what one device computes and exchanges in a step."""
    arrays, notes = {}, {}
    for name, (shape, config) in CASES.items():
        corpus = load(text, config.context + 1)
        mesh = device_mesh.mesh_for(config, *shape) if devices == "8" else None
        compiled, start, state, terms = steps(config, corpus, mesh)
        leaves = named_leaves(state)
        arrays.update({f"{name}/{path}": leaf for path, leaf in leaves.items()}, **{f"{name}/terms": terms})
        arrays.update({f"{name}/start{path}": leaf for path, leaf in named_leaves(start.model).items()})
        notes[name] = {
            "shards": {path: shard(leaf) for path, leaf in leaves.items()},
            "exchanges": sorted(set(re.findall(EXCHANGES, compiled.as_text()))),
            "flops": compiled.cost_analysis()["flops"],
        }
    if devices == "1":
        windows = draw_windows(*data_of(config, corpus, None, 0)[:3], config)
        count = eqx.filter_jit(negatives_at)
        notes["crossings"] = {site: int(count(start.model, windows, site)) for site in SITES}
    np.savez(out / f"{devices}.npz", **arrays)
    (out / f"{devices}.json").write_text(json.dumps(notes))


def in_a_process(out, *arguments):
    """The command itself, but for the evaluation, which no mesh changes; prints what is written below `out`.

    In place of the evaluation, a model with its heads in both processes is put together again.
    """

    def report(event, given):
        if event == "open" and str(given[0]).startswith(out) and given[2] & (os.O_WRONLY | os.O_RDWR):
            print("wrote", Path(str(given[0])).suffix)

    sys.addaudithook(report)
    stub = {"clean_loss": {"nats_per_character": 0, "characters": 0, "standard_error": 0}}
    stub["margins"] = {"layers": {"negative_share": 0}}

    def evaluate(model, corpus, config):
        mesh = device_mesh.mesh_for(config, 1, 4)
        spread = device_mesh.placed(model, mesh)
        assert not spread.blocks[0].query.is_fully_addressable
        again = device_mesh.gathered(spread, mesh)
        assert jax.tree.all(jax.tree.map(np.array_equal, again, model))
        return stub, {"embedding": np.zeros(1), "layers": np.zeros(1)}

    commands.evaluate = evaluate
    cli.run(lambda: commands.main(list(arguments)))


def environment(devices):
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        # What random numbers are drawn depends on it, and this process has it on.
        "JAX_ENABLE_X64": "1",
        # The code runs twice, and compiling it is what takes time.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }


def run_together(commands, out, seconds=300):
    """Output of commands, each after its number of devices, run at once; none outlives this or another's failure."""
    files = [(out / f"{number}.out").open("w+") for number in range(len(commands))]
    processes = [
        subprocess.Popen([sys.executable, __file__, *command], env=environment(devices), stdout=file, stderr=file)
        for (devices, command), file in zip(commands, files, strict=True)
    ]
    deadline = time.monotonic() + seconds
    try:
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    outputs = []
    for file in files:
        file.seek(0)
        outputs.append(file.read())
        file.close()
    assert [process.returncode for process in processes] == [0] * len(commands), "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def found(text, tmp_path_factory):
    """Arrays and notes from 8 devices, then those from one."""
    out = tmp_path_factory.mktemp("found")
    run_together([(8, ["8", str(text), str(out)]), (1, ["1", str(text), str(out)])], out)
    return [(np.load(out / f"{devices}.npz"), json.loads((out / f"{devices}.json").read_text())) for devices in "81"]


def assert_same_state(found, expected):
    """Every leaf to 1e-5, and to 1e-5 of its own largest element, which is stricter for the optimiser's moments."""
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        allowed = 1e-5 * min(1, np.abs(leaf).max())
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=allowed, err_msg=path)


def state_in(arrays, case):
    return {path.removeprefix(f"{case}/"): arrays[path] for path in arrays if path.startswith(f"{case}/.")}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_on_8_devices_is_the_step_on_one(found, case):
    (on_eight, _), (on_one, _) = found
    expected = state_in(on_one, case)
    moved = [np.abs(expected[f".model{path}"] - on_one[f"{case}/start{path}"]).max() for path in BLOCK]
    assert min(moved) > 1e-3
    np.testing.assert_allclose(on_eight[f"{case}/terms"], on_one[f"{case}/terms"], rtol=1e-5, atol=1e-6)
    assert_same_state(state_in(on_eight, case), expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_device_does_its_share_and_only_sums_are_exchanged(found, case):
    (_, notes), (_, alone) = found
    (_, heads), _ = CASES[case]
    of_heads = {path: shard for path, shard in notes[case]["shards"].items() if path.endswith(BLOCK)}
    # The parameters and two moments of each.
    assert len(of_heads) == 3 * len(BLOCK)
    assert {tuple(shard[:2]) for shard in of_heads.values()} == {(8, 4 // heads)}
    assert {shard[0] for shard in notes[case]["shards"].values()} == {8}
    assert notes[case]["exchanges"] == ["all-reduce"]
    # More than an eighth, for the update of what is not spread, and the mlp, done along "heads" again.
    assert notes[case]["flops"] < 0.35 * alone[case]["flops"]


def options(config, text, out):
    """The command line of a configuration."""
    named = {name: value for name, value in config.as_dict().items() if value != getattr(Config(), name)}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in named.items()]
    return ["train", "--corpus", str(text), "--out", str(out), *(part for pair in pairs for part in pair)]


@pytest.mark.slow
def test_two_processes_train_as_one_does(found, text, tmp_path):
    _, (on_one, notes) = found
    _, config = CASES["margin"]
    out = tmp_path / "two"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    several = ["--mesh", "data=2,heads=2", "--coordinator", address, "--processes", "2", "--process-id"]
    shared = ["process", str(out), *options(config, text, out), *several]
    first, second = run_together([(2, [*shared, "0"]), (2, [*shared, "1"])], tmp_path)
    assert "margin@layers: " in first
    assert all(f"wrote {suffix}" in first for suffix in (".eqx", ".npz", ".json"))
    assert not re.search("wrote|margin@layers", second)

    corpus = load(text, config.context + 1)
    like = initial_state(config, len(corpus.vocabulary))
    state, step, noted = checkpoint.load(out / checkpoint.NAME, config.as_dict(), corpus.sha256, like)
    assert step == STEPS
    assert_same_state(named_leaves(state), state_in(on_one, "margin"))
    terms = [list(entry.values())[1:] for entry in noted["history"]]
    np.testing.assert_allclose(terms, on_one["margin/terms"], rtol=1e-5, atol=1e-6)
    seen = {site: x["positions_negative"] for site, x in noted["crossings"].items()}
    assert seen == notes["crossings"]


def test_processes_that_were_given_different_things_are_refused(monkeypatch):
    monkeypatch.setattr(device_mesh.multihost_utils, "process_allgather", lambda own: np.stack([own, own + 1]))
    with pytest.raises(ValueError, match=r"--processes: the processes differ in options, text; start all with"):
        device_mesh.require_agreement(options={"seed": 0}, text="a")


if __name__ == "__main__":
    if sys.argv[1] == "process":
        in_a_process(*sys.argv[2:])
    else:
        every_case(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[1])
