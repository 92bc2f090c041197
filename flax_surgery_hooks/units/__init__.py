"""Units of a network: which elements of leaves make each, which read it, and what it does on a batch."""

from flax_surgery_hooks.units.captured import activations as activations
from flax_surgery_hooks.units.captured import capture as capture
from flax_surgery_hooks.units.groups import Units as Units
from flax_surgery_hooks.units.wiring import check as check
from flax_surgery_hooks.units.wiring import find as find

__all__ = ["Units", "activations", "capture", "check", "find"]
