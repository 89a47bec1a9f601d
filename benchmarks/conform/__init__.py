"""Conformance of trainers: one suite of checks for silent faults, run on any trainer behind a small adapter."""
