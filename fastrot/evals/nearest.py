"""Similarities between pictures, in blocks on a device: never all pairs at once."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fastrot import dist

BLOCK = 2**23  # similarities at once


def similarities(
    queries: Float[Tensor, "q d"],
    gallery: Float[Tensor, "n d"],
    device: torch.device,
    *,
    same: bool = False,
) -> Iterator[tuple[Int64[Tensor, " b"], Float[Tensor, "b n"]]]:
    """This rank's share of the queries, and their cosines with all of the gallery, of unit length both, in float32.

    same  queries and gallery are the same pictures: a picture is not like itself, but -inf

    The memory that it takes beyond the gallery's own on the device does not grow with n.
    """
    gallery = gallery.to(device)
    mine = torch.arange(dist.rank(), len(queries), dist.world())
    for places in mine.split(max(1, BLOCK // len(gallery))):
        found = queries[places].to(device) @ gallery.T
        if same:
            found[torch.arange(len(places)), places.to(device)] = -torch.inf
        yield places, found
