"""The Inception features of FID, from torch-fidelity: the weights and the resizing of the published numbers.

Not run in our tests: torch-fidelity needs torchvision, which does not exist for the torch that they pin. Its interface was
read in the sources of version 0.4.0.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from noisewise.errors import MissingExtra, require

__all__ = ["inception_features"]


def inception_features(device: str = "cpu") -> Callable[[UInt8[Tensor, "n 3 h w"]], Float[Tensor, "n 2048"]]:
    """The extractor: grey levels 0 to 255 to the 2048 numbers that FID compares. Downloads its weights once.

    Raises `MissingExtra` where torch-fidelity is not installed, or cannot be imported beside this torch.
    Source: Heusel et al., NeurIPS 2017; Obukhov et al., torch-fidelity, 2020 ("inception-v3-compat", as TensorFlow's).
    """
    try:
        utilities = require("torch_fidelity.utils", "fid")
    except RuntimeError as error:  # a torchvision of another build does not find its operators
        raise MissingExtra(
            f"torch_fidelity cannot be imported beside torch {torch.__version__} ({error}): install the torchvision that belongs "
            "to this torch, then: pip install 'noisewise[fid]'"
        ) from error
    network = utilities.create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=device.startswith("cuda"), verbose=False
    )

    @torch.no_grad()
    def features(images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2048"]:
        return network(images)[0]

    return features
