"""The catalogue: ready surgeries, each a small frozen dataclass that uses the public protocol alone."""

from flax_surgery_hooks.surgeries.averages import Ema as Ema
from flax_surgery_hooks.surgeries.averages import Lawa as Lawa
from flax_surgery_hooks.surgeries.averages import Swa as Swa
from flax_surgery_hooks.surgeries.balance import Balance as Balance
from flax_surgery_hooks.surgeries.copies import Graft as Graft
from flax_surgery_hooks.surgeries.copies import Lookahead as Lookahead
from flax_surgery_hooks.surgeries.copies import Rewind as Rewind
from flax_surgery_hooks.surgeries.copies import Swap as Swap
from flax_surgery_hooks.surgeries.low_rank import Factorize as Factorize
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
from flax_surgery_hooks.surgeries.plasticity import ContinualBackprop as ContinualBackprop
from flax_surgery_hooks.surgeries.plasticity import RecycleDormant as RecycleDormant
from flax_surgery_hooks.surgeries.plasticity import ShrinkAndPerturb as ShrinkAndPerturb
from flax_surgery_hooks.surgeries.pruning import Prune as Prune
from flax_surgery_hooks.surgeries.qk_clip import QKClip as QKClip
from flax_surgery_hooks.surgeries.resize import GrowVocab as GrowVocab
from flax_surgery_hooks.surgeries.resize import ReplaceHead as ReplaceHead
from flax_surgery_hooks.surgeries.sparse_training import SET as SET
from flax_surgery_hooks.surgeries.sparse_training import RigL as RigL
from flax_surgery_hooks.surgeries.values import Assign as Assign
from flax_surgery_hooks.surgeries.values import Noise as Noise
from flax_surgery_hooks.surgeries.values import Reinit as Reinit
from flax_surgery_hooks.surgeries.width import MergeUnits as MergeUnits
from flax_surgery_hooks.surgeries.width import Shrink as Shrink
from flax_surgery_hooks.surgeries.width import Widen as Widen

__all__ = [
    "SET",
    "Assign",
    "Balance",
    "ClipNorm",
    "ContinualBackprop",
    "Ema",
    "Factorize",
    "Freeze",
    "Graft",
    "GrowVocab",
    "Lawa",
    "Lookahead",
    "MergeLora",
    "MergeUnits",
    "Noise",
    "Normalize",
    "Prune",
    "QKClip",
    "ReLoRA",
    "RecycleDormant",
    "Reinit",
    "ReplaceHead",
    "ResetMoments",
    "Rewarm",
    "Rewind",
    "RigL",
    "Scale",
    "SetHyperparams",
    "Shrink",
    "ShrinkAndPerturb",
    "Swa",
    "Swap",
    "SwitchOptimizer",
    "Thaw",
    "Widen",
]
