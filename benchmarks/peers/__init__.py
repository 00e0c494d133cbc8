"""Runtimes, side by side: `start` one, then ask it to decode and prefill."""

from .client import Peer, PeerError, Unavailable, start
from .environments import PEERS

NAMES = list(PEERS)

__all__ = ["NAMES", "Peer", "PeerError", "Unavailable", "start"]
