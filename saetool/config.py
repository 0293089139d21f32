"""The options of each verb with their defaults, units and sources. No torch here."""

from dataclasses import dataclass
