"""What a recipe will need, before anything starts: parameters, memory, traffic, seconds, and what makes it fit."""

from rlhf_t2i.planning.devices import ACHIEVED, DEVICES, HERE, USABLE, Device, Rates, named
from rlhf_t2i.planning.fit import Fit, changed, check
from rlhf_t2i.planning.memory import GroupPlan, Memory, RolePlan
from rlhf_t2i.planning.plan import Plan, make
from rlhf_t2i.planning.time import StepTime
from rlhf_t2i.planning.time import of_recipe as step_time
from rlhf_t2i.planning.traffic import Traffic

__all__ = [
    "ACHIEVED", "DEVICES", "HERE", "USABLE", "Device", "Fit", "GroupPlan", "Memory", "Plan", "Rates", "RolePlan",
    "StepTime", "Traffic",
    "changed", "check", "make", "named", "step_time",
]  # fmt: skip
