"""``ElasticSampler``: shares what is left of an epoch among all ranks."""

from __future__ import annotations

from horovod.torch.elastic import sampler as horovods

from gossip_hvd import session

__all__ = ["ElasticSampler"]


class ElasticSampler(horovods.ElasticSampler):  # type: ignore[misc]
    """Horovod's sampler, over all ranks in both scopes; arguments as Horovod's."""

    def reset(self) -> None:
        """Share what is left of this epoch among the ranks there are now."""
        world = session.current().world
        ranks = horovods.rank, horovods.size
        horovods.rank, horovods.size = (lambda: world.rank), (lambda: world.size)
        try:
            super().reset()
        finally:
            horovods.rank, horovods.size = ranks
