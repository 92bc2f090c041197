"""Optax transforms whose states surgeries write into: for what has to act at every step after a fire.

They are part of the optimizer from the start, and change nothing until a surgery writes.
"""

from flax_surgery_hooks.optax.freezable import FreezableState as FreezableState
from flax_surgery_hooks.optax.freezable import freezable as freezable
from flax_surgery_hooks.optax.per_element import ScaleByAdamPerElementState as ScaleByAdamPerElementState
from flax_surgery_hooks.optax.per_element import adam_per_element as adam_per_element
from flax_surgery_hooks.optax.per_element import adamw_per_element as adamw_per_element
from flax_surgery_hooks.optax.per_element import scale_by_adam_per_element as scale_by_adam_per_element
from flax_surgery_hooks.optax.rewarm import RewarmState as RewarmState
from flax_surgery_hooks.optax.rewarm import rewarm as rewarm
