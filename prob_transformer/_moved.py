"""Module names of version 0.1: importing one raises an ImportError that names the new one."""

import sys
from importlib.abc import MetaPathFinder

_NEW_NAMES = {
    "accelerated": "kernels, by implementation='blocked' of the public functions",
    "decoder": "attention",
    "decoder_models": "pretrained",
    "inference.laplace.blockwise": "inference.laplace.kronecker",
    "inference.laplace.kfac": "inference.laplace.kronecker",
    "inference.laplace.matrix_free": "inference.laplace.curvature",
    "inference.laplace.potential": "inference.laplace.curvature",
    "inference.nuts": "inference.nuts_sampler",
    "inference.nuts_result": "inference.nuts_sampler",
    "inference.particle_result": "inference.particles",
    "inference.predictive": "inference.embedding_sites",
    "inference.reparam": "inference.embedding_sites",
    "inference.results": "inference.result_tree",
    "inspect": "inspection",
    "margin": "margins",
    "objective": "map_objectives",
    "output": "files",
    "penalty": "training_barrier",
    "process": "embedding_process",
    "provenance": "files",
    "query_key": "logits",
    "transform": "sampling (the transform) and prob_transformer.root_finder (the solver)",
}


class _MovedModules(MetaPathFinder):
    """Finds no module; raises for those that have moved."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        package, _, name = fullname.partition(".")
        if package == "prob_transformer" and name in _NEW_NAMES:
            new = _NEW_NAMES[name]
            raise ImportError(
                f"{fullname} is now prob_transformer.{new}; CHANGELOG.md lists all new names.", name=fullname
            )


# Last, so that only imports that find nothing else come here. Where a checkout keeps an old folder with nothing but
# compiled files, Python takes the folder for an empty package and this error does not show.
sys.meta_path.append(_MovedModules())
