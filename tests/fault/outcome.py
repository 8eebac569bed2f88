"""What each part of the campaign reports."""

from dataclasses import dataclass


@dataclass
class Outcome:
    name: str
    tried: int
    failures: list[str]
    seconds: float
