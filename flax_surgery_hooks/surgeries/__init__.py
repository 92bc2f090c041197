"""The catalogue: ready surgeries, each a small frozen dataclass that uses the public protocol alone."""

from flax_surgery_hooks.surgeries.balance import Balance as Balance
from flax_surgery_hooks.surgeries.low_rank import MergeLora as MergeLora
from flax_surgery_hooks.surgeries.low_rank import ReLoRA as ReLoRA
from flax_surgery_hooks.surgeries.norms import ClipNorm as ClipNorm
from flax_surgery_hooks.surgeries.norms import Normalize as Normalize
from flax_surgery_hooks.surgeries.norms import Scale as Scale
from flax_surgery_hooks.surgeries.optimizer import ResetMoments as ResetMoments
from flax_surgery_hooks.surgeries.optimizer_state import Freeze as Freeze
from flax_surgery_hooks.surgeries.optimizer_state import Rewarm as Rewarm
from flax_surgery_hooks.surgeries.optimizer_state import SetHyperparams as SetHyperparams
from flax_surgery_hooks.surgeries.optimizer_state import SwitchOptimizer as SwitchOptimizer
from flax_surgery_hooks.surgeries.optimizer_state import Thaw as Thaw
from flax_surgery_hooks.surgeries.pruning import Prune as Prune
from flax_surgery_hooks.surgeries.qk_clip import QKClip as QKClip
from flax_surgery_hooks.surgeries.sparse_training import SET as SET
from flax_surgery_hooks.surgeries.sparse_training import RigL as RigL
from flax_surgery_hooks.surgeries.values import Assign as Assign
from flax_surgery_hooks.surgeries.values import Noise as Noise
from flax_surgery_hooks.surgeries.values import Reinit as Reinit

__all__ = [
    "SET",
    "Assign",
    "Balance",
    "ClipNorm",
    "Freeze",
    "MergeLora",
    "Noise",
    "Normalize",
    "Prune",
    "QKClip",
    "ReLoRA",
    "Reinit",
    "ResetMoments",
    "Rewarm",
    "RigL",
    "Scale",
    "SetHyperparams",
    "SwitchOptimizer",
    "Thaw",
]
