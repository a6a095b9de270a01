"""Callbacks for ``model.fit``: Horovod's, rewritten for Keras 3, and two for gossip."""

from gossip_hvd.tensorflow.keras.callbacks.best import BestModelCheckpoint
from gossip_hvd.tensorflow.keras.callbacks.broadcast import BroadcastGlobalVariablesCallback
from gossip_hvd.tensorflow.keras.callbacks.checkpoint import GossipCheckpoint
from gossip_hvd.tensorflow.keras.callbacks.gossip import GossipCallback
from gossip_hvd.tensorflow.keras.callbacks.metrics import MetricAverageCallback
from gossip_hvd.tensorflow.keras.callbacks.rates import (
    LearningRateScheduleCallback,
    LearningRateWarmupCallback,
)

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "GossipCallback",
    "GossipCheckpoint",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]
