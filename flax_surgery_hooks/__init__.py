"""Model surgery while a Flax model trains: hooks that edit params and the matching optax state.

See https://flax.readthedocs.io/en/latest/guides/model_surgery.html for what this replaces.
"""

from typing import TYPE_CHECKING, Any

from flax_surgery_hooks import errors as errors
from flax_surgery_hooks import metrics as metrics
from flax_surgery_hooks import sparsity as sparsity
from flax_surgery_hooks import surgeries as surgeries
from flax_surgery_hooks import units as units
from flax_surgery_hooks.adapters import bind as bind
from flax_surgery_hooks.adapters import bind_nnx as bind_nnx
from flax_surgery_hooks.averages import average_of as average_of
from flax_surgery_hooks.collectives import Collective as Collective
from flax_surgery_hooks.collectives import collectives as collectives
from flax_surgery_hooks.count_schedules import at_count as at_count
from flax_surgery_hooks.count_schedules import every_count as every_count
from flax_surgery_hooks.derived_schedules import at_epochs as at_epochs
from flax_surgery_hooks.derived_schedules import at_fraction as at_fraction
from flax_surgery_hooks.derived_schedules import cooldown as cooldown
from flax_surgery_hooks.derived_schedules import every_epochs as every_epochs
from flax_surgery_hooks.derived_schedules import every_fraction as every_fraction
from flax_surgery_hooks.derived_schedules import every_updates as every_updates
from flax_surgery_hooks.derived_schedules import first as first
from flax_surgery_hooks.derived_schedules import last as last
from flax_surgery_hooks.errors import SurgeryError as SurgeryError
from flax_surgery_hooks.hooks import SurgeryHooks as SurgeryHooks
from flax_surgery_hooks.ledger import Ledger as Ledger
from flax_surgery_hooks.ledger import Record as Record
from flax_surgery_hooks.metric_schedules import on_metric as on_metric
from flax_surgery_hooks.operate import operate as operate
from flax_surgery_hooks.plan import Plan as Plan
from flax_surgery_hooks.rollback import Rollback as Rollback
from flax_surgery_hooks.schedules import Schedule as Schedule
from flax_surgery_hooks.schedules import at as at
from flax_surgery_hooks.schedules import every as every
from flax_surgery_hooks.selection import select as select
from flax_surgery_hooks.slot_registry import register_slot as register_slot
from flax_surgery_hooks.surgery import Surgery as Surgery
from flax_surgery_hooks.surgery import key_for as key_for
from flax_surgery_hooks.train_state import TrainState as TrainState

if TYPE_CHECKING:
    from flax_surgery_hooks import checkpoint as checkpoint
    from flax_surgery_hooks import config as config
    from flax_surgery_hooks import optax as optax
    from flax_surgery_hooks.config import register_surgery as register_surgery


def __getattr__(name: str) -> Any:
    """Imported when first asked for: checkpoints, which need Orbax; configs, which with ml_collections are a third of
    the import; and transforms.
    """
    if name not in ("checkpoint", "config", "optax", "register_surgery"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if name in ("checkpoint", "optax"):
        return importlib.import_module(f"flax_surgery_hooks.{name}")
    config = importlib.import_module("flax_surgery_hooks.config")
    return config if name == "config" else config.register_surgery
