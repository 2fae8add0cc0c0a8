"""What a recipe will need, before anything starts: parameters, memory, traffic, seconds, and what makes it fit."""

from rlhf_t2i.tools.planning.devices import ACHIEVED, DEVICES, HERE, USABLE, Device, Rates, named
from rlhf_t2i.tools.planning.fit import Fit, changed, check
from rlhf_t2i.tools.planning.memory import GroupPlan, Memory, RolePlan
from rlhf_t2i.tools.planning.plan import Plan, make
from rlhf_t2i.tools.planning.time import StepTime
from rlhf_t2i.tools.planning.time import of_recipe as step_time
from rlhf_t2i.tools.planning.traffic import Traffic

__all__ = [
    "ACHIEVED", "DEVICES", "HERE", "USABLE", "Device", "Fit", "GroupPlan", "Memory", "Plan", "Rates", "RolePlan",
    "StepTime", "Traffic",
    "changed", "check", "make", "named", "step_time",
]  # fmt: skip
