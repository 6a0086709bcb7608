"""Sweeps: one thing changed, several seeds, an equal budget."""

from launch.sweep.budgets import Flops as Flops
from launch.sweep.budgets import Seconds as Seconds
from launch.sweep.budgets import Tokens as Tokens
from launch.sweep.description import Options as Options
from launch.sweep.description import Sweep as Sweep
from launch.sweep.description import Values as Values
