"""Loops over data: take config and objects, yield events; no command line, no printing."""
