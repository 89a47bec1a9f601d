"""Proof that a run survives: killed at any moment, with faults injected, over thousands of steps, and standing still."""
