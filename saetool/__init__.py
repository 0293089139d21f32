"""Sparse autoencoders as shell pipelines over checkpoint files."""

__version__ = "0.1.0"
