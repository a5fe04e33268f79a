"""Memory and cost of a run on devices that need not be present: `format_plan(plan(config, "v5e:4x4"))`."""

from sisma_jax.planning.plan import plan
from sisma_jax.planning.report import Plan, format_plan, to_json

__all__ = ["Plan", "format_plan", "plan", "to_json"]
