"""Devices that compute beside the processor: their memory, copies and order."""

from tiered.device.device import Device, Event

__all__ = ["Device", "Event"]
