"""Measurements: what this machine can, and how fast a model runs on it, in the same units."""

from earnest.measure.machine import Machine, Rates, fits, look, measure_rates, try_rates
from earnest.measure.speed import Plan, Row, Speed, measure_speed, plan

__all__ = [
    "Machine",
    "Plan",
    "Rates",
    "Row",
    "Speed",
    "fits",
    "look",
    "measure_rates",
    "measure_speed",
    "plan",
    "try_rates",
]
