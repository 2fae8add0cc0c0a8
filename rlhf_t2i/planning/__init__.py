"""What a recipe will need, before anything starts: parameters, memory, traffic, floating-point operations, seconds."""

from rlhf_t2i.planning.memory import GroupPlan, Memory, RolePlan, trained_memory
from rlhf_t2i.planning.plan import Plan, make
from rlhf_t2i.planning.traffic import Traffic

__all__ = ["GroupPlan", "Memory", "Plan", "RolePlan", "Traffic", "make", "trained_memory"]
