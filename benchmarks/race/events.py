"""What the recorder has seen of every message, for a picture of one step."""

from __future__ import annotations

from collections import deque
from typing import Any


def keep(gossip: Any) -> None:
    """Keep all events from now on, not the last few thousand."""
    gossip.engine.seat.record.events = deque()


def kept(gossip: Any) -> dict[str, Any]:
    """The events, and where the cells lie that they speak of."""
    seat = gossip.engine.seat
    return {
        "events": [tuple(event) for event in seat.record.events],
        "cells": [[cell.start, cell.stop, cell.unit] for cell in seat.grid("segments").cells],
    }
