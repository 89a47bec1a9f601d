"""Processes for generated code: confined, limited, and gone afterwards."""

from rewards.sandbox.sandbox import (
    Handle,
    Isolation,
    Limits,
    Module,
    Ran,
    RemoteError,
    Sandbox,
    Stopped,
    Unavailable,
)

__all__ = ["Handle", "Isolation", "Limits", "Module", "Ran", "RemoteError", "Sandbox", "Stopped", "Unavailable"]
